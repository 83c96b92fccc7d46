"""ReadingActor: opens one slide at a time, gives its patches when it is asked, and writes its result."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from s4mil_monai.batch.far_slide import FarSlide, ReadToTheEnd, SeenSlide, UnscoredSlide
from s4mil_monai.batch.ledger import Failure
from s4mil_monai.batch.logs import set_up_logs
from s4mil_monai.batch.scoring_process import named
from s4mil_monai.batch.slide_worker import Finished, ResultWriter, describe_failure
from s4mil_monai.batch.work import Failed, Scored, Work, WorkerSettings
from s4mil_monai.errors import S4MilError
from s4mil_monai.features.patch_stream import RegionBatch, read_ahead
from s4mil_monai.features.prepare import PreparedSlide
from s4mil_monai.result import PatchSettings
from s4mil_monai.scoring import NoScore, look_over
from s4mil_monai.slides.isolation import open_isolated, reader_pool
from s4mil_monai.slides.overrides import read_overrides
from s4mil_monai.slides.slide import Slide
from s4mil_monai.timing import Stages


@dataclass
class _Open:
    work: Work
    slide: Slide
    found: PreparedSlide | NoScore
    stages: Stages
    regions: Iterator[RegionBatch]


class ReadingActor:
    """Holds no model. Everything it is asked comes with the lease of the slide it is about, so that a process that
    was given up, and does not know it, gets nothing of the slide that is open now."""

    def __init__(self, settings: WorkerSettings):
        self._settings = settings
        self._open: _Open | None = None

    def load(self) -> S4MilError | None:
        """Get ready; gives the error where that cannot be done."""
        set_up_logs()
        reader_pool().warm_up()
        resolutions = self._settings.resolutions
        try:
            self._overrides = read_overrides(resolutions) if resolutions else None
            self._writer = ResultWriter(self._settings)
        except S4MilError as error:
            return error
        return None

    def begin(self, lease: str) -> str:
        """Answer, which says that this process is there and turns to the slide."""
        return lease

    def open(self, work: Work, patches: PatchSettings) -> SeenSlide | UnscoredSlide | Failed:
        """Open a slide, find its tissue and judge its quality; one that is open is let go of."""
        self._close()
        with named(work):
            try:
                shutil.rmtree(work.part, ignore_errors=True)
                work.part.mkdir(parents=True)
                self._open = self._look_over(work, patches)
            except Exception as error:
                return describe_failure(work, error)
        found, slide = self._open.found, FarSlide(self._open.slide)
        if isinstance(found, NoScore):
            return UnscoredSlide(slide, found, self._open.stages.report())
        return SeenSlide.of(found)

    def _look_over(self, work: Work, patches: PatchSettings) -> _Open:
        stages = Stages()
        with stages.timed("opening"):
            slide = open_isolated(work.path, overrides=self._overrides)
        try:
            found = look_over(slide, patches, stages, ignore_quality=self._settings.ignore_quality)
        except BaseException:
            slide.close()
            raise
        regions = iter(()) if isinstance(found, NoScore) else self._read(found)
        return _Open(work, slide, found, stages, regions)

    def _read(self, prepared: PreparedSlide) -> Iterator[RegionBatch]:
        return read_ahead(prepared, batch_size=self._settings.batch_size)

    def read_on(self, lease: str) -> RegionBatch | Failed | None:
        """The next patches in scan order; None after the last."""
        held = self._held(lease)
        if isinstance(held, Failed):
            return held
        with named(held.work):
            try:
                return next(held.regions, None)
            except Exception as error:
                return self._give_up(held, error)

    def finish_reading(self, lease: str) -> ReadToTheEnd | Failed:
        """The slide's fingerprint, waiting for it, and how long everything took."""
        held = self._held(lease)
        if isinstance(held, Failed):
            return held
        assert isinstance(held.found, PreparedSlide)
        with named(held.work):
            try:
                return ReadToTheEnd(held.found.fingerprint.result(), held.stages.report())
            except Exception as error:
                return self._give_up(held, error)

    def write(self, lease: str, done: Finished) -> Scored | Failed:
        """Write the result's folder, and let go of the slide."""
        held = self._held(lease)
        if isinstance(held, Failed):
            return held
        self._open = None
        with named(held.work):
            return self._writer.write(held.work, held.slide, done)

    def let_go(self, lease: str) -> None:
        """Close a slide that nothing more is wanted of."""
        if self._open is not None and self._open.work.lease == lease:
            self._close()

    def _held(self, lease: str) -> _Open | Failed:
        if self._open is not None and self._open.work.lease == lease:
            return self._open
        return Failed(lease, Failure("NotOpenError", "the slide is no longer open where it was read"))

    def _give_up(self, held: _Open, error: Exception) -> Failed:
        self._close()
        return describe_failure(held.work, error)

    def _close(self) -> None:
        held, self._open = self._open, None
        if held is None:
            return
        if isinstance(held.regions, Generator):
            held.regions.close()  # ends the threads that read ahead
        held.slide.close()
