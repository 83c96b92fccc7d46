"""read_patches(): many patches at once, neighbours in one read, damaged ones told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from s4mil_monai.errors import DecoderHungError, UnreadableSlideError
from s4mil_monai.geometry import PointPx0
from s4mil_monai.slides.slide import WHITE, Slide

LONGEST_STRIP_PX = 4096
"""Of one read; bounds memory."""


def read_patches(slide: Slide, top_left_px0: Sequence[PointPx0], *, side_px: int, level: int) -> NDArray[np.uint8]:
    """Read (n, side_px, side_px, 3) patches.

    Patches that abut in a row, in whatever order they come, are read as one strip and cut apart: a tile of the
    file that several of them touch is decoded once. The pixels are those of single reads.

    Args:
        slide: An open slide.
        top_left_px0: Corners (x, y) in level-0 pixels.
        side_px: In pixels of ``level``.
        level: Index into the slide's levels.

    Raises:
        UnreadableSlideError: One of them cannot be decoded.
    """
    patches = np.empty((len(top_left_px0), side_px, side_px, 3), np.uint8)
    for strip in _strips(slide, top_left_px0, side_px, level):
        patches[strip] = _read_strip(slide, top_left_px0[strip[0]], len(strip), side_px, level)
    return patches


def read_sound_patches(
    slide: Slide, top_left_px0: Sequence[PointPx0], *, side_px: int, level: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """As :func:`read_patches`, but a patch that cannot be decoded is white and marked.

    Returns:
        (n, side_px, side_px, 3) patches, and (n,) whether each could be decoded.

    Raises:
        DecoderHungError: A library did not come back; other patches are not tried.
    """
    patches = np.empty((len(top_left_px0), side_px, side_px, 3), np.uint8)
    sound = np.ones(len(top_left_px0), bool)
    for strip in _strips(slide, top_left_px0, side_px, level):
        try:
            patches[strip] = _read_strip(slide, top_left_px0[strip[0]], len(strip), side_px, level)
        except DecoderHungError:
            raise
        except UnreadableSlideError:
            for i in strip:
                sound[i] = _read_one(slide, top_left_px0[i], patches[i], level)
    return patches, sound


def _read_strip(slide: Slide, corner: PointPx0, count: int, side_px: int, level: int) -> NDArray[np.uint8]:
    """(count, side_px, side_px, 3) patches that follow each other to the right of a corner."""
    strip = slide.read_region(top_left_px0=corner, size_px=(count * side_px, side_px), level=level)
    return strip.reshape(side_px, count, side_px, 3).transpose(1, 0, 2, 3)


def _read_one(slide: Slide, corner: PointPx0, patch: NDArray[np.uint8], level: int) -> bool:
    """Fill a (side, side, 3) patch, with white where it cannot be decoded; whether it could."""
    side_px = len(patch)
    try:
        patch[:] = slide.read_region(top_left_px0=corner, size_px=(side_px, side_px), level=level)
    except DecoderHungError:
        raise
    except UnreadableSlideError:
        patch[:] = WHITE
        return False
    return True


def _strips(slide: Slide, top_left_px0: Sequence[PointPx0], side_px: int, level: int) -> Iterator[list[int]]:
    """Patches, by index, whose places in the level, rounded as in a read, follow each other to the right."""
    downsample = slide.levels[level].downsample
    places = [(round(y / downsample), round(x / downsample)) for x, y in top_left_px0]
    strip: list[int] = []
    for i in sorted(range(len(places)), key=places.__getitem__):
        full = (len(strip) + 1) * side_px > LONGEST_STRIP_PX
        if strip and (full or places[i] != (places[strip[-1]][0], places[strip[-1]][1] + side_px)):
            yield strip
            strip = []
        strip.append(i)
    if strip:
        yield strip
