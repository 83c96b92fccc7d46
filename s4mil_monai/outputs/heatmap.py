"""The slide as a picture, and the patch probabilities as colours over it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from s4mil_monai.result import PatchScores, SlideResult
from s4mil_monai.slides.overview import read_overview
from s4mil_monai.slides.slide import Slide

LONGEST_SIDE_PX = 1600
"""Of the picture."""

OPACITY = 0.5
"""Of the colours over the slide in ``heatmap.png``; the report lets one slide it."""

PNG_OPTIONS = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""Of tissue nothing larger than a run repeats: not looking for it takes 60 % of the time, and no more room."""

COLOURS = ((59, 76, 192), (141, 176, 254), (221, 221, 221), (244, 152, 122), (180, 4, 38))
"""RGB at probabilities 0, 1/4, … 1: blue against, grey undecided, red for (Moreland's cool-warm, which the
colour-blind tell apart)."""


@dataclass(frozen=True)
class HeatmapPicture:
    """The slide and its heatmap, in one frame."""

    slide: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    heat: NDArray[np.uint8]
    """(H, W, 4) RGBA; transparent where no patch was read."""
    px0_per_px: tuple[float, float]
    """Level-0 pixels per pixel of the picture, in x and y."""


def shown_class(result: SlideResult) -> int:
    """The class whose probability is drawn: the last, which is the finding where there are two.

    With more classes, the predicted one.
    """
    if len(result.classes) == 2 or result.predicted is None:
        return len(result.classes) - 1
    return result.classes.index(result.predicted)


def write_heatmap(result: SlideResult, slide: Slide, path: Path) -> HeatmapPicture:
    """Write the slide with the patch probabilities of the shown class over it as PNG."""
    overview = read_overview(slide, px0_per_px=max(1.0, max(slide.size_px0) / LONGEST_SIDE_PX))
    heat = paint_heat(result, overview.pixels.shape[:2], overview.px0_per_px)
    picture = HeatmapPicture(overview.pixels, heat, overview.px0_per_px)
    blend(picture).save(path, "png", **PNG_OPTIONS)
    return picture


def blend(picture: HeatmapPicture) -> Image.Image:
    """The colours over the slide."""
    colours = Image.fromarray(picture.heat)
    opacity = colours.getchannel("A").point([round(opaque * OPACITY) for opaque in range(256)])
    blended = Image.fromarray(picture.slide)
    blended.paste(colours.convert("RGB"), mask=opacity)
    return blended


def paint_heat(
    result: SlideResult, size_hw: tuple[int, int], px0_per_px: tuple[float, float]
) -> NDArray[np.uint8]:
    """(H, W, 4) colours of the patch probabilities, opaque on patches and transparent elsewhere.

    Where patches overlap, their mean is shown, so that the picture does not depend on the scan order.
    """
    heat = np.zeros((*size_hw, 4), np.uint8)
    if result.patches is None:
        return heat
    shown = np.array([row[shown_class(result)] for row in result.patches.probabilities])
    squares = _squares(result.patches, px0_per_px)
    count = np.zeros(size_hw, np.int32)
    for square, colour in zip(squares, colour_of(shown), strict=True):
        heat[square] = (*colour, 255)
        count[square] += 1
    shared = count > 1
    if shared.any():
        total = np.zeros(size_hw)
        for square, value in zip(squares, shown, strict=True):
            total[square] += value
        heat[shared, :3] = colour_of(total[shared] / count[shared])
    return heat


def _squares(patches: PatchScores, px0_per_px: tuple[float, float]) -> list[tuple[slice, slice]]:
    """Rows and columns of a picture that each patch covers."""
    corners = np.array(patches.top_left_px0).reshape(-1, 2)
    left, top = np.rint(corners / px0_per_px).astype(int).T
    right, bottom = np.rint((corners + patches.side_px0) / px0_per_px).astype(int).T
    edges = zip(top, bottom, left, right, strict=True)
    return [(slice(top, bottom), slice(left, right)) for top, bottom, left, right in edges]


def colour_of(probabilities: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(n, 3) RGB of n probabilities."""
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(probabilities, stops, channel) for channel in np.transpose(COLOURS)]
    return np.rint(np.stack(channels, 1)).astype(np.uint8)
