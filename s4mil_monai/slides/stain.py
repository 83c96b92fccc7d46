"""measure_stain(): how bright, colourful and stained a slide is, from the overview its tissue was found on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb_from_hed

from s4mil_monai.slides.tissue import DARKEST_TISSUE, FLAT_WHITE, LOG10, TissueMask

LOOKED_AT_PX = 100_000
"""About how many pixels of the overview are looked at, on an even lattice. On real overviews of up to 260,000
pixels every number then lies within 0.001 of what all pixels give."""

LEAST_GLASS_PX = 100
"""With fewer sampled pixels of glass its colour is not known, and light is compared with white."""

LEAST_BELOW_WHITE = 0.1
"""Share of what is not covered. Where glass is clipped, only dust and the rims of tissue are below white."""


@dataclass(frozen=True)
class Stain:
    """Numbers of one slide, each over all of its tissue."""

    tissue_brightness: float
    """Mean of red, green and blue on tissue, 0 to 1."""
    glass_brightness: float | None
    """The same on empty glass (median); None where tissue fills the scan."""
    saturation: float
    """Mean of (largest - smallest) / largest channel on tissue, 0 to 1."""
    haematoxylin_od: float
    """Mean optical density of haematoxylin on tissue, log10."""
    eosin_od: float
    """Mean optical density of eosin on tissue, log10."""
    tissue_share: float
    """Share of the scanned area that is tissue, 0 to 1."""


def measure_stain(tissue: TissueMask) -> Stain:
    """Measure light and stain of a slide, a few milliseconds' work on a sample of its overview.

    Optical density is against the slide's own glass, so a weaker lamp changes the brightness of tissue and glass
    and leaves the stains alone. Pen is neither tissue nor glass.

    Args:
        tissue: With at least one pixel of tissue, as :func:`find_tissue` gives it.
    """
    pixels, is_tissue, is_glass = _sample(tissue)
    on_tissue, glass = pixels[is_tissue], pixels[is_glass]
    glass_rgb = np.median(glass, axis=0) if len(glass) >= LEAST_GLASS_PX else None
    density = np.log10(255.0 if glass_rgb is None else glass_rgb) - LOG10[on_tissue].mean(axis=0, dtype=np.float64)
    haematoxylin, eosin = separate_stains(density)
    largest = np.maximum(on_tissue.max(axis=1), 1).astype(np.float32)
    return Stain(
        tissue_brightness=float(on_tissue.mean() / 255),
        glass_brightness=None if glass_rgb is None else float(glass_rgb.mean() / 255),
        saturation=float((np.ptp(on_tissue, axis=1) / largest).mean()),
        haematoxylin_od=haematoxylin,
        eosin_od=eosin,
        tissue_share=float(tissue.mask.mean()),
    )


def separate_stains(density: NDArray[np.float64]) -> tuple[float, float]:
    """Split the (3,) optical density of red, green and blue into that of haematoxylin and of eosin.

    The colours of the stains are those of Ruifrok and Johnston (Anal Quant Cytol Histol 23, 2001, 291-299), which
    scikit-image has too; the third direction is at right angles to both and takes what is neither. The split is
    linear, so that of a mean is the mean of the splits; either may come out negative.
    """
    stains = rgb_from_hed[:2] / np.linalg.norm(rgb_from_hed[:2], axis=1, keepdims=True)
    rest = np.cross(stains[0], stains[1])
    haematoxylin, eosin, _ = np.linalg.solve(np.vstack([stains, rest / np.linalg.norm(rest)]).T, density)
    return float(haematoxylin), float(eosin)


def _sample(tissue: TissueMask) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.bool_]]:
    """Give (h, w, 3) pixels of a lattice over the overview, and the (h, w) masks of tissue and of glass on it."""
    step = max(1, round((tissue.mask.size / LOOKED_AT_PX) ** 0.5))
    if not tissue.mask[::step, ::step].any():
        step = 1
    pixels, is_tissue = tissue.overview.pixels[::step, ::step], tissue.mask[::step, ::step]
    return pixels, is_tissue, _find_glass(pixels, is_tissue | tissue.ink[::step, ::step])


def _find_glass(pixels: NDArray[np.uint8], covered: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where light came through nothing else.

    Flat white is an area that was never scanned, unless there is hardly anything else: then it is clipped glass.
    """
    bare = (pixels.max(axis=2) > DARKEST_TISSUE) & ~covered
    below_white = bare & (pixels.min(axis=2) < FLAT_WHITE)
    return below_white if below_white.sum() >= LEAST_BELOW_WHITE * bare.sum() else bare
