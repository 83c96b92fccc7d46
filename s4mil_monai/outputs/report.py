"""report.html: one file, no network, for whoever wants to see what a score rests on."""

from __future__ import annotations

import base64
import io
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from numpy.typing import NDArray
from PIL import Image

from s4mil_monai.outputs.heatmap import COLOURS, OPACITY, PNG_OPTIONS, HeatmapPicture, shown_class
from s4mil_monai.result import SlideResult
from s4mil_monai.slides.overview import read_square
from s4mil_monai.slides.slide import Slide

DECIDING_SHOWN = 12
"""Deciding patches shown as pictures."""

PATCH_SIDE_PX = 224
"""Side of their pictures."""


def write_report(result: SlideResult, slide: Slide, picture: HeatmapPicture, path: Path) -> None:
    """Write the report of one slide."""
    height, width = picture.slide.shape[:2]
    html = _template().render(
        result=result,
        shown=result.classes[shown_class(result)],
        slide_uri=_jpeg_uri(picture.slide),
        heat_uri=_png_uri(picture.heat),
        width=width,
        height=height,
        opacity=OPACITY,
        deciding=_deciding(result, slide, picture) if result.predicted else [],
        gradient=", ".join(f"rgb{colour}" for colour in COLOURS),
        width_mm=slide.size_px0[0] * slide.mpp / 1000,
        height_mm=slide.size_px0[1] * slide.mpp / 1000,
    )
    path.write_text(html, encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("s4mil_monai.outputs").joinpath("report.html.j2").read_text("utf-8"))


def _deciding(result: SlideResult, slide: Slide, picture: HeatmapPicture) -> list[dict[str, Any]]:
    """What the template shows of each deciding patch."""
    assert result.predicted is not None
    assert result.patches is not None
    best = result.classes.index(result.predicted)
    side_px0 = result.patches.side_px0
    scale_x, scale_y = picture.px0_per_px
    return [
        {
            "rank": rank,
            "x": patch.top_left_px0[0],
            "y": patch.top_left_px0[1],
            "share": patch.contributions[best],
            "probability": result.patches.probabilities[patch.index][shown_class(result)],
            "left": patch.top_left_px0[0] / scale_x,
            "top": patch.top_left_px0[1] / scale_y,
            "width": side_px0 / scale_x,
            "height": side_px0 / scale_y,
            "uri": _jpeg_uri(
                read_square(slide, top_left_px0=patch.top_left_px0, side_px0=side_px0, side_px=PATCH_SIDE_PX)
            ),
        }
        for rank, patch in enumerate(result.deciding_patches[:DECIDING_SHOWN], start=1)
    ]


def _jpeg_uri(pixels: NDArray[np.uint8]) -> str:
    return _data_uri(Image.fromarray(pixels), "jpeg", quality=88)


def _png_uri(pixels: NDArray[np.uint8]) -> str:
    return _data_uri(Image.fromarray(pixels), "png", **PNG_OPTIONS)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
