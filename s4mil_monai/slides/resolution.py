"""What µm/px a slide has, who said so, and how patches of a wanted µm/px are read from it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import tifffile

from s4mil_monai.errors import TooCoarseError, UnreadableSlideError
from s4mil_monai.geometry import ReadPlan, Resolution
from s4mil_monai.slides.backends import OpenSlideSlide, WsidicomSlide
from s4mil_monai.slides.slide import Slide

MAX_UPSAMPLING = 1.25
"""A finest level up to this much coarser than wanted is upsampled, with a note; beyond, refused."""

SAME_RESOLUTION = 0.01
"""Levels within 1 % of the wanted µm/px are read as they are: resampling would only blur."""

COARSEST_TIFF_TAG_MPP = 30.0
"""TIFF tags coarser than this are a printer's default (72, 96, 300 dpi), not a microscope."""


def find_resolution(slide: Slide, *, assume_mpp: float | None = None) -> Resolution | None:
    """Find µm per level-0 pixel: the operator's override, vendor tags, DICOM spacing, then real TIFF tags.

    A backend's default is never taken: cuCIM and MONAI answer 1.0 for slides that do not say.

    Returns:
        The value and its source, or None where nothing says it.

    Raises:
        ValueError: ``assume_mpp`` is not a positive number.
        UnreadableSlideError: The pixels are not square, which no patch encoder was trained on.
    """
    if assume_mpp is not None:
        if not 0 < assume_mpp < math.inf:
            raise ValueError(f"assume_mpp is µm per pixel and positive, got {assume_mpp}")
        return Resolution(float(assume_mpp), "override")
    sources: tuple[Callable[[Slide], tuple[str, float, float] | None], ...] = (
        _openslide_properties,
        _wsidicom_spacing,
        _tiff_description,
        _tiff_tags,
    )
    for source in sources:
        found = source(slide)
        if found is not None:
            return _square(slide.name, *found)
    return None


def _square(name: str, source: str, mpp_x: float, mpp_y: float) -> Resolution:
    if abs(mpp_x / mpp_y - 1) > 0.05:
        raise UnreadableSlideError(name, f"pixels are not square ({mpp_x:g} by {mpp_y:g} µm, from {source})")
    return Resolution(round((mpp_x + mpp_y) / 2, 6), source)


def _openslide_properties(slide: Slide) -> tuple[str, float, float] | None:
    try:
        opened = slide if isinstance(slide, OpenSlideSlide) else OpenSlideSlide(slide.path)
    except Exception:  # OpenSlide does not know the format: the next source may
        return None
    if opened is not slide:
        opened.close()
    properties = opened.properties
    vendor = properties.get("openslide.vendor", "")
    pair = _positive(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"))
    if pair is None or vendor == "generic-tiff":  # plain TIFF tags are judged below
        return None
    return ("dicom" if vendor == "dicom" else f"vendor:{vendor}", *pair)


def _wsidicom_spacing(slide: Slide) -> tuple[str, float, float] | None:
    if not isinstance(slide, WsidicomSlide):
        return None
    x_mm, y_mm = slide.pixel_spacing_mm
    return ("dicom", x_mm * 1000, y_mm * 1000)


def _tiff_description(slide: Slide) -> tuple[str, float, float] | None:
    """Aperio's ``MPP = 0.25`` and OME's PhysicalSizeX, for files that OpenSlide cannot open."""
    text = _tiff_tag_values(slide.path).get("ImageDescription", "")
    aperio = re.search(r"\|\s*MPP\s*=\s*([\d.]+)", str(text))
    if aperio and (pair := _positive(aperio[1], aperio[1])):
        return ("vendor:aperio", *pair)
    sizes = [re.search(rf'PhysicalSize{axis}="([\d.eE+-]+)"', str(text)) for axis in "XY"]
    units = re.findall(r'PhysicalSize[XY]Unit="([^"]+)"', str(text))
    if all(sizes) and all(unit in ("µm", "um") for unit in units):
        pair = _positive(*(match[1] for match in sizes if match))
        return ("vendor:ome", *pair) if pair else None
    return None


def _tiff_tags(slide: Slide) -> tuple[str, float, float] | None:
    tags = _tiff_tag_values(slide.path)
    um_per_unit = {2: 25_400.0, 3: 10_000.0}.get(int(tags.get("ResolutionUnit", 1)))
    if um_per_unit is None:
        return None
    try:
        per_unit = [tags[key][0] / tags[key][1] for key in ("XResolution", "YResolution")]
        pair = _positive(um_per_unit / per_unit[0], um_per_unit / per_unit[1])
    except (KeyError, ZeroDivisionError):
        return None
    if pair is None or max(pair) > COARSEST_TIFF_TAG_MPP:
        return None
    return ("tiff", *pair)


def _tiff_tag_values(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        with tifffile.TiffFile(path) as file:
            return {tag.name: tag.value for tag in file.pages.first.tags.values()}
    except (tifffile.TiffFileError, IndexError, ValueError):
        return {}


def _positive(x: object, y: object) -> tuple[float, float] | None:
    try:
        pair = (float(x), float(y))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return pair if all(0 < value < math.inf for value in pair) else None


def plan_reading(slide: Slide, *, mpp: float, patch_side_px: int) -> ReadPlan:
    """Choose the level and the square to read so that patches have ``mpp`` µm per pixel.

    The nearest finer level is read and resampled; a level within 1 % is read as it is.

    Raises:
        UnknownResolutionError: The slide does not know its resolution.
        TooCoarseError: Its finest level is more than 25 % coarser than wanted.
    """
    wanted_px0 = mpp / slide.mpp
    """Level-0 pixels per wanted pixel."""
    if 1 / wanted_px0 > MAX_UPSAMPLING:
        raise TooCoarseError(
            slide=slide.name,
            reason=f"its finest level has {slide.mpp:.3g} µm/px, the model wants {mpp:.3g} µm/px "
            f"(at most {mpp * MAX_UPSAMPLING:.3g}); scan it at a higher magnification",
            found_mpp=slide.mpp,
            wanted_mpp=mpp,
        )
    finer = [i for i, level in enumerate(slide.levels) if level.downsample <= wanted_px0 * (1 + SAME_RESOLUTION)]
    level = max(finer, key=lambda i: slide.levels[i].downsample, default=0)
    downsample = slide.levels[level].downsample
    shrink = wanted_px0 / downsample
    read_side_px = patch_side_px if abs(shrink - 1) <= SAME_RESOLUTION else round(patch_side_px * shrink)
    upsampled = read_side_px < patch_side_px
    return ReadPlan(
        level=level,
        read_side_px=read_side_px,
        patch_side_px=patch_side_px,
        side_px0=read_side_px * downsample,
        mpp=slide.mpp * downsample * read_side_px / patch_side_px,
        note=f"upsampled from {slide.mpp:.3g} to {mpp:.3g} µm/px" if upsampled else None,
    )
