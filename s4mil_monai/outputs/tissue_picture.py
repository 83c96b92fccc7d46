"""A picture of what was taken for tissue, what for ink, and which patches are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion

from s4mil_monai.errors import OutputError
from s4mil_monai.slides.grid import PatchGrid
from s4mil_monai.slides.tissue import TissueMask

TISSUE, INK, PATCH = (0, 140, 60), (230, 120, 0), (20, 110, 200)
"""RGB of the outline of tissue, of ink, and of the patches' squares."""

SMALLEST_LONG_SIDE_PX = 1000
"""A smaller overview is enlarged, so that single patches can be told apart."""


def write_tissue_picture(tissue: TissueMask, grid: PatchGrid, path: Path) -> None:
    """Draw the overview with tissue outlined green, ink filled orange, and patches as blue squares.

    Raises:
        OutputError: It cannot be written.
    """
    pixels = tissue.overview.pixels.copy()
    pixels[tissue.mask & ~binary_erosion(tissue.mask, border_value=1)] = TISSUE
    pixels[tissue.ink] = INK
    enlarged = max(1, round(SMALLEST_LONG_SIDE_PX / max(pixels.shape[:2])))
    picture = Image.fromarray(np.repeat(np.repeat(pixels, enlarged, 0), enlarged, 1))
    draw = ImageDraw.Draw(picture)
    scale = np.array(tissue.px0_per_px) / enlarged
    for left, top in grid.top_left_px0 / scale:
        right, bottom = left + grid.plan.side_px0 / scale[0], top + grid.plan.side_px0 / scale[1]
        draw.rectangle((left, top, right, bottom), outline=PATCH)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror or error})") from error
