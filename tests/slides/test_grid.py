"""Which patches, where, in which order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mil_monai.errors import NoTissueError, UnknownNameError
from s4mil_monai.geometry import ReadPlan
from s4mil_monai.slides.grid import lay_grid
from s4mil_monai.slides.tissue import TissueMask


def plan(side_px0: float = 256.0) -> ReadPlan:
    return ReadPlan(level=0, read_side_px=256, patch_side_px=256, side_px0=side_px0, mpp=0.5)


def mask_of(array, px0_per_px=16.0) -> TissueMask:
    return TissueMask(np.asarray(array, bool), (px0_per_px, px0_per_px), "s.svs")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(20, 700))
def test_every_pixel_lies_in_exactly_one_patch(width, height, side):
    grid = lay_grid(mask_of(np.ones((height, width))), plan(side), min_tissue=0.0)
    covered = np.zeros((height * 16, width * 16), int)
    step = sorted(set(grid.top_left_px0[:, 0].tolist())), sorted(set(grid.top_left_px0[:, 1].tolist()))
    for x, y in grid.top_left_px0:
        right = next((at for at in step[0] if at > x), width * 16)
        bottom = next((at for at in step[1] if at > y), height * 16)
        assert abs(right - x - side) <= 1 or right == width * 16
        covered[y:bottom, x:right] += 1
    assert (covered == 1).all()


def test_corner_is_within_half_a_pixel_of_its_place_at_a_downsample_that_is_not_whole():
    side = 256 * 2.0005054473876953
    grid = lay_grid(mask_of(np.ones((2000, 2000))), plan(side))
    columns = np.round(grid.top_left_px0[:, 0] / side)
    assert np.abs(grid.top_left_px0[:, 0] - columns * side).max() <= 0.5


def test_share_of_tissue_is_exact_where_patches_cut_mask_pixels():
    mask = np.zeros((4, 4))
    mask[:, :2] = 1  # 32 of 64 level-0 pixels in x
    grid = lay_grid(mask_of(mask), plan(40.0), min_tissue=0.01)
    # the first column of patches covers x in [0, 40): 32 of 40 are tissue; the second has none
    assert grid.tissue_share.tolist() == pytest.approx([0.8, 0.8 * 24 / 40])  # the lower row reaches 16 px beyond


def test_patches_with_less_tissue_than_wanted_are_left_out():
    mask = np.zeros((16, 32))
    mask[:, :24] = 1  # first patch full, second half
    assert len(lay_grid(mask_of(mask), plan(), min_tissue=0.5)) == 2
    assert len(lay_grid(mask_of(mask), plan(), min_tissue=0.51)) == 1


def test_scan_orders_read_rows_or_columns_first():
    ones = mask_of(np.ones((32, 48)))
    rows = lay_grid(ones, plan(), scan_order="row_major").top_left_px0.tolist()
    columns = lay_grid(ones, plan(), scan_order="column_major").top_left_px0.tolist()
    assert rows == [[0, 0], [256, 0], [512, 0], [0, 256], [256, 256], [512, 256]]
    assert columns == [[0, 0], [0, 256], [256, 0], [256, 256], [512, 0], [512, 256]]


def test_unknown_scan_order_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="known: row_major, column_major"):
        lay_grid(mask_of(np.ones((9, 9))), plan(), scan_order="spiral")


def test_tissue_too_small_for_any_patch_is_no_tissue():
    mask = np.zeros((32, 32))
    mask[3:6, 3:6] = 1
    with pytest.raises(NoTissueError, match=r"tissue fills no patch by 50%; its largest share is 4%"):
        lay_grid(mask_of(mask), plan())


def test_share_that_is_no_fraction_is_refused():
    with pytest.raises(ValueError, match="fraction"):
        lay_grid(mask_of(np.ones((9, 9))), plan(), min_tissue=50)
