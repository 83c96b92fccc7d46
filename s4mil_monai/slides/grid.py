"""lay_grid(): which patches of a slide are read, and in which order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from s4mil_monai.errors import NoTissueError, UnknownNameError
from s4mil_monai.geometry import ReadPlan
from s4mil_monai.slides.tissue import TissueMask

ScanOrder = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
"""Grid rows and columns of n patches → permutation of the n."""


def _serpentine(row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.lexsort((np.where(row % 2 == 1, -column, column), row))


def _hilbert(row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.argsort(hilbert_distance(column, row), kind="stable")


def hilbert_distance(x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.int64]:
    """How far along the Hilbert curve from (0, 0) each cell (x, y) lies.

    Over the smallest square of 4, 16, 64, … cells a side that covers them: the curve over a square four times as
    wide begins with this one, so the order of two cells does not depend on how far the others are. (Over a
    square twice as wide it begins with this one's mirror image.)

    From the largest quadrant to the smallest: the curve passes the four in the order of a U, and is mirrored in
    the first and the last, so that every step goes to a neighbour.

    >>> hilbert_distance(np.array([0, 1, 1, 0, 0]), np.array([0, 0, 1, 1, 2])).tolist()
    [0, 1, 2, 3, 4]
    """
    x, y = x.astype(np.int64), y.astype(np.int64)
    distance = np.zeros_like(x)
    bits = int(max(x.max(initial=0), y.max(initial=0))).bit_length()
    for bit in reversed(range(bits + bits % 2)):
        right, lower = (x >> bit) & 1, (y >> bit) & 1
        distance += ((3 * right) ^ lower) << (2 * bit)
        flip = np.where((lower == 0) & (right == 1), (1 << bit) - 1, 0)
        x, y = x ^ flip, y ^ flip
        x, y = np.where(lower == 0, y, x), np.where(lower == 0, x, y)
    return distance


SCAN_ORDERS: dict[str, ScanOrder] = {
    "row_major": lambda row, column: np.lexsort((column, row)),
    "column_major": lambda row, column: np.lexsort((row, column)),
    "serpentine": _serpentine,
    "hilbert": _hilbert,
}
"""Orders by name. ``serpentine`` goes along the grid's rows and back along every other one; ``hilbert`` follows
the Hilbert curve. The S4D reads patches as a sequence, so the order is part of what a model was trained on.
Patches that follow each other to the right are read from the file in one go, so ``row_major`` reads fastest."""


@dataclass(frozen=True)
class PatchGrid:
    """The patches of one slide, in scan order."""

    top_left_px0: NDArray[np.int64]
    """(n, 2) corners (x, y) in level-0 pixels."""
    tissue_share: NDArray[np.float32]
    """(n,) share of each patch that is tissue, in [0, 1]."""
    plan: ReadPlan
    scan_order: str
    overlap_px: int = 0
    """How far neighbours overlap, in pixels of the patch as the encoder sees it."""

    def __len__(self) -> int:
        return len(self.top_left_px0)


def lay_grid(
    tissue: TissueMask,
    plan: ReadPlan,
    *,
    min_tissue: float = 0.5,
    scan_order: str = "row_major",
    overlap_px: int = 0,
) -> PatchGrid:
    """Lay patches over the whole scan and keep those with enough tissue.

    The grid starts at the scan's corner and goes on until the scan is covered. A patch at the right or bottom
    edge may reach beyond it; what is outside counts as glass. Every corner is on a whole pixel of the level
    that is read, so a patch's pixels are those of its corner to within half a level-0 pixel; where the
    overlap is not a whole number of these pixels, neighbouring strides differ by one.

    Args:
        tissue: Mask of the slide.
        plan: How patches are read from it.
        min_tissue: Least share of a patch that is tissue, in [0, 1].
        scan_order: A name in :data:`SCAN_ORDERS`.
        overlap_px: How far neighbouring patches overlap, in pixels of the patch as the encoder sees it.

    Raises:
        UnknownNameError: No such scan order.
        NoTissueError: Not one patch has enough tissue.
        ValueError: ``min_tissue`` is no fraction, or ``overlap_px`` is negative or a whole patch.
    """
    if scan_order not in SCAN_ORDERS:
        raise UnknownNameError("scan order", scan_order, tuple(SCAN_ORDERS))
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"min_tissue is a fraction in [0, 1], got {min_tissue}")
    if not 0 <= overlap_px < plan.patch_side_px:
        raise ValueError(f"overlap_px is in [0, {plan.patch_side_px}), the patch's side, got {overlap_px}")
    height, width = tissue.mask.shape
    x_px0 = _corners_along(width * tissue.px0_per_px[0], plan, overlap_px)
    y_px0 = _corners_along(height * tissue.px0_per_px[1], plan, overlap_px)
    share = _tissue_shares(tissue, x_px0, y_px0, plan.side_px0)
    row, column = np.nonzero(share >= max(min_tissue, np.finfo(np.float32).tiny))
    if len(row) == 0:
        raise NoTissueError(
            tissue.slide, f"tissue fills no patch by {min_tissue:.0%}; its largest share is {share.max():.0%}"
        )
    order = SCAN_ORDERS[scan_order](row, column)
    row, column = row[order], column[order]
    return PatchGrid(
        top_left_px0=np.rint(np.stack((x_px0[column], y_px0[row]), axis=1)).astype(np.int64),
        tissue_share=share[row, column].astype(np.float32),
        plan=plan,
        scan_order=scan_order,
        overlap_px=overlap_px,
    )


def _corners_along(length_px0: float, plan: ReadPlan, overlap_px: int) -> NDArray[np.float64]:
    """Left or upper edges, in level-0 pixels, of the patches that cover a length from 0 on.

    In whole pixels of the level that is read, because a read rounds to them.
    """
    downsample = plan.side_px0 / plan.read_side_px
    stride_px = plan.read_side_px * (1 - overlap_px / plan.patch_side_px)
    beyond_first = length_px0 / downsample - plan.read_side_px
    count = 1 + max(0, math.ceil(beyond_first / stride_px - 1e-9))
    return np.rint(np.arange(count) * stride_px) * downsample


def _tissue_shares(
    tissue: TissueMask, x_px0: NDArray[np.float64], y_px0: NDArray[np.float64], side_px0: float
) -> NDArray[np.float64]:
    """(rows, columns) exact share of tissue in each square of ``side_px0`` level-0 pixels.

    The mask's summed-area table, interpolated linearly, is the exact integral over any rectangle.
    """
    height, width = tissue.mask.shape
    scale_x, scale_y = tissue.px0_per_px
    table = np.pad(tissue.mask.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    left, right = (np.clip(at / scale_x, 0, width) for at in (x_px0, x_px0 + side_px0))
    upper, lower = (np.clip(at / scale_y, 0, height) for at in (y_px0, y_px0 + side_px0))

    def up_to(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        return map_coordinates(table, np.meshgrid(y, x, indexing="ij"), order=1)

    area = up_to(lower, right) - up_to(upper, right) - up_to(lower, left) + up_to(upper, left)
    return np.clip(area * scale_x * scale_y / side_px0**2, 0.0, 1.0)
