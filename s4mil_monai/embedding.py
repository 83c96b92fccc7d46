"""embed_slides(): many slides in, one feature file each, done once, whatever happens in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from s4mil_monai import __version__
from s4mil_monai.errors import OutputError, SlideError
from s4mil_monai.features.claim import BusyError, claim
from s4mil_monai.features.encoder import Encoder
from s4mil_monai.features.extract import Extraction, Progress
from s4mil_monai.features.patch_stream import PatchBatch
from s4mil_monai.features.slide_stream import Collector, Failure, stream_all
from s4mil_monai.features.store import (
    OtherFormatError,
    WantedFeatures,
    clear_leftovers,
    find_reason_to_embed,
    save_bag,
)
from s4mil_monai.result import EncoderRecord, PatchSettings, QualityRecord
from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.overrides import Overrides
from s4mil_monai.slides.slide import Slide
from s4mil_monai.slides.slide_files import files_of
from s4mil_monai.timing import Stages
from s4mil_monai.whole_file import write_whole

Status = Literal["embedded", "present", "busy", "failed"]
"""``present``: embedded before, as wanted now; ``busy``: another process is at it."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EmbeddedSlide(_Record):
    """What became of one slide."""

    slide: str
    """Path of the slide."""
    file: str
    """Path of its features."""
    status: Status
    reason: str = ""
    """Why it failed, who is at it, or why it was embedded although it had been before."""
    patches: int = 0
    features: int = 0
    """Of each patch."""
    damaged_patches: int = 0
    """Left out."""
    mpp: float | None = None
    """µm per level-0 pixel."""
    mpp_source: str = ""
    backend: str = ""
    passed_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    quality: QualityRecord | None = None
    seconds: dict[str, float] = {}
    """Busy seconds by stage, and ``total``."""


class EmbeddingReport(_Record):
    """What became of all slides of one run; the content of ``embedding.json``."""

    format: Literal["s4mil.embedding/1"] = "s4mil.embedding/1"
    software: str = f"s4mil_monai {__version__}"
    encoder: EncoderRecord
    runtime: str
    precision: str
    settings: PatchSettings
    seconds: float
    """From the first slide to the last."""
    busy: dict[str, float]
    """Share of the seconds that each stage was busy; stages that overlap, or have several threads, may add up to
    more than one."""
    slides: tuple[EmbeddedSlide, ...]

    def count(self, status: Status) -> int:
        """How many slides ended so."""
        return sum(slide.status == status for slide in self.slides)


@dataclass(frozen=True)
class EmbeddingRun:
    """How slides are embedded."""

    encoder: Encoder
    settings: PatchSettings
    assume_mpp: float | None = None
    """µm per level-0 pixel of all of them; wins over what they say."""
    overrides: Overrides | None = None
    backends: tuple[str, ...] | None = None
    """Readers to try instead of those that fit the file."""
    patch_stage: str = "auto"
    batch_size: int = 16

    def open_slide(self, slide: Path) -> Slide:
        """Open one of them.

        Raises:
            SlideError: It cannot be.
        """
        return open_isolated(slide, assume_mpp=self.assume_mpp, overrides=self.overrides, backends=self.backends)

    @property
    def wanted(self) -> WantedFeatures:
        """Facts that a feature file must have to be left as it is, less those that differ from slide to slide."""
        return WantedFeatures(
            encoder=self.encoder.spec.name,
            encoder_sha256=self.encoder.fingerprint,
            settings=self.settings,
            encoder_runtime=self.encoder.runtime,
            encoder_precision=self.encoder.precision,
            slide_mpp=self.assume_mpp,
        )


class SlideEmbedding:
    """Slides on their way into one feature file each; whoever drives it has the encoder.

    A slide whose features are there as they are wanted now is left alone, one that another process works on is
    left to it, one that fails does not stop the others. Killed at any moment, a later run goes on: a file has
    its name only when it is whole.

    Args:
        files: For each slide the feature file it gets.
        run: How.

    Raises:
        OutputError: A folder cannot be written, which would fail for every slide.
    """

    def __init__(self, files: Mapping[Path, Path], run: EmbeddingRun):
        self.run = run
        self.done: list[EmbeddedSlide] = []
        """What became of the slides so far, in order."""
        self._files = {slide.absolute(): file for slide, file in files.items()}
        self._claims: dict[Path, ExitStack] = {}
        self._anew: dict[Path, str] = {}
        self._skipped: deque[EmbeddedSlide] = deque()
        self._collector = Collector(run.encoder, patch_stage=run.patch_stage)

    def batches(self) -> Iterator[PatchBatch]:
        """The patches that are to be encoded; each batch goes to :meth:`take` with its features."""
        for folder in {file.parent for file in self._files.values()}:
            clear_leftovers(folder)
        try:
            for item in self._stream():
                self._report_skipped()
                if isinstance(item, PatchBatch):
                    if not self._collector.has_given_up(item.prepared.slide.path):
                        yield item
                elif not self._collector.has_given_up(item.path):
                    self._finish(item)
            self._report_skipped()
        finally:
            for claimed in self._claims.values():
                claimed.close()

    def take(self, batch: PatchBatch, features: NDArray[np.float32]) -> None:
        """Take the (n, d) features of a batch; the file is written after the last one of its slide."""
        outcome = self._collector.add(batch, features)
        if outcome is not None:
            self._finish(outcome)

    def _stream(self) -> Iterator[PatchBatch | Failure]:
        run = self.run
        return stream_all(
            self._claim_each(),
            run.open_slide,
            run.encoder.spec,
            run.settings,
            device=run.encoder.device,
            patch_stage=run.patch_stage,
            batch_size=run.batch_size,
        )

    def _claim_each(self) -> Iterator[Path]:
        """Give the slides that are to be embedded, each claimed; the others are decided."""
        for slide, file in self._files.items():
            with ExitStack() as stack:
                try:
                    stack.enter_context(claim(file))
                    reason = _reason_to_embed(slide, file, self.run)
                except BusyError as busy:
                    self._skip(slide, "busy", busy.reason)
                    continue
                except OtherFormatError as other:
                    self._skip(slide, "failed", f"{other}; move it away or choose another folder")
                    continue
                if reason is None:
                    self._skip(slide, "present")
                    continue
                if file.exists():
                    self._anew[slide] = reason
                self._claims[slide] = stack.pop_all()
            yield slide

    def _skip(self, slide: Path, status: Status, reason: str = "") -> None:
        file = self._files[slide]
        self._skipped.append(EmbeddedSlide(slide=str(slide), file=str(file), status=status, reason=reason))

    def _report_skipped(self) -> None:
        while self._skipped:
            self.done.append(self._skipped.popleft())

    def _finish(self, outcome: Extraction | Failure) -> None:
        slide = outcome.path if isinstance(outcome, Failure) else outcome.prepared.slide.path
        with self._claims.pop(slide):
            done = _write(slide, self._files[slide], outcome)
        anew = self._anew.pop(slide, "")
        self.done.append(done if done.status == "failed" else done.model_copy(update={"reason": anew}))


def embed_slides(
    files: Mapping[Path, Path], run: EmbeddingRun, *, progress: Progress | None = None
) -> Iterator[EmbeddedSlide]:
    """Embed slides into one feature file each; see :class:`SlideEmbedding`.

    Args:
        files: For each slide the feature file it gets.
        run: How.
        progress: Told patches done and patches in all, of the slide at hand.

    Yields:
        What became of each slide, as soon as it is known.

    Raises:
        OutputError: A folder cannot be written, which would fail for every slide.
    """
    embedding = SlideEmbedding(files, run)
    told = 0
    for batch in embedding.batches():
        with batch.prepared.stages.timed("encoding"):
            features = run.encoder.encode(batch.patches).numpy()
        embedding.take(batch, features)
        if progress is not None:
            progress(batch.start + len(features), len(batch.prepared.grid))
        yield from embedding.done[told:]
        told = len(embedding.done)
    yield from embedding.done[told:]


def _reason_to_embed(slide: Path, file: Path, run: EmbeddingRun) -> str | None:
    """Why a slide is to be embedded; None where its features are what is wanted.

    What costs more is looked at last: its resolution, for which its header is read, and its content, which is
    compared only where it was written after its features.
    """
    reason = find_reason_to_embed(file, run.wanted)
    if reason is not None:
        return reason
    try:
        wanted = replace(run.wanted, slide_mpp=_find_mpp(slide, run))
    except SlideError as error:
        return error.reason  # embedding it says so, and leaves the file as it is
    if _changed_at(slide) > file.stat().st_mtime:
        wanted = replace(wanted, slide_sha256=fingerprint_slide(slide))
    return find_reason_to_embed(file, wanted)


def _find_mpp(slide: Path, run: EmbeddingRun) -> float:
    """µm per level-0 pixel of a slide, as its file and the site's table say it now.

    Raises:
        SlideError: It cannot be opened, or nobody says it.
    """
    if run.assume_mpp is not None:
        return run.assume_mpp
    with run.open_slide(slide) as opened:
        return opened.mpp


def _changed_at(slide: Path) -> float:
    """When a slide, or the last file of it, was written; 0 where that cannot be told."""
    try:
        return max((file.stat().st_mtime for file in files_of(slide)), default=0.0)
    except OSError:
        return 0.0


def _write(slide: Path, file: Path, outcome: Extraction | Failure) -> EmbeddedSlide:
    """Write what was extracted."""
    if isinstance(outcome, Failure):
        return EmbeddedSlide(slide=str(slide), file=str(file), status="failed", reason=outcome.error.reason)
    stages = Stages()
    with stages.timed("writing"):
        save_bag(file, outcome.bag)
    opened, origin = outcome.prepared.slide, outcome.bag.origin
    return EmbeddedSlide(
        slide=str(slide),
        file=str(file),
        status="embedded",
        patches=len(outcome.bag),
        features=outcome.bag.features.shape[1],
        damaged_patches=origin.damaged_patches,
        mpp=origin.slide_mpp,
        mpp_source=origin.slide_mpp_source,
        backend=origin.backend,
        passed_over=opened.passed_over,
        notes=opened.notes + ((origin.patch_note,) if origin.patch_note else ()),
        quality=outcome.quality,
        seconds={**outcome.seconds, "writing": stages.report()["writing"]},
    )


def report_run(run: EmbeddingRun, slides: Sequence[EmbeddedSlide], *, seconds: float) -> EmbeddingReport:
    """Put together what became of all slides of a run that took so many seconds."""
    stages = sorted({stage for slide in slides for stage in slide.seconds} - {"total"})
    sums = {stage: sum(slide.seconds.get(stage, 0.0) for slide in slides) for stage in stages}
    return EmbeddingReport(
        encoder=EncoderRecord(
            name=run.encoder.spec.name, sha256=run.encoder.fingerprint, width=run.encoder.spec.width
        ),
        runtime=run.encoder.runtime,
        precision=run.encoder.precision,
        settings=run.settings,
        seconds=round(seconds, 3),
        busy={stage: round(sum_s / seconds, 3) for stage, sum_s in sums.items()} if seconds else {},
        slides=tuple(slides),
    )


def write_embedding_report(report: EmbeddingReport, path: Path) -> None:
    """Write the report; the name appears when the file is whole.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        write_whole(path, report.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror or error})") from error
