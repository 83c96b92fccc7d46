"""judge_quality(): whether a slide is fit to be scored: sharp, clean, well lit, with enough tissue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from s4mil_monai.result import QualityFinding, QualityRecord
from s4mil_monai.slides.grid import PatchGrid
from s4mil_monai.slides.patches import read_sound_patches
from s4mil_monai.slides.slide import WHITE, Slide
from s4mil_monai.slides.tissue import DARKEST_TISSUE, FLAT_WHITE, TissueMask

SAMPLED_PATCHES = 28
"""Patches that are read, evenly over the scan order."""

LEAST_SHARPNESS = 0.55
"""Detail of 1 px over detail of 2 px, see :func:`measure_sharpness`. At 0.5 µm/px, 90 % of the patches of sharp
slides lie in 0.85 to 2.2, blurred by a Gaussian of 1 px in 0.60 to 0.80, of 2 px all below 0.55, with and without
noise of 2 grey levels and JPEG of quality 75 on top."""

LEAST_DETAIL = 0.03
"""Detail of 2 px over contrast. Sharp patches have 0.11 or more, blurred by 2 px 0.05, by 8 px 0.02 or less;
there noise is all the detail that is left, and their ratio says nothing."""

LEAST_CONTRAST = 4.0
"""Grey levels; a patch with less shows nothing whose sharpness could be measured."""

NOISE_VARIANCE = 1.0
"""Of a pixel, in squared grey levels: rounding, JPEG and what a scanner adds."""

BLURRED_SHARES = (0.25, 0.75)
"""Of the patches that could be measured. Few blurred patches are folds and edges; with three quarters the
scanner missed the focus."""

INKED_SHARES = (0.05, 0.5)
"""Of the grid's patches that pen touches: it hides tissue beside them and tints what shines through."""

LEAST_TISSUE_MM2 = (0.5, 0.02)
"""0.5 mm² are some 30 patches of 128 µm, fewer than the models have been tried on; 0.02 mm² is about one."""

CLIPPED_SHARES = (0.5, 0.8)
"""Of the pixels of the sampled patches that are white in every channel. Empty glass may be clipped, and fat and
cracks let it through in sound slides; tissue never is."""

BLACK_SHARES = (0.05, 0.5)
"""Of the same pixels, black in every channel: stained tissue lets more light through, so this is missing,
covered or underexposed."""

DARK_LIGHT = (130.0, 60.0)
"""Grey level of the brightest places of the slide; glass of a normal scan has 200 to 255, and what is darker
by half loses half its grey levels."""

Verdict = Literal["pass", "warn", "reject"]
SEVERITY: dict[Verdict, int] = {"pass": 0, "warn": 1, "reject": 2}


def judge_quality(slide: Slide, tissue: TissueMask, grid: PatchGrid) -> QualityRecord:
    """Judge whether a slide is fit to be scored.

    The overview tells ink, light and the amount of tissue; a sample of patches, the same every time, tells
    focus and clipping. A sampled patch that cannot be decoded is left out: whoever reads all patches counts
    these.

    Args:
        slide: The slide, open.
        tissue: Its tissue.
        grid: Its patches.

    Returns:
        The findings, and everything measured: ``blur`` (share of blurred patches), ``sharpness`` (median),
        ``ink`` (share of patches touched), ``little_tissue`` (mm²), ``saturation`` (share of white pixels),
        ``underexposure`` (share of black pixels), ``light`` (grey level of the brightest places) and
        ``too_coarse`` (how many times patches are enlarged). ``blur`` and ``sharpness`` are missing where no
        patch has contrast, what comes from patches is missing where none can be decoded.

    Raises:
        UnreadableSlideError: Its subclass for a library that does not come back.
    """
    area_mm2 = _tissue_area_mm2(slide, tissue)
    measured = {
        **_measure_patches(slide, grid),
        "ink": _inked_share(tissue, grid),
        "little_tissue": area_mm2,
        "light": _light(tissue.overview.pixels),
        "too_coarse": max(1.0, grid.plan.patch_side_px / grid.plan.read_side_px),
    }
    findings = (*_findings_of_patches(measured), *_findings_of_slide(measured, grid))
    return combine(QualityRecord(verdict="pass", measured=measured), *findings)


def combine(record: QualityRecord, *more: QualityFinding) -> QualityRecord:
    """Add findings; the verdict is the worst of all."""
    findings = (*record.findings, *more)
    verdicts: list[Verdict] = ["pass", *(finding.verdict for finding in findings)]
    measured = {finding.code: finding.value for finding in more} | record.measured
    return QualityRecord(verdict=max(verdicts, key=SEVERITY.__getitem__), findings=findings, measured=measured)


def measure_sharpness(patch: NDArray[np.uint8]) -> float | None:
    """Tell how much finer than 2 px the detail of an (h, w, 3) patch goes.

    The standard deviation of what a Gaussian of 1 px takes away, over that of what one of 2 px takes away in
    addition. Contrast and stain cancel; a defocused patch has lost the finer of the two. Both are freed from
    the share that noise of :data:`NOISE_VARIANCE` has in them (0.75 and 0.03 of it).

    Returns:
        The ratio, 0 for a patch without any fine detail, None for one without contrast.
    """
    grey = patch.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    contrast = float(grey.std())
    if contrast < LEAST_CONTRAST:
        return None
    by_one, by_two = gaussian_filter(grey, 1.0), gaussian_filter(grey, 2.0)
    fine = max(float((grey - by_one).var()) - 0.75 * NOISE_VARIANCE, 0.0) ** 0.5
    coarse = max(float((by_one - by_two).var()) - 0.03 * NOISE_VARIANCE, 0.0) ** 0.5
    return fine / coarse if coarse > LEAST_DETAIL * contrast else 0.0


def _measure_patches(slide: Slide, grid: PatchGrid) -> dict[str, float]:
    sharpness: list[float] = []
    white: list[float] = []
    black: list[float] = []
    for patch in _sample(slide, grid):
        white.append(float((patch.min(axis=2) >= FLAT_WHITE).mean()))
        black.append(float((patch.max(axis=2) <= DARKEST_TISSUE // 2).mean()))
        sharp = measure_sharpness(patch)
        if sharp is not None:
            sharpness.append(sharp)
    measured: dict[str, float] = {}
    if white:
        measured |= {"saturation": float(np.mean(white)), "underexposure": float(np.mean(black))}
    if sharpness:
        blurred = float(np.mean(np.array(sharpness) < LEAST_SHARPNESS))
        measured |= {"blur": blurred, "sharpness": float(np.median(sharpness))}
    return measured


def _sample(slide: Slide, grid: PatchGrid) -> Iterator[NDArray[np.uint8]]:
    """Give patches spread evenly over the scan order, one at a time, never finer than the encoder sees them.

    Coarser ones stay as they were read: enlarging them would look like blur. What lies beyond the scan is cut
    off: its edge would look sharp.
    """
    plan = grid.plan
    level = slide.levels[plan.level]
    for i in np.unique(np.linspace(0, len(grid) - 1, SAMPLED_PATCHES).round().astype(int)):
        x, y = grid.top_left_px0[i].tolist()
        patches, sound = read_sound_patches(slide, [(x, y)], side_px=plan.read_side_px, level=plan.level)
        left, top = round(x / level.downsample), round(y / level.downsample)
        if not sound[0] or left >= level.size_px[0] or top >= level.size_px[1]:
            continue
        inside = Image.fromarray(patches[0][: level.size_px[1] - top, : level.size_px[0] - left])
        shrink = min(1.0, plan.patch_side_px / plan.read_side_px)
        size = max(1, round(inside.width * shrink)), max(1, round(inside.height * shrink))
        yield np.asarray(inside.resize(size, Image.Resampling.BOX))


def _tissue_area_mm2(slide: Slide, tissue: TissueMask) -> float:
    pixel_um2 = tissue.px0_per_px[0] * tissue.px0_per_px[1] * slide.mpp**2
    return float(tissue.mask.sum() * pixel_um2 / 1e6)


def _light(pixels: NDArray[np.uint8]) -> float:
    """Grey level of the brightest places of an overview that are not flat white, as areas never scanned are."""
    pixels = pixels[::2, ::2].reshape(-1, 3)
    scanned = pixels[pixels.min(axis=1) < FLAT_WHITE]
    return float(np.percentile(scanned.max(axis=1), 99)) if len(scanned) else float(WHITE)


def _inked_share(tissue: TissueMask, grid: PatchGrid) -> float:
    """Share of patches of which ink covers at least a hundredth."""
    if not tissue.ink.any():
        return 0.0
    table = np.pad(tissue.ink.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    side = grid.plan.side_px0
    x, y = (grid.top_left_px0 / np.array(tissue.px0_per_px)).T
    right, bottom = x + side / tissue.px0_per_px[0], y + side / tissue.px0_per_px[1]

    def up_to(row: NDArray[np.float64], column: NDArray[np.float64]) -> NDArray[np.float64]:
        return map_coordinates(table, (row, column), order=1, mode="nearest")

    inked = up_to(bottom, right) - up_to(y, right) - up_to(bottom, x) + up_to(y, x)
    return float((inked > 0.01 * (right - x) * (bottom - y)).mean())


def _findings_of_patches(measured: dict[str, float]) -> Iterator[QualityFinding]:
    yield from _above(
        "blur", measured.get("blur", 0.0), BLURRED_SHARES, "{:.0%} of the sampled patches are out of focus"
    )
    white, black = measured.get("saturation", 0.0), measured.get("underexposure", 0.0)
    yield from _above("saturation", white, CLIPPED_SHARES, "{:.0%} of the patches' pixels are overexposed")
    yield from _above("saturation", black, BLACK_SHARES, "{:.0%} of the patches' pixels are black")


def _findings_of_slide(measured: dict[str, float], grid: PatchGrid) -> Iterator[QualityFinding]:
    yield from _above("ink", measured["ink"], INKED_SHARES, "pen touches {:.0%} of the patches")
    count = f"{len(grid)} patch" + "es" * (len(grid) != 1)
    text = f"only {{:.2g}} mm² of tissue ({count})"
    yield from _below("little_tissue", measured["little_tissue"], LEAST_TISSUE_MM2, text)
    text = "the brightest places of the scan have grey level {:.0f} of 255: it is underexposed"
    yield from _below("saturation", measured["light"], DARK_LIGHT, text)
    if grid.plan.note is not None:
        yield QualityFinding(
            code="too_coarse",
            verdict="warn",
            value=measured["too_coarse"],
            limit=1.0,
            text=f"patches are {grid.plan.note}",
        )


def _above(code: str, value: float, limits: tuple[float, float], text: str) -> Iterator[QualityFinding]:
    """Warn from the first limit on, reject from the second on."""
    if value >= limits[0]:
        yield _finding(code, value, limits, value >= limits[1], text)


def _below(code: str, value: float, limits: tuple[float, float], text: str) -> Iterator[QualityFinding]:
    """Warn below the first limit, reject below the second."""
    if value < limits[0]:
        yield _finding(code, value, limits, value < limits[1], text)


def _finding(code: str, value: float, limits: tuple[float, float], rejected: bool, text: str) -> QualityFinding:
    return QualityFinding(
        code=code,
        verdict="reject" if rejected else "warn",
        value=value,
        limit=limits[int(rejected)],
        text=text.format(value),
    )
