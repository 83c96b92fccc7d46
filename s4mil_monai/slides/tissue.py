"""find_tissue(): where the glass carries tissue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2hsv
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

from s4mil_monai.errors import NoTissueError
from s4mil_monai.slides.overview import read_overview
from s4mil_monai.slides.slide import Slide

SATURATION_RANGE = (0.06, 0.15)
"""Otsu's threshold is kept in here: on blank glass it would split noise, on a slide full of tissue it
would split pale from dark stain."""

DARKEST_TISSUE = 0.12
"""Darker than this (HSV value) is a black border or marker, where saturation means nothing."""

SMALLEST_TISSUE_UM2 = 10_000.0
"""Specks and holes smaller than this are dust and cracks: (100 µm)², less than one patch at 20x."""


@dataclass(frozen=True)
class TissueMask:
    """Where the tissue is."""

    mask: NDArray[np.bool_]
    """(H, W)."""
    px0_per_px: tuple[float, float]
    """Level-0 pixels per pixel of the mask, in x and y."""
    slide: str
    """Name of the slide, for errors."""


def find_tissue(slide: Slide, *, mpp: float = 8.0) -> TissueMask:
    """Mark where the glass carries tissue.

    Saturation is thresholded by Otsu at low resolution: glass is grey at any brightness, stained tissue
    is not, so shadows and vignetting do not shift the threshold.

    Args:
        slide: An open slide that knows its resolution.
        mpp: Resolution of the mask, in µm/px. At 8 a lymph node of 5 mm is 625 pixels wide.

    Raises:
        UnknownResolutionError: The slide does not know its resolution.
        NoTissueError: Nothing passes the threshold, as on a blank or out-of-focus scan.
    """
    overview = read_overview(slide, px0_per_px=max(1.0, mpp / slide.mpp))
    px_um = overview.px0_per_px[0] * slide.mpp
    mask = mark_tissue(overview.pixels, smallest_px=max(1, round(SMALLEST_TISSUE_UM2 / px_um**2)))
    if not mask.any():
        raise NoTissueError(slide.name, "no tissue found; look whether the scan is blank, faded or out of focus")
    return TissueMask(mask, overview.px0_per_px, slide.name)


def mark_tissue(pixels: NDArray[np.uint8], *, smallest_px: int) -> NDArray[np.bool_]:
    """Mark tissue on an (H, W, 3) RGB picture; specks and holes below ``smallest_px`` pixels are dropped."""
    hsv = rgb2hsv(ndimage.median_filter(pixels, size=(3, 3, 1)))
    saturation, value = hsv[..., 1], hsv[..., 2]
    bright = value > DARKEST_TISSUE
    if not bright.any():
        return np.zeros(pixels.shape[:2], bool)
    threshold = np.clip(_otsu(saturation[bright]), *SATURATION_RANGE)
    mask = (saturation > threshold) & bright
    mask = remove_small_objects(mask, max_size=smallest_px - 1)
    return remove_small_holes(mask, max_size=smallest_px - 1)


def _otsu(values: NDArray[np.floating]) -> float:
    return float(threshold_otsu(values)) if np.ptp(values) > 0 else float(values[0])
