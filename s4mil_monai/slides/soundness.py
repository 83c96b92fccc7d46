"""Whether what a reader opened can be believed: every level must decode and look like the one below it.

Libraries open slides that they cannot decode, and pyramids exist whose coarser levels carry other colours
than the scan (a DICOM converter that marks RGB tiles as YBR, say). Tissue is found on coarse levels and
patches are read from fine ones, so a level that disagrees would silently move the grid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from s4mil_monai.errors import UnreadableSlideError
from s4mil_monai.slides.slide import Slide

PROBES = ((0.5, 0.5), (0.25, 0.4), (0.7, 0.75))
"""Where levels are compared, as shares of the scan's width and height."""

PROBE_SIDE_PX = 128
"""Side of a probe, in pixels of the coarser level."""

COLOUR_TOLERANCE = 24.0
"""Largest difference of a probe's mean colour between levels, of 255; JPEG and resampling stay below 6."""


def drop_unsound_levels(slide: Slide) -> None:
    """Drop levels that do not decode or whose colours differ from the finer ones, with a note for each.

    Raises:
        UnreadableSlideError: Level 0 itself does not decode.
    """
    sound = [0]
    _probe_colours(slide, 0, side_px0=float(PROBE_SIDE_PX))
    for level in range(1, len(slide.levels)):
        reason = _disagreement(slide, level, finer=sound[-1])
        if reason is None:
            sound.append(level)
        else:
            slide.notes += (f"level {level} is not used: {reason}",)
    slide.levels = tuple(slide.levels[level] for level in sound)


def _disagreement(slide: Slide, level: int, *, finer: int) -> str | None:
    side_px0 = min(PROBE_SIDE_PX * slide.levels[level].downsample, 2048 * slide.levels[finer].downsample)
    try:
        coarse = _probe_colours(slide, level, side_px0=side_px0)
    except UnreadableSlideError:
        return f"{slide.backend} cannot decode it"
    difference = np.abs(coarse - _probe_colours(slide, finer, side_px0=side_px0)).max()
    return (
        f"its colours differ by {difference:.0f} of 255 from finer levels"
        if difference > COLOUR_TOLERANCE
        else None
    )


def _probe_colours(slide: Slide, level: int, *, side_px0: float) -> NDArray[np.float64]:
    """(probes, 3) mean RGB around each probe, over the same square of the scan whatever the level."""
    width, height = slide.size_px0
    side = max(1, round(side_px0 / slide.levels[level].downsample))
    colours = []
    for share_x, share_y in PROBES:
        corner = (round(share_x * width - side_px0 / 2), round(share_y * height - side_px0 / 2))
        region = slide.read_region(top_left_px0=corner, size_px=(side, side), level=level)
        colours.append(region.reshape(-1, 3).mean(axis=0))
    return np.array(colours)
