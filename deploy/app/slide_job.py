"""One slide on its way through the operators."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from s4mil_monai.errors import S4MilError
from s4mil_monai.features.prepare import PreparedSlide
from s4mil_monai.outputs.folder import check_target, whole_folder
from s4mil_monai.outputs.heatmap import HeatmapPicture
from s4mil_monai.result import SlideResult
from s4mil_monai.scoring import EmbeddedSlide
from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.mixed_folder import FoundSlide
from s4mil_monai.slides.overrides import Overrides
from s4mil_monai.slides.slide import Slide
from s4mil_monai.timing import Stages

logger = logging.getLogger("s4mil.app")


@dataclass
class SlideJob:
    """A slide, what has become of it so far, and what has to be let go of in the end."""

    found: FoundSlide
    out: Path
    overrides: Overrides | None = None
    """Resolutions of the site."""
    stages: Stages = field(default_factory=Stages)
    slide: Slide | None = None
    part: Path | None = None
    """Where outputs are written until all of them are."""
    prepared: PreparedSlide | None = None
    embedded: EmbeddedSlide | None = None
    result: SlideResult | None = None
    picture: HeatmapPicture | None = None
    folder: Path | None = None
    """Where the result is, once all of it is written."""
    failure: str | None = None
    _held: ExitStack = field(default_factory=ExitStack)

    @property
    def name(self) -> str:
        """Path of the slide in the input folder."""
        return str(self.found.below / self.found.path.name)

    def begin(self) -> None:
        """Open the slide and the folder for its result.

        Raises:
            S4MilError: The slide cannot be opened, or the folder is in use.
        """
        target = check_target(self.out / self.found.below, self.found.path)
        self.part = self._held.enter_context(whole_folder(target))
        with self.stages.timed("opening"):
            self.slide = self._held.enter_context(open_isolated(self.found.path, overrides=self.overrides))
        self.folder = target

    def publish(self) -> None:
        """Close the slide and let the result appear.

        Raises:
            OutputError: It cannot be renamed into place.
        """
        self._held.close()
        logger.info("%s: %s, in %s", self.name, self.result.status if self.result else "no result", self.folder)

    def fail(self, error: S4MilError) -> None:
        """Note the reason, and leave nothing half-written behind."""
        self.failure, self.folder = str(error), None
        logger.error("%s", " ".join(str(error).split()))
        try:
            self._held.__exit__(type(error), error, error.__traceback__)
        except S4MilError as second:
            logger.error("%s", second)
