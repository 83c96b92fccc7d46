"""find_tissue(): where the glass carries tissue, and where it carries ink."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy import ndimage
from skimage.measure import label
from skimage.morphology import remove_small_holes, remove_small_objects

from s4mil_monai.errors import NoTissueError
from s4mil_monai.slides.overview import Overview, read_overview
from s4mil_monai.slides.slide import Slide

SMALLEST_TISSUE_UM2 = 10_000.0
"""Specks and holes smaller than this are dust and cracks: (100 µm)², less than one patch at 20x."""

COLOUR_RANGE = (0.014, 0.03)
"""Least spread of optical density over red, green and blue that is stain. Of H&E tissue blended toward white to
35 %, 97 % has more than the lower end; clean glass stays under a third of it. Noisy glass moves it up, to the
upper end at most."""

NOISE_FACTOR = 1.5
"""Stain is this many times the spread that all but 1 % of the glass has."""

DARKEST_TISSUE = 30
"""Where no channel is brighter (of 255) lies a border that was never scanned, or something opaque."""

NEVER_SCANNED = 8
"""Where no channel is brighter the scanner filled in black; ink lets more light through."""

FLAT_WHITE = 254
"""Where every channel is at least this bright there is nothing: clipped glass, or an area never scanned."""

BLOCK_PX = 8
"""Side of the blocks on which glass is looked for."""

GLASS_ROUGHNESS = (3.0, 6.0)
"""Most standard deviation of green in a block of glass, in grey levels; tissue at 8 µm/px has 10 to 30, a
third of it where the stain is a third. The lower end holds for clean scans, more is granted to noisy ones."""

GLASS_TINT = 0.08
"""Most difference of optical density between green and the other channels that an empty slide can have."""

LEAST_GLASS = 0.005
"""With a smaller share of blocks there is no glass to compare with, and it is taken to be white."""

SAME_TINT = 0.012
"""Blocks whose tint differs less are the same glass."""

DARKEST_GLASS = 0.35
"""Of the brightest block; darker smooth blocks are pen or dirt."""

INK_CELL_PX = 2
"""Side of the cells on which ink is looked for; a pen's line is many cells wide."""

SMALLEST_INK_UM2 = 100_000.0
"""Ink-coloured specks smaller than this are pigment, blood or dirt."""

STRIP_PX = 256
"""Rows worked on at a time; bounds memory."""

LOG10 = np.log10(np.maximum(np.arange(256), 1)).astype(np.float32)


@dataclass(frozen=True)
class TissueMask:
    """Where the tissue is."""

    mask: NDArray[np.bool_]
    """(H, W)."""
    px0_per_px: tuple[float, float]
    """Level-0 pixels per pixel of the mask, in x and y."""
    slide: str
    """Name of the slide, for errors."""
    overview: Overview
    """The picture it was found on, (H, W, 3)."""
    ink: NDArray[np.bool_]
    """(H, W) pen marks; none of them is tissue."""


@dataclass(frozen=True)
class Glass:
    """What empty glass looks like all over a slide."""

    log_light: NDArray[np.float32]
    """(h, w, 3) log10 of the grey levels glass has, or would have under the tissue, by block."""
    blocks: NDArray[np.bool_]
    """(h, w) blocks that were seen to be glass."""


def find_tissue(slide: Slide, *, mpp: float = 8.0) -> TissueMask:
    """Mark where the glass carries tissue.

    What glass looks like is estimated all over the slide, so that its tint, uneven light, shadows and stitching
    drop out; what then takes more light of one colour than of another is stained. Pen is told from stain by its
    colour and darkness, see :func:`mark_ink`.

    Args:
        slide: An open slide that knows its resolution.
        mpp: Resolution of the mask, in µm/px. At 8 a lymph node of 5 mm is 625 pixels wide.

    Raises:
        UnknownResolutionError: The slide does not know its resolution.
        NoTissueError: Nothing is stained, as on a blank or out-of-focus scan.
        UnreadableSlideError: The level read cannot be decoded.
    """
    overview = read_overview(slide, px0_per_px=max(1.0, mpp / slide.mpp))
    mask, ink = mark_tissue(overview.pixels, mpp=overview.px0_per_px[0] * slide.mpp)
    if not mask.any():
        raise NoTissueError(slide.name, "no tissue found; look whether the scan is blank, faded or out of focus")
    return TissueMask(mask, overview.px0_per_px, slide.name, overview, ink)


def mark_tissue(pixels: NDArray[np.uint8], *, mpp: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the (H, W) masks of tissue and of ink on an (H, W, 3) RGB picture of ``mpp`` µm/px."""
    glass = estimate_glass(pixels)
    ink = mark_ink(pixels, glass, mpp=mpp)
    smallest_px = max(1, round(SMALLEST_TISSUE_UM2 / mpp**2))
    stained = _mark_stain(pixels, glass) & ~ink
    if not stained.any():
        return stained, ink
    mask = remove_small_objects(stained, max_size=smallest_px - 1)
    mask = np.asarray(remove_small_holes(mask, max_size=smallest_px - 1), bool)
    return mask & ~ink, ink


def estimate_glass(pixels: NDArray[np.uint8]) -> Glass:
    """Estimate the light of empty glass all over an (H, W, 3) picture.

    Glass is smooth and nearly grey, and its tint is nearly the same everywhere, while smooth tissue varies: the
    most frequent tint of smooth, nearly grey blocks is the glass's. From the blocks that have it, its light is
    interpolated to all others, near ones first. Where there are no such blocks, glass is taken to be white.
    """
    light, roughness = _block_statistics(pixels)
    log_light = np.log10(np.maximum(light, 1.0))
    tint = log_light[..., ::2] - log_light[..., 1:2]
    blocks = _smooth_grey_blocks(light, roughness, tint)
    if blocks.sum() >= max(4, LEAST_GLASS * blocks.size):
        commonest, share = _commonest_tint(tint[blocks])
        near = blocks & (np.abs(tint - commonest) < 2 * SAME_TINT).all(axis=2)
        if share > 0.5:
            return _follow_tint(log_light, tint, blocks, near)
    return Glass(np.full_like(log_light, LOG10[255]), np.zeros_like(blocks))


def _block_statistics(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the (h, w, 3) mean of blocks and the (h, w) standard deviation of their green."""
    light = np.asarray(Image.fromarray(pixels).reduce(BLOCK_PX)).astype(np.float32)
    roughness = np.empty(light.shape[:2], np.float32)
    missing = -pixels.shape[1] % BLOCK_PX
    for row in range(0, len(light), STRIP_PX // BLOCK_PX):
        green = pixels[row * BLOCK_PX :, :, 1][:STRIP_PX].astype(np.float32)
        green = np.pad(green, ((0, -len(green) % BLOCK_PX), (0, missing)), mode="edge")
        green = green.reshape(-1, BLOCK_PX, green.shape[1] // BLOCK_PX, BLOCK_PX)
        mean = np.einsum("abcd->ac", green) / BLOCK_PX**2
        variance = np.einsum("abcd,abcd->ac", green, green) / BLOCK_PX**2 - mean**2
        roughness[row : row + len(mean)] = np.sqrt(np.maximum(variance, 0))
    return light, roughness


def _smooth_grey_blocks(
    light: NDArray[np.float32], roughness: NDArray[np.float32], tint: NDArray[np.float32]
) -> NDArray[np.bool_]:
    scanned = (light.max(axis=2) > DARKEST_TISSUE) & (light.min(axis=2) < FLAT_WHITE)
    if not scanned.any():
        return scanned
    bright = light.min(axis=2)
    smooth = np.clip(2 * np.percentile(roughness[scanned], 5), *GLASS_ROUGHNESS)
    return (
        scanned
        & (roughness < smooth)
        & (np.abs(tint) < GLASS_TINT).all(axis=2)
        & (bright > DARKEST_GLASS * np.percentile(bright[scanned], 99))
    )


def _commonest_tint(tint: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """Return the mode of (n, 2) tints and the share of them that is near it."""
    edges = np.linspace(-GLASS_TINT, GLASS_TINT, 65)
    counts, _, _ = np.histogram2d(tint[:, 0], tint[:, 1], bins=(edges, edges))
    counts = ndimage.gaussian_filter(counts, 1.5, mode="constant")
    centres = (edges[1:] + edges[:-1]) / 2
    commonest = centres[list(np.unravel_index(counts.argmax(), counts.shape))]
    return commonest, float((np.abs(tint - commonest) < 2 * SAME_TINT).all(axis=1).mean())


def _follow_tint(
    log_light: NDArray[np.float32],
    tint: NDArray[np.float32],
    candidates: NDArray[np.bool_],
    blocks: NDArray[np.bool_],
) -> Glass:
    """Let the tint drift over the slide: take in blocks that look like the glass around them."""
    surface = _spread(log_light, blocks)
    local_tint = surface[..., ::2] - surface[..., 1:2]
    found = candidates & (np.abs(tint - local_tint) < SAME_TINT).all(axis=2)
    return Glass(_spread(log_light, found), found) if found.any() else Glass(surface, blocks)


def _spread(values: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Interpolate the known of (h, w, 3) values to all places, by means over ever wider surroundings.

    A wider surrounding weighs a hundredth of the next narrower one, so it counts only where that is empty.
    """
    total = np.full(known.shape, 1e-7, np.float32)
    result = total[..., None] * values[known].mean(axis=0)
    weight = known.astype(np.float32)
    for factor, share in ((1, 1.0), (4, 1e-2), (16, 1e-4)):
        total += share * _smooth(weight, factor)
        for channel in range(3):
            result[..., channel] += share * _smooth(values[..., channel] * weight, factor)
    return result / total[..., None]


def _smooth(values: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Smooth by a Gaussian of 3 x ``factor`` pixels, on a picture shrunk by ``factor``."""
    small = np.asarray(Image.fromarray(values).reduce(factor))
    small = ndimage.gaussian_filter(small, 3, mode="nearest")
    size = values.shape[1], values.shape[0]
    box = (0, 0, size[0] / factor, size[1] / factor)
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BILINEAR, box=box))


def _optical_density(
    planes: NDArray[np.uint8], glass: Glass, *, px_per_block: float
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Give the rows and the (3, h, W) optical density of strip after strip of a (3, H, W) picture."""
    _, height, width = planes.shape
    channels = [Image.fromarray(np.ascontiguousarray(glass.log_light[..., i])) for i in range(3)]
    for top in range(0, height, STRIP_PX):
        rows = slice(top, min(top + STRIP_PX, height))
        size = width, rows.stop - top
        box = (0, top / px_per_block, width / px_per_block, rows.stop / px_per_block)
        resized = [channel.resize(size, Image.Resampling.BILINEAR, box=box) for channel in channels]
        light = np.stack([np.asarray(channel) for channel in resized])
        light -= LOG10[planes[:, rows]]
        yield rows, light


def _planes(picture: Image.Image) -> NDArray[np.uint8]:
    """Return an RGB picture as (3, H, W)."""
    return np.stack([np.asarray(band) for band in picture.split()])


def _mark_stain(pixels: NDArray[np.uint8], glass: Glass) -> NDArray[np.bool_]:
    """Mark where light of one colour is taken more than of another, by vote of each pixel and its neighbours."""
    planes = _planes(Image.fromarray(pixels))
    spread = np.empty(pixels.shape[:2], np.float32)
    for rows, density in _optical_density(planes, glass, px_per_block=BLOCK_PX):
        spread[rows] = np.ptp(density, axis=0)
    spread[planes.max(axis=0) <= DARKEST_TISSUE] = 0
    spread[_flat_white(planes, glass)] = 0
    stained = Image.fromarray((spread > _least_spread(spread, glass)).astype(np.uint8) * 255)
    return np.asarray(stained.filter(ImageFilter.BoxBlur(1))) > 127


def _flat_white(planes: NDArray[np.uint8], glass: Glass) -> NDArray[np.bool_]:
    """Where there is nothing; beside tinted glass with a margin, as the edge between them mixes both."""
    white: NDArray[np.bool_] = planes.min(axis=0) >= FLAT_WHITE
    tint = np.ptp(glass.log_light[glass.blocks], axis=1)
    if len(tint) and np.median(tint) > COLOUR_RANGE[0] / 2 and white.any():
        return _grown(white, by=3)
    return white


def _grown(mask: NDArray[np.bool_], *, by: int = 1) -> NDArray[np.bool_]:
    return np.asarray(ndimage.binary_dilation(mask, structure=np.ones((3, 3)), iterations=by), bool)


def _least_spread(spread: NDArray[np.float32], glass: Glass) -> float:
    """Where stain begins, from the spread that glass itself has at the middle of its blocks."""
    middle = spread[BLOCK_PX // 2 :: BLOCK_PX, BLOCK_PX // 2 :: BLOCK_PX]
    on_glass = middle[glass.blocks[: middle.shape[0], : middle.shape[1]]]
    noise = np.percentile(on_glass, 99) if len(on_glass) else 0.0
    return float(np.clip(NOISE_FACTOR * noise, *COLOUR_RANGE))


def mark_ink(pixels: NDArray[np.uint8], glass: Glass, *, mpp: float) -> NDArray[np.bool_]:
    """Mark felt pen, by what no stain does to light.

    Haematoxylin and eosin both take green most. Blue and green pen take more red than green; red pen takes
    blue nearly as much as green and hardly any red; black pen takes all three. Over tissue the colours mix, so
    there a mark goes on as long as it stays darker than tissue is.

    Returns:
        (H, W) mask, with a margin for the pen's soft edge.
    """
    height, width = pixels.shape[:2]
    cells = _planes(Image.fromarray(pixels).reduce(INK_CELL_PX))
    core, reach = np.zeros(cells.shape[1:], bool), np.zeros(cells.shape[1:], bool)
    for rows, density in _optical_density(cells, glass, px_per_block=BLOCK_PX / INK_CELL_PX):
        core[rows], reach[rows] = _ink_colours(*density)
    # The edge of an area that was never scanned mixes black with glass, which makes a grey like pen.
    scanned = ~_grown(cells.max(axis=0) <= NEVER_SCANNED)
    core, reach = core & scanned, reach & scanned
    core = remove_small_objects(core, max_size=max(1, round(SMALLEST_INK_UM2 / (mpp * INK_CELL_PX) ** 2)))
    if not core.any():
        return np.zeros((height, width), bool)
    regions = np.asarray(label(core | reach, connectivity=2))
    ink = _grown(np.isin(regions, np.unique(regions[core])))
    return ink.repeat(INK_CELL_PX, axis=0).repeat(INK_CELL_PX, axis=1)[:height, :width]


def _ink_colours(
    red: NDArray[np.float32], green: NDArray[np.float32], blue: NDArray[np.float32]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return where (h, w) optical densities can only be ink, and where they may be ink over tissue."""
    cold = (red > 1.15 * green + 0.03) & (red > 0.3)
    warm = (blue > 0.65 * green + 0.04) & (blue < 1.15 * green) & (red < 0.45 * green) & (green > 0.5)
    black = np.minimum(np.minimum(red, green), blue) > 0.6
    dark = red > 0.6
    warm_over_tissue = (blue > 0.55) & (green > 0.7) & (blue > 0.6 * green) & (red < 0.5 * green)
    return cold | warm | black, dark | warm_over_tissue
