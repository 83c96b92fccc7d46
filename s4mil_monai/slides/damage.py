"""Whether the pixels of a patch are those of the slide: damaged tiles often decode to something.

A flipped bit in a JPEG tile rarely stops a decoder: the rest of the tile comes out grey, or in other colours.
The overview is read from a coarser level, which other bytes of the file hold, so both can be compared.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from s4mil_monai.slides.grid import PatchGrid
from s4mil_monai.slides.overview import Overview
from s4mil_monai.slides.slide import WHITE

BLOCKS = 4
"""A patch is compared in 4 x 4 blocks; of 32 µm at 20x, four pixels of the overview."""

COLOUR_TOLERANCE = 32.0
"""Largest difference of a block's mean colour, of 255. On sound slides it was at most 16 (both levels' JPEG,
resampling); a tile that lost its bits is tens of grey levels off."""


class ColourCheck:
    """Compares patches with the overview of their slide, block by block."""

    def __init__(self, overview: Overview, grid: PatchGrid):
        self._grid = grid
        self._scale = np.array(overview.px0_per_px)
        table = np.pad(overview.pixels.astype(np.float64), ((1, 0), (1, 0), (0, 0)))
        self._table = table.cumsum(0).cumsum(1)
        self.possible = overview.level != grid.plan.level
        """Where the slide has no coarser level, both come from the same bytes and nothing can be told."""

    def disagreeing(self, start: int, colours: NDArray[np.float32]) -> NDArray[np.bool_]:
        """(n,) whether patches differ from the overview.

        Args:
            start: Place of the first of them in the scan order.
            colours: (n, 3, 4, 4) mean RGB of their blocks, of 255.
        """
        return self.differences(start, colours) > COLOUR_TOLERANCE

    def differences(self, start: int, colours: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n,) largest difference of a block's mean colour, of 255; arguments as in :meth:`disagreeing`."""
        wanted = self._colours(self._grid.top_left_px0[start : start + len(colours)])
        return np.abs(wanted - colours).reshape(len(colours), -1).max(axis=1)

    def _colours(self, corners: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n, 3, 4, 4) mean RGB of the blocks of patches on the overview; what is outside the scan is white."""
        steps = np.arange(BLOCKS + 1) * self._grid.plan.side_px0 / BLOCKS
        x = (corners[:, :1] + steps) / self._scale[0]  # (n, 5) in pixels of the overview
        y = (corners[:, 1:] + steps) / self._scale[1]
        height, width = (size - 1 for size in self._table.shape[:2])
        inside_x, inside_y = np.minimum(x, width), np.minimum(y, height)
        at = np.stack(np.broadcast_arrays(inside_y[:, :, None], inside_x[:, None, :]))  # (2, n, 5, 5)
        sums = np.stack([map_coordinates(self._table[..., c], at, order=1) for c in range(3)], axis=1)
        sums = np.diff(np.diff(sums, axis=2), axis=3)  # (n, 3, 4, 4)
        area = np.diff(y)[:, :, None] * np.diff(x)[:, None, :]
        inside = np.diff(inside_y)[:, :, None] * np.diff(inside_x)[:, None, :]
        return (sums + WHITE * (area - inside)[:, None]) / area[:, None]
