"""write_pyramid(): a picture as a slide file, for demonstrations, benchmarks and tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from s4mil_monai.geometry import SizePx

TILE_PX = 256


def write_pyramid(
    pixels: NDArray[np.uint8],
    path: Path,
    *,
    mpp: float | None,
    levels: int = 3,
    compression: str | None = "jpeg",
    shrink: float = 2.0,
) -> Path:
    """Write an (H, W, 3) RGB picture as a tiled, pyramidal TIFF.

    Args:
        pixels: Level 0.
        path: Ends in ``.tif``.
        mpp: µm per pixel, written as the TIFF's resolution; None writes none.
        levels: Of the pyramid, level 0 counted.
        compression: As tifffile names it; None keeps the exact pixels.
        shrink: Between one level and the next.
    """
    tags = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    options = {"tile": (TILE_PX, TILE_PX), "photometric": "rgb", "compression": compression}
    if compression == "jpeg":
        options["compressionargs"] = {"level": 90}
    height, width = pixels.shape[:2]
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            scale = shrink**level
            size = (max(1, int(width / scale)), max(1, int(height / scale)))
            file.write(
                _shrunk(pixels, size), subfiletype=int(level > 0), **options, **(tags if level == 0 else {})
            )
    return path


def _shrunk(pixels: NDArray[np.uint8], size_px: SizePx) -> NDArray[np.uint8]:
    if size_px == (pixels.shape[1], pixels.shape[0]):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size_px, Image.Resampling.BOX))
