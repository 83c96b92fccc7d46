"""The whole slide as one small picture, read from the pyramid block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from s4mil_monai.errors import DecoderHungError, UnreadableSlideError
from s4mil_monai.geometry import PointPx0
from s4mil_monai.slides.slide import WHITE, Slide

BLOCK_PX = 512
"""Side of the blocks the picture is put together from, in its own pixels."""

MAX_READ_PX = 4096
"""Longest side of one read, in pixels of the level read; bounds memory on slides without a pyramid."""


MOST_READ_PX = 6_000_000_000
"""Pixels read for one picture. A scan without a pyramid has to be read whole, half a minute for so many; larger
ones without a coarse level take hours, and are refused."""

MOST_UNREADABLE = 0.05
"""Share of the picture that may be missing; what lies there is not seen."""


@dataclass(frozen=True)
class Overview:
    """A slide at low resolution."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB; white where the slide cannot be decoded."""
    px0_per_px: tuple[float, float]
    """Level-0 pixels per pixel of the picture, in x and y."""
    level: int
    """Index into the slide's levels: the one it was read from."""
    unreadable: float = 0.0
    """Share of the picture that could not be decoded on any level."""


def read_overview(slide: Slide, *, px0_per_px: float) -> Overview:
    """Read the whole slide with about one pixel for ``px0_per_px`` level-0 pixels, averaged over areas.

    The nearest finer level is read, a block at a time, so memory stays bounded even where a slide has no
    pyramid. A block that cannot be decoded there is read from the next finer level.

    Raises:
        UnreadableSlideError: Too much of it cannot be decoded, or no level is coarse enough to read it at all.
        DecoderHungError: A library did not come back.
    """
    width0, height0 = slide.size_px0
    size = (max(1, round(width0 / px0_per_px)), max(1, round(height0 / px0_per_px)))
    scale = (width0 / size[0], height0 / size[1])
    level = _finer_level(slide, px0_per_px)
    _check_amount(slide, level)
    picture = np.empty((size[1], size[0], 3), np.uint8)
    block = max(1, min(BLOCK_PX, int(MAX_READ_PX * slide.levels[level].downsample / max(scale))))
    unreadable_px = 0
    for top in range(0, size[1], block):
        for left in range(0, size[0], block):
            width, height = min(block, size[0] - left), min(block, size[1] - top)
            part = picture[top : top + height, left : left + width]
            if not _fill_block(slide, level, left, top, part, scale):
                unreadable_px += width * height
    return Overview(picture, scale, level, _check_unreadable(slide, unreadable_px / (size[0] * size[1])))


def _check_amount(slide: Slide, level: int) -> None:
    width, height = slide.levels[level].size_px
    if width * height > MOST_READ_PX:
        raise UnreadableSlideError(
            slide.name,
            f"its coarsest fitting level has {width:,} x {height:,} pixels, which would take hours to look over; "
            "convert it to a pyramid (vips tiffsave --tile --pyramid)",
        )


def _check_unreadable(slide: Slide, share: float) -> float:
    if share > MOST_UNREADABLE:
        raise UnreadableSlideError(
            slide.name,
            f"{share:.0%} of the slide cannot be decoded, at most {MOST_UNREADABLE:.0%} can be missing; "
            "copy the file again or scan the slide again",
        )
    return share


def _fill_block(
    slide: Slide, level: int, left: int, top: int, part: NDArray[np.uint8], scale: tuple[float, float]
) -> bool:
    """Fill one block of the picture from a level, or the next finer one that decodes; whether there was one."""
    height, width = part.shape[:2]
    finer = [i for i in range(level, -1, -1) if _is_small(slide, i, max(width, height) * max(scale))]
    for candidate in finer:
        try:
            part[:] = _read_block(slide, candidate, left, top, width, height, scale)
        except DecoderHungError:
            raise
        except UnreadableSlideError:
            continue
        return True
    part[:] = WHITE
    return False


def _is_small(slide: Slide, level: int, side_px0: float) -> bool:
    """Whether a block of so many level-0 pixels can be read at once from a level."""
    return side_px0 / slide.levels[level].downsample <= 2 * MAX_READ_PX or len(slide.levels) == 1


def _finer_level(slide: Slide, px0_per_px: float) -> int:
    finer = [i for i, level in enumerate(slide.levels) if level.downsample <= px0_per_px * 1.01]
    return max(finer, key=lambda i: slide.levels[i].downsample, default=0)


def _read_block(
    slide: Slide, level: int, left: int, top: int, width: int, height: int, scale: tuple[float, float]
) -> NDArray[np.uint8]:
    """Read one block of the picture and average it down."""
    downsample = slide.levels[level].downsample
    x0, y0 = left * scale[0] / downsample, top * scale[1] / downsample
    x1, y1 = (left + width) * scale[0] / downsample, (top + height) * scale[1] / downsample
    level_width, level_height = slide.levels[level].size_px
    x1, y1 = min(x1, level_width), min(y1, level_height)
    corner = (math.floor(x0), math.floor(y0))
    region = slide.read_region(
        top_left_px0=(round(corner[0] * downsample), round(corner[1] * downsample)),
        size_px=(math.ceil(x1) - corner[0], math.ceil(y1) - corner[1]),
        level=level,
    )
    box = (x0 - corner[0], y0 - corner[1], x1 - corner[0], y1 - corner[1])
    return np.asarray(Image.fromarray(region).resize((width, height), Image.Resampling.BOX, box=box))


def read_square(slide: Slide, *, top_left_px0: PointPx0, side_px0: float, side_px: int) -> NDArray[np.uint8]:
    """Read one square of the scan as a (side_px, side_px, 3) picture."""
    level = _finer_level(slide, side_px0 / side_px)
    read_side = max(1, round(side_px0 / slide.levels[level].downsample))
    region = slide.read_region(top_left_px0=top_left_px0, size_px=(read_side, read_side), level=level)
    return np.asarray(Image.fromarray(region).resize((side_px, side_px), Image.Resampling.LANCZOS))
