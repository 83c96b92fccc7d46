"""EmbeddingActor: holds encoder and slide model, and takes patches from the actors that read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from s4mil_monai.batch.far_slide import ReadToTheEnd, SeenSlide, UnscoredSlide
from s4mil_monai.batch.logs import set_up_logs
from s4mil_monai.batch.scoring_process import named
from s4mil_monai.batch.slide_worker import Opened, SlideWorker, describe_failure
from s4mil_monai.batch.work import EndedElsewhereError, Failed, Lost, Scored, Work, WorkerSettings
from s4mil_monai.errors import S4MilError, first_line
from s4mil_monai.extras import require
from s4mil_monai.features.encoder import Encoder
from s4mil_monai.features.patch_stream import RegionBatch
from s4mil_monai.features.prepare import PreparedSlide
from s4mil_monai.scoring import explain_unscored
from s4mil_monai.timing import Stages

BATCHES_ASKED_FOR = 4
"""Of one slide: what waits in the object store at most, whatever the slide's size, while the encoder is busy."""


class EmbeddingActor:
    """Scores several slides at once, each in a thread and from another reading actor, which take turns at the
    encoder: one slow disk does not keep it waiting."""

    def __init__(self, settings: WorkerSettings):
        self._settings = settings

    def load(self) -> S4MilError | None:
        """Load the model; gives the error where that cannot be done."""
        from s4mil_monai.allocator import keep_large_buffers

        set_up_logs()
        keep_large_buffers()
        try:
            self._worker = SlideWorker(self._settings)
        except S4MilError as error:
            return error
        self._worker.scorer = replace(self._worker.scorer, encoder=_in_turns(self._worker.scorer.encoder))
        return None

    def score(self, work: Work, reader: Any) -> Scored | Failed | Lost:
        """Score one slide.

        Args:
            work: The slide.
            reader: Handle of a :class:`ReadingActor` that has nothing else to do.
        """
        far = FarReader(reader, work)
        outcome = None
        with named(work):
            try:
                outcome = self._score(work, far)
            except EndedElsewhereError:
                pass
            except Exception as error:  # raised, it would cost the other slides of this actor a try
                far.let_go()
                outcome = describe_failure(work, error)
        ended = far.ended or outcome
        assert ended is not None
        return ended

    def _score(self, work: Work, far: FarReader) -> Scored | Failed:
        stages = Stages()
        seen = far.open(self._worker.scorer.bundle.settings.patches)
        if isinstance(seen, UnscoredSlide):
            add_seconds(stages, seen.seconds)
            result = explain_unscored(seen.slide, seen.why, self._worker.scorer, stages)
            return far.write(self._worker.finish(Opened(work, seen.slide, result)))
        prepared = seen.prepared(Future(), stages)
        if self._settings.features is not None:  # they are found by the slide's content
            prepared.fingerprint.set_result(far.finish_reading(stages))
        done = self._worker.embed(Opened(work, seen.slide, prepared), far.read(prepared))
        if isinstance(done, Failed):
            far.let_go()
            return done
        return far.write(self._worker.finish(done))


class FarReader:
    """The reading actor of one slide."""

    def __init__(self, reader: Any, work: Work):
        self._ray = require("ray", extra="ray")
        self._reader, self._work = reader, work
        self._counted: dict[str, float] = {}
        self.ended: Failed | Lost | None = None
        """How the slide ended there, if not well."""

    def open(self, patches: Any) -> SeenSlide | UnscoredSlide:
        """Have it opened and looked over."""
        return self._answer(self._reader.open.remote(self._work, patches))

    def read(self, prepared: PreparedSlide) -> Iterator[RegionBatch]:
        """Its patches, some batches of which are asked for ahead; at the end the fingerprint is known."""
        asked = deque(self._ask_for_more() for _ in range(BATCHES_ASKED_FOR))
        while (batch := self._answer(asked.popleft())) is not None:
            asked.append(self._ask_for_more())
            yield replace(batch, regions=np.array(batch.regions))  # a copy: the object store's is read-only
        slide_sha256 = self.finish_reading(prepared.stages)
        if not prepared.fingerprint.done():
            prepared.fingerprint.set_result(slide_sha256)

    def _ask_for_more(self) -> Any:
        return self._reader.read_on.remote(self._work.lease)

    def finish_reading(self, stages: Stages) -> str:
        """Its fingerprint; to ``stages`` comes what the reader has done since it was last asked."""
        end: ReadToTheEnd = self._answer(self._reader.finish_reading.remote(self._work.lease))
        new = {stage: spent - self._counted.get(stage, 0.0) for stage, spent in end.seconds.items()}
        add_seconds(stages, new)
        self._counted = end.seconds
        return end.slide_sha256

    def write(self, done: Any) -> Scored | Failed:
        """Have its result written."""
        return self._answer(self._reader.write.remote(self._work.lease, done))

    def let_go(self) -> None:
        """Have it closed."""
        self._reader.let_go.remote(self._work.lease)

    def _answer(self, ref: Any) -> Any:
        """Wait for an answer.

        Raises:
            EndedElsewhereError: There is none; :attr:`ended` says why.
        """
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self.ended = Lost(self._work.lease, f"the actor that reads is gone ({first_line(error)})")
            raise EndedElsewhereError from error
        if isinstance(answer, Failed):
            self.ended = answer
            raise EndedElsewhereError
        return answer


def add_seconds(stages: Stages, seconds: dict[str, float]) -> None:
    """Add what another process reports; its total is no stage."""
    for stage, spent in seconds.items():
        if stage != "total":
            stages.add(stage, spent)


def _in_turns(encoder: Encoder) -> Encoder:
    """The same encoder, for several threads."""
    turn = threading.Lock()

    def guarded(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def encode_in_turn(patches: Tensor) -> Tensor:
            with turn:
                return encode(patches)

        return encode_in_turn

    return Encoder(
        encoder.spec,
        guarded(encoder.encode),
        encoder.fingerprint,
        encoder.device,
        runtime=encoder.runtime,
        precision=encoder.precision,
    )
