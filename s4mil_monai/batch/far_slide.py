"""What travels of a slide: all that is known of it, less its pixels, which come batch by batch."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from s4mil_monai.features.prepare import PreparedSlide
from s4mil_monai.geometry import Level
from s4mil_monai.result import PatchSettings, QualityRecord
from s4mil_monai.scoring import NoScore
from s4mil_monai.slides.grid import PatchGrid
from s4mil_monai.slides.slide import Slide
from s4mil_monai.slides.tissue import TissueMask
from s4mil_monai.timing import Stages


class FarSlide(Slide):
    """What is known of a slide that is open in another process; it can be pickled."""

    backend: ClassVar[str] = "far"

    def __init__(self, slide: Slide):
        super().__init__(slide.path, slide.levels)
        self.backend = slide.backend  # type: ignore[misc]
        self.resolution, self.magnification = slide.resolution, slide.magnification
        self.passed_over, self.notes = slide.passed_over, slide.notes

    def read_inside(self, x: int, y: int, width: int, height: int, level: Level) -> NDArray[np.uint8]:
        raise ValueError(f"the pixels of {self.name} are to be had only where it is open")

    def close(self) -> None:
        """There is nothing to let go of."""


@dataclass(frozen=True)
class SeenSlide:
    """A slide that was looked over elsewhere and gets a score: a :class:`PreparedSlide` that can be pickled."""

    slide: FarSlide
    settings: PatchSettings
    tissue: TissueMask
    grid: PatchGrid
    quality: QualityRecord

    @classmethod
    def of(cls, prepared: PreparedSlide) -> SeenSlide:
        """What travels of a prepared slide."""
        return cls(FarSlide(prepared.slide), prepared.settings, prepared.tissue, prepared.grid, prepared.quality)

    def prepared(self, fingerprint: Future[str], stages: Stages) -> PreparedSlide:
        """The slide as it is where it is embedded.

        Args:
            fingerprint: Set when it is known there.
            stages: Of that process.
        """
        return PreparedSlide(self.slide, self.settings, self.tissue, self.grid, self.quality, fingerprint, stages)


@dataclass(frozen=True)
class UnscoredSlide:
    """A slide that was looked over elsewhere and gets no score."""

    slide: FarSlide
    why: NoScore
    seconds: dict[str, float]
    """By stage."""


@dataclass(frozen=True)
class ReadToTheEnd:
    """What is known of a slide once it has been read."""

    slide_sha256: str
    seconds: dict[str, float]
    """By stage, of the process that read it."""
