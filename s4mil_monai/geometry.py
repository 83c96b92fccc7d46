"""Units and frames shared by every stage.

Positions are ``(x, y)`` in **level-0 pixels** of the slide, its finest level, counted from the top left corner of
the scan; names that hold them end in ``_px0``. Sizes are ``(width, height)``. Resolutions are µm per pixel
(``mpp``); 0.5 is what pathologists call 20x.
"""

from __future__ import annotations

from dataclasses import dataclass

PointPx0 = tuple[int, int]
"""(x, y) in level-0 pixels."""

SizePx = tuple[int, int]
"""(width, height) in pixels of whatever the name says."""


@dataclass(frozen=True)
class Resolution:
    """How fine a slide's level 0 is, and who said so."""

    mpp: float
    """µm per level-0 pixel."""
    source: str
    """``override``, ``override:slide``, ``override:scanner``, ``vendor:NAME``, ``dicom`` or ``tiff``."""


@dataclass(frozen=True)
class Level:
    """One level of a slide's pyramid."""

    size_px: SizePx
    """In pixels of this level."""
    downsample: float
    """Level-0 pixels per pixel of this level; hardly ever a power of two."""
    number: int
    """The backend's own number for it; differs from its place in the list once a level is dropped."""


@dataclass(frozen=True)
class ReadPlan:
    """How patches of one physical size are read from one slide.

    A square of ``read_side_px`` pixels of ``level`` is read and, where the sides differ, resampled to
    ``patch_side_px``. The side is a whole number of the level's pixels, so patches abut exactly; the
    resolution that results, ``mpp``, is within half a pixel in ``read_side_px`` of the one wanted.
    """

    level: int
    read_side_px: int
    patch_side_px: int
    side_px0: float
    """Side of a patch in level-0 pixels; not whole when the level's downsample is not."""
    mpp: float
    """µm per pixel of the patches that result."""
    note: str | None = None
    """What whoever reads the score should know, such as upsampling."""

    @property
    def is_shrunk(self) -> bool:
        """Whether what is read is larger than the patch made of it."""
        return self.read_side_px > self.patch_side_px
