"""lay_grid(): which patches of a slide are read, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from s4mil_monai.errors import NoTissueError, UnknownNameError
from s4mil_monai.geometry import ReadPlan
from s4mil_monai.slides.tissue import TissueMask

SCAN_ORDERS: dict[str, Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]] = {
    "row_major": lambda row, column: np.lexsort((column, row)),
    "column_major": lambda row, column: np.lexsort((row, column)),
}
"""Name → permutation of patches from their grid rows and columns. The S4D reads patches as a sequence, so
the order is part of what a model was trained on."""


@dataclass(frozen=True)
class PatchGrid:
    """The patches of one slide, in scan order."""

    top_left_px0: NDArray[np.int64]
    """(n, 2) corners (x, y) in level-0 pixels."""
    tissue_share: NDArray[np.float32]
    """(n,) share of each patch that is tissue, in [0, 1]."""
    plan: ReadPlan
    scan_order: str

    def __len__(self) -> int:
        return len(self.top_left_px0)


def lay_grid(
    tissue: TissueMask, plan: ReadPlan, *, min_tissue: float = 0.5, scan_order: str = "row_major"
) -> PatchGrid:
    """Lay abutting patches over the scan and keep those with enough tissue.

    The grid starts at the scan's corner. A patch at the right or bottom edge may reach beyond it; what is
    outside counts as glass.

    Args:
        tissue: Mask of the slide.
        plan: How patches are read from it.
        min_tissue: Least share of a patch that is tissue, in [0, 1].
        scan_order: ``row_major`` or ``column_major``.

    Raises:
        UnknownNameError: No such scan order.
        NoTissueError: Not one patch has enough tissue.
        ValueError: ``min_tissue`` is no fraction.
    """
    if scan_order not in SCAN_ORDERS:
        raise UnknownNameError("scan order", scan_order, tuple(SCAN_ORDERS))
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"min_tissue is a fraction in [0, 1], got {min_tissue}")
    share = _tissue_shares(tissue, plan.side_px0)
    row, column = np.nonzero(share >= max(min_tissue, np.finfo(np.float32).tiny))
    if len(row) == 0:
        raise NoTissueError(
            tissue.slide, f"tissue fills no patch by {min_tissue:.0%}; its largest share is {share.max():.0%}"
        )
    order = SCAN_ORDERS[scan_order](row, column)
    row, column = row[order], column[order]
    corners = np.stack((column, row), axis=1) * plan.side_px0
    return PatchGrid(
        top_left_px0=np.rint(corners).astype(np.int64),
        tissue_share=share[row, column].astype(np.float32),
        plan=plan,
        scan_order=scan_order,
    )


def _tissue_shares(tissue: TissueMask, side_px0: float) -> NDArray[np.float64]:
    """(rows, columns) exact share of tissue in each square of ``side_px0`` level-0 pixels.

    The mask's summed-area table, interpolated linearly, is the exact integral over any rectangle.
    """
    height, width = tissue.mask.shape
    table = np.pad(tissue.mask.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    steps = [side_px0 / scale for scale in tissue.px0_per_px]  # (x, y), in mask pixels
    columns, rows = (int(np.ceil(size / step - 1e-9)) for size, step in zip((width, height), steps, strict=True))
    x = np.minimum(np.arange(columns + 1) * steps[0], width)
    y = np.minimum(np.arange(rows + 1) * steps[1], height)
    corners = map_coordinates(table, np.meshgrid(y, x, indexing="ij"), order=1)
    area = np.diff(np.diff(corners, axis=0), axis=1)
    return np.clip(area / (steps[0] * steps[1]), 0.0, 1.0)
