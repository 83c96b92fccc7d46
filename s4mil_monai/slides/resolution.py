"""What µm/px a slide has, who said so, and how patches of a wanted µm/px are read from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from s4mil_monai.errors import TooCoarseError, UnreadableSlideError
from s4mil_monai.geometry import ReadPlan, Resolution
from s4mil_monai.slides.overrides import Overrides
from s4mil_monai.slides.slide import Slide
from s4mil_monai.slides.vendor_tags import Finding, read_findings

MAX_UPSAMPLING = 1.25
"""A finest level up to this much coarser than wanted is upsampled, with a note; beyond, refused."""

SAME_RESOLUTION = 0.01
"""Levels within 1 % of the wanted µm/px are read as they are: resampling would only blur."""

CONTRADICTION = 0.1
"""Two sources of one file that differ by more than this share get a note: a pixel is 10 % wider or narrower."""

MAGNIFICATION_TOLERANCE = 1.5
"""Scanners differ by this factor in what they call 20x."""

UM_AT_1X = 10.0
"""µm/px of a nominal magnification of 1: 0.5 at 20x, 0.25 at 40x."""


def find_resolution(
    slide: Slide, *, assume_mpp: float | None = None, overrides: Overrides | None = None
) -> Resolution | None:
    """Find µm per level-0 pixel: the operator's override, vendor tags, DICOM spacing, then real TIFF tags.

    A backend's default is never taken: cuCIM and MONAI answer 1.0 for slides that do not say. Nor is a nominal
    magnification, which scanners understand differently; it is kept in ``slide.magnification``. Where the file
    contradicts the value found, ``slide.notes`` says so.

    Args:
        slide: An open slide.
        assume_mpp: µm per level-0 pixel of this slide; wins over everything.
        overrides: The operator's table; wins over the file.

    Returns:
        The value and its source, or None where nothing says it.

    Raises:
        ValueError: ``assume_mpp`` is not a positive number.
        UnreadableSlideError: The pixels are not square, which no patch encoder was trained on.
    """
    if assume_mpp is not None and not 0 < assume_mpp < math.inf:
        raise ValueError(f"assume_mpp is µm per pixel and positive, got {assume_mpp}")
    findings = read_findings(slide)
    slide.magnification = next((f.magnification for f in findings if f.magnification), None)
    override = (assume_mpp, "override") if assume_mpp is not None else None
    if override is None and overrides is not None:
        override = overrides.find(slide, findings)
    written = next((finding for finding in findings if finding.mpp is not None), None)
    if override is not None:
        resolution = Resolution(float(override[0]), override[1])
    elif written is not None and written.mpp is not None:
        resolution = _square(slide.name, written.source, *written.mpp)
    else:
        return None
    slide.notes = tuple(dict.fromkeys((*slide.notes, *_contradictions(resolution, findings, slide.magnification))))
    return resolution


def _square(name: str, source: str, mpp_x: float, mpp_y: float) -> Resolution:
    if abs(mpp_x / mpp_y - 1) > 0.05:
        raise UnreadableSlideError(name, f"pixels are not square ({mpp_x:g} by {mpp_y:g} µm, from {source})")
    return Resolution(round((mpp_x + mpp_y) / 2, 6), source)


def _contradictions(
    resolution: Resolution, findings: Sequence[Finding], magnification: float | None
) -> Iterator[str]:
    """One sentence for each other source of the file that says something else."""
    stated = f"{resolution.mpp:.3g} µm/px by {_in_words(resolution.source)}"
    others: dict[str, float] = {}
    for finding in findings:
        if finding.mpp is not None and finding.source != resolution.source:
            others.setdefault(finding.source, sum(finding.mpp) / 2)
    for source, mpp in others.items():
        if abs(mpp / resolution.mpp - 1) > CONTRADICTION:
            yield f"{stated}, but {mpp:.3g} by {_in_words(source)}"
    if magnification is not None:
        nominal = UM_AT_1X / magnification
        if not 1 / MAGNIFICATION_TOLERANCE < nominal / resolution.mpp < MAGNIFICATION_TOLERANCE:
            yield f"{stated}, but its magnification of {magnification:g} means about {nominal:.2g}"


def _in_words(source: str) -> str:
    if source.startswith("override"):
        return "the operator's override"
    words = {"dicom": "its DICOM pixel spacing", "tiff": "its TIFF tags"}
    return words.get(source) or f"the scanner's tag ({source.removeprefix('vendor:')})"


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
