"""read_patches(): many patches at once, neighbours in one read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from s4mil_monai.geometry import PointPx0
from s4mil_monai.slides.slide import Slide

LONGEST_STRIP_PX = 4096
"""Of one read; bounds memory."""


def read_patches(slide: Slide, top_left_px0: Sequence[PointPx0], *, side_px: int, level: int) -> NDArray[np.uint8]:
    """Read (n, side_px, side_px, 3) patches.

    Patches that abut in a row are read as one strip and cut apart: a tile of the file that several of them
    touch is decoded once. The pixels are those of single reads.

    Args:
        slide: An open slide.
        top_left_px0: Corners (x, y) in level-0 pixels.
        side_px: In pixels of ``level``.
        level: Index into the slide's levels.
    """
    patches = np.empty((len(top_left_px0), side_px, side_px, 3), np.uint8)
    for start, stop in _strips(slide, top_left_px0, side_px, level):
        count = stop - start
        strip = slide.read_region(
            top_left_px0=top_left_px0[start], size_px=(count * side_px, side_px), level=level
        )
        patches[start:stop] = strip.reshape(side_px, count, side_px, 3).transpose(1, 0, 2, 3)
    return patches


def _strips(slide: Slide, top_left_px0: Sequence[PointPx0], side_px: int, level: int) -> Iterator[tuple[int, int]]:
    """Ranges of patches whose places in the level, rounded as a read rounds them, follow each other in a row."""
    downsample = slide.levels[level].downsample
    places = [(round(x / downsample), round(y / downsample)) for x, y in top_left_px0]
    start = 0
    for i in range(1, len(places) + 1):
        x, y = places[start]
        full = (i - start + 1) * side_px > LONGEST_STRIP_PX
        if i == len(places) or full or places[i] != (x + (i - start) * side_px, y):
            yield start, i
            start = i
