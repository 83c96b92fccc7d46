"""The contract every reading backend keeps: full-size RGB regions, white outside the scan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from s4mil_monai.errors import DecoderHungError, UnknownResolutionError, UnreadableSlideError, first_line
from s4mil_monai.geometry import Level, PointPx0, Resolution, SizePx

WHITE = 255


class Slide(ABC):
    """An open slide.

    A backend opens the file, lists its levels and reads rectangles that lie wholly inside one level;
    everything that users rely on (coordinates, edges, error texts) is here, once, for all of them.

    Safe to read from several threads at once.
    """

    backend: ClassVar[str]

    magnification: float | None = None
    """Nominal, as the file says it; no resolution, since scanners differ in what they call 20x."""

    def __init__(self, path: Path, levels: Sequence[Level]):
        self.path = path
        self.levels = tuple(levels)
        self.resolution: Resolution | None = None
        """None where nothing says it; set by :func:`s4mil_monai.slides.reader.open_slide`."""
        self.passed_over: tuple[str, ...] = ()
        """Backends tried before this one, each with its reason: ``"cucim: cannot load"``."""
        self.notes: tuple[str, ...] = ()
        """What whoever reads the result should know, such as levels that are not used."""

    @property
    def name(self) -> str:
        r"""File or folder name; what results and errors call the slide; broken bytes read ``\udcfc``."""
        return self.path.name.encode("utf-8", "backslashreplace").decode("utf-8")

    @property
    def size_px0(self) -> SizePx:
        """(width, height) of level 0."""
        return self.levels[0].size_px

    @property
    def mpp(self) -> float:
        """µm per level-0 pixel.

        Raises:
            UnknownResolutionError: Neither the file nor the operator says it.
        """
        if self.resolution is None:
            nominal = f", only a magnification of {self.magnification:g}" if self.magnification else ""
            raise UnknownResolutionError(
                self.name,
                f"no microns-per-pixel in the file{nominal}, so 20x cannot be found; "
                "give the scanner's value (0.25 for most 40x scans, 0.5 for 20x) with --assume_mpp (score, embed, "
                "inspect) or by a line in the site's table of resolutions (--resolutions; resolutions: in "
                "site.yaml; S4MIL_RESOLUTIONS)",
            )
        return self.resolution.mpp

    def read_region(self, *, top_left_px0: PointPx0, size_px: SizePx, level: int = 0) -> NDArray[np.uint8]:
        """Read one rectangle as (height, width, 3) RGB uint8, always of full size, white outside the scan.

        Args:
            top_left_px0: (x, y) in level-0 pixels; may lie outside the scan. It is rounded to the nearest
                whole pixel of ``level``, which every backend does alike.
            size_px: (width, height) in pixels of ``level``.
            level: Index into :attr:`levels`.

        Raises:
            UnreadableSlideError: The pixels cannot be decoded.
        """
        width, height = size_px
        wanted = self.levels[level]
        left, top = (round(at / wanted.downsample) for at in top_left_px0)
        level_width, level_height = wanted.size_px
        x0, x1 = max(left, 0), min(left + width, level_width)
        y0, y1 = max(top, 0), min(top + height, level_height)
        if (x0, y0, x1, y1) == (left, top, left + width, top + height):
            return self._decode(x0, y0, width, height, wanted)
        region = np.full((height, width, 3), WHITE, np.uint8)
        if x0 < x1 and y0 < y1:
            inside = self._decode(x0, y0, x1 - x0, y1 - y0, wanted)
            region[y0 - top : y1 - top, x0 - left : x1 - left] = inside
        return region

    def _decode(self, x: int, y: int, width: int, height: int, level: Level) -> NDArray[np.uint8]:
        try:
            return self.read_inside(x, y, width, height, level)
        except DecoderHungError:
            raise
        except Exception as error:
            raise UnreadableSlideError(
                self.name,
                f"{self.backend} cannot decode {width}x{height} pixels at ({x}, {y}) of level {level.number} "
                f"({first_line(error)}); the file is damaged or incomplete, copy or scan it again",
            ) from error

    @abstractmethod
    def read_inside(self, x: int, y: int, width: int, height: int, level: Level) -> NDArray[np.uint8]:
        """Read (height, width, 3) RGB uint8 at (x, y) in pixels of ``level``, wholly inside it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
