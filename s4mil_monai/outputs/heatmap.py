"""The slide as a picture, and the patch probabilities as colours over it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from s4mil_monai.result import SlideResult
from s4mil_monai.slides.overview import read_overview
from s4mil_monai.slides.slide import Slide

LONGEST_SIDE_PX = 1600
"""Of the picture."""

OPACITY = 0.5
"""Of the colours over the slide in ``heatmap.png``; the report lets one slide it."""

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
    colours = Image.fromarray(heat)
    opacity = colours.getchannel("A").point([round(opaque * OPACITY) for opaque in range(256)])
    blended = Image.fromarray(overview.pixels)
    blended.paste(colours.convert("RGB"), mask=opacity)
    blended.save(path, compress_level=1)
    return picture


def paint_heat(
    result: SlideResult, size_hw: tuple[int, int], px0_per_px: tuple[float, float]
) -> NDArray[np.uint8]:
    """(H, W, 4) colours of the patch probabilities, opaque on patches and transparent elsewhere."""
    heat = np.zeros((*size_hw, 4), np.uint8)
    if result.patches is None:
        return heat
    shown = shown_class(result)
    colours = colour_of(np.array([row[shown] for row in result.patches.probabilities]))
    for (x, y), colour in zip(result.patches.top_left_px0, colours, strict=True):
        left, right = (round(at / px0_per_px[0]) for at in (x, x + result.patches.side_px0))
        top, bottom = (round(at / px0_per_px[1]) for at in (y, y + result.patches.side_px0))
        heat[top:bottom, left:right] = (*colour, 255)
    return heat


def colour_of(probabilities: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(n, 3) RGB of n probabilities."""
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(probabilities, stops, channel) for channel in np.transpose(COLOURS)]
    return np.rint(np.stack(channels, 1)).astype(np.uint8)
