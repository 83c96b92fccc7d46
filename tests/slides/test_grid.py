"""Which patches, where, in which order."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mil_monai.errors import NoTissueError, UnknownNameError
from s4mil_monai.geometry import ReadPlan
from s4mil_monai.slides.grid import SCAN_ORDERS, hilbert_distance, lay_grid
from s4mil_monai.slides.overview import Overview
from s4mil_monai.slides.patches import read_patches
from s4mil_monai.slides.reader import open_slide
from s4mil_monai.slides.resolution import plan_reading
from s4mil_monai.slides.tissue import TissueMask


def plan(side_px0: float = 256.0) -> ReadPlan:
    return ReadPlan(level=0, read_side_px=256, patch_side_px=256, side_px0=side_px0, mpp=0.5)


def mask_of(array, px0_per_px=16.0) -> TissueMask:
    mask, scale = np.asarray(array, bool), (px0_per_px, px0_per_px)
    overview = Overview(np.zeros((*mask.shape, 3), np.uint8), scale, level=0)
    return TissueMask(mask, scale, "s.svs", overview=overview, ink=np.zeros_like(mask))


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
    with pytest.raises(UnknownNameError, match="known: row_major, column_major, serpentine, hilbert"):
        lay_grid(mask_of(np.ones((9, 9))), plan(), scan_order="spiral")


def test_tissue_too_small_for_any_patch_is_no_tissue():
    mask = np.zeros((32, 32))
    mask[3:6, 3:6] = 1
    with pytest.raises(NoTissueError, match=r"tissue fills no patch by 50%; its largest share is 4%"):
        lay_grid(mask_of(mask), plan())


def test_share_that_is_no_fraction_is_refused():
    with pytest.raises(ValueError, match="fraction"):
        lay_grid(mask_of(np.ones((9, 9))), plan(), min_tissue=50)


@pytest.mark.parametrize("overlap_px", [-1, 256, 300])
def test_overlap_that_is_no_part_of_a_patch_is_refused(overlap_px):
    with pytest.raises(ValueError, match=r"overlap_px is in \[0, 256\)"):
        lay_grid(mask_of(np.ones((9, 9))), plan(), overlap_px=overlap_px)


def test_half_overlap_doubles_the_grid_and_stops_where_the_scan_is_covered():
    grid = lay_grid(mask_of(np.ones((32, 48))), plan(), overlap_px=128)  # 768 x 512 pixels
    assert sorted(set(grid.top_left_px0[:, 0].tolist())) == [0, 128, 256, 384, 512]
    assert sorted(set(grid.top_left_px0[:, 1].tolist())) == [0, 128, 256]
    assert grid.overlap_px == 128


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(20, 700), st.integers(0, 200))
def test_every_pixel_lies_in_a_patch_whatever_the_overlap(width, height, side, overlap_px):
    grid = lay_grid(mask_of(np.ones((height, width))), plan(side), min_tissue=0.0, overlap_px=overlap_px)
    for axis, length in ((0, width * 16), (1, height * 16)):
        places = np.unique(grid.top_left_px0[:, axis])
        assert places[0] == 0
        assert places[-1] + side >= length - 1
        assert (np.diff(places) <= side + 1).all()
        stride = side * (1 - overlap_px / 256)
        # corners are on whole pixels of the level, side / 256 wide, and then on whole level-0 pixels
        assert np.abs(places - np.arange(len(places)) * stride).max() <= side / 256 / 2 + 0.5
        assert len(places) == 1 or places[-2] + side < length + 1  # the last one is needed


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(256, 1200), st.integers(0, 200))
def test_share_is_the_mean_of_the_mask_over_the_patch(seed, side, overlap_px):
    mask = np.random.default_rng(seed).random((13, 17)) < 0.4
    grid = lay_grid(mask_of(mask, 64.0), plan(side), min_tissue=0.0, overlap_px=overlap_px, scan_order="hilbert")
    edges_x, edges_y = np.arange(18) * 64.0, np.arange(14) * 64.0
    downsample = side / 256  # below 1, several places of the level would round to one level-0 pixel
    for corner, share in zip(grid.top_left_px0, grid.tissue_share, strict=True):
        left, top = np.rint(corner / downsample) * downsample  # before it was rounded to a level-0 pixel
        inside_x = np.clip(np.minimum(edges_x[1:], left + side) - np.maximum(edges_x[:-1], left), 0, None)
        inside_y = np.clip(np.minimum(edges_y[1:], top + side) - np.maximum(edges_y[:-1], top), 0, None)
        assert share == pytest.approx(inside_y @ mask @ inside_x / side**2, abs=1e-6)


def grid_places(grid, side: int = 256) -> np.ndarray:
    """(n, 2) columns and rows."""
    return grid.top_left_px0 // side


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.sampled_from(sorted(SCAN_ORDERS)))
def test_every_order_has_every_patch_once(seed, columns, rows, scan_order):
    mask = np.kron(np.random.default_rng(seed).random((rows, columns)) < 0.6, np.ones((16, 16), bool))
    mask[:16, :16] = True
    rows_first = lay_grid(mask_of(mask), plan())
    grid = lay_grid(mask_of(mask), plan(), scan_order=scan_order)
    assert sorted(grid.top_left_px0.tolist()) == sorted(rows_first.top_left_px0.tolist())
    assert len(grid) == mask[::16, ::16].sum()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40))
def test_serpentine_goes_from_neighbour_to_neighbour(columns, rows):
    places = grid_places(lay_grid(mask_of(np.ones((rows * 16, columns * 16))), plan(), scan_order="serpentine"))
    assert (np.abs(np.diff(places, axis=0)).sum(axis=1) == 1).all()


def test_serpentine_turns_with_the_rows_of_the_grid_and_not_of_the_tissue():
    mask = np.ones((48, 48))
    mask[16:32] = 0
    places = grid_places(lay_grid(mask_of(mask), plan(), scan_order="serpentine")).tolist()
    assert places == [[0, 0], [1, 0], [2, 0], [0, 2], [1, 2], [2, 2]]


@pytest.mark.parametrize("levels", range(7))
def test_hilbert_goes_from_neighbour_to_neighbour_over_a_square_of_a_power_of_two(levels):
    side = 2**levels
    places = grid_places(lay_grid(mask_of(np.ones((side * 16, side * 16))), plan(), scan_order="hilbert"))
    assert places[0].tolist() == [0, 0]
    assert (np.abs(np.diff(places, axis=0)).sum(axis=1) == 1).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70))
def test_hilbert_order_of_two_places_does_not_depend_on_the_size_of_the_grid(columns, rows):
    y, x = np.indices((70, 70)).reshape(2, -1)
    inside = (x < columns) & (y < rows)
    np.testing.assert_array_equal(hilbert_distance(x, y)[inside], hilbert_distance(x[inside], y[inside]))


SIZES = ((4001, 3601), (2000, 1800), (999, 899))
"""Of the levels of a slide whose downsamples are about 2.0005 and 4.005."""


def write_slide_of_places(path, encode):
    """A pyramid whose every pixel holds ``encode(x, y)`` of the level-0 place of its upper left corner."""
    with tifffile.TiffWriter(path) as file:
        for i, (width, height) in enumerate(SIZES):
            x, y = (np.arange(n) * whole / n for n, whole in zip((width, height), SIZES[0], strict=True))
            pixels = np.rint(encode(*np.meshgrid(x, y))).astype(np.uint8)
            tags = {"resolution": (40000, 40000), "resolutionunit": 3} if i == 0 else {}
            file.write(pixels, tile=(256, 256), photometric="rgb", metadata=None, subfiletype=int(i > 0), **tags)
    return path


def in_bits(x, y):
    """12 bits of each, which can be read back."""
    x, y = np.rint(x).astype(int), np.rint(y).astype(int)
    return np.stack((x >> 4, (x & 15) << 4 | y >> 8, y & 255), axis=-1)


def from_bits(pixels: np.ndarray) -> np.ndarray:
    """(…, 2) places (x, y) that pixels hold."""
    red, green, blue = np.moveaxis(pixels.astype(int), -1, 0)
    return np.stack((red << 4 | green >> 4, (green & 15) << 8 | blue), axis=-1)


def in_waves(x, y):
    """Up and down by one a pixel, which stays readable where a library blends neighbouring pixels."""
    wave = [abs((at + 255) % 510 - 255) for at in (x, y)]
    return np.stack((*wave, np.full_like(wave[0], 128)), axis=-1)


@pytest.fixture(scope="module")
def slide_in_bits(tmp_path_factory):
    return write_slide_of_places(tmp_path_factory.mktemp("slides") / "bits.tif", in_bits)


@pytest.fixture(scope="module")
def slide_in_waves(tmp_path_factory):
    return write_slide_of_places(tmp_path_factory.mktemp("slides") / "waves.tif", in_waves)


def read_grid(path, backend, *, mpp, overlap_px):
    """A grid over the whole of a slide of places, and its patches as read."""
    with open_slide(path, backends=[backend]) as slide:
        reading = plan_reading(slide, mpp=mpp, patch_side_px=256)
        tissue = mask_of(np.ones((SIZES[0][1] // 16, SIZES[0][0] // 16)))
        grid = lay_grid(tissue, reading, min_tissue=0.9, overlap_px=overlap_px)
        corners = [(int(x), int(y)) for x, y in grid.top_left_px0]
        patches = read_patches(slide, corners, side_px=reading.read_side_px, level=reading.level)
    assert grid.top_left_px0.max(axis=0).min() > 1300
    return grid, patches


FAR_LEVELS = [(0.5, 1), (0.6, 1), (1.0, 2), (1.3, 2)]
"""µm/px wanted of a slide with 0.25, and the level that is read for it."""


@pytest.mark.parametrize("backend", ["cucim", "tifffile"])
@pytest.mark.parametrize("overlap_px", [0, 96])
@pytest.mark.parametrize("mpp, level", FAR_LEVELS)
def test_patch_is_where_it_says_to_within_one_level_0_pixel(slide_in_bits, backend, overlap_px, mpp, level):
    grid, patches = read_grid(slide_in_bits, backend, mpp=mpp, overlap_px=overlap_px)
    assert grid.plan.level == level
    assert np.abs(from_bits(patches[:, 0, 0]) - grid.top_left_px0).max() <= 1
    # the last pixel's corner is one pixel of the level before the patch's end
    end = grid.top_left_px0 + grid.plan.side_px0 * (1 - 1 / grid.plan.read_side_px)
    inside = (end < np.array(SIZES[0]) - 8).all(axis=1)
    assert np.abs(from_bits(patches[inside, -1, -1]) - end[inside]).max() <= 1.5


@pytest.mark.parametrize("overlap_px", [0, 96])
@pytest.mark.parametrize("mpp, level", FAR_LEVELS)
def test_patch_is_where_it_says_where_openslide_blends_pixels(slide_in_waves, overlap_px, mpp, level):
    grid, patches = read_grid(slide_in_waves, "openslide", mpp=mpp, overlap_px=overlap_px)
    steps = np.arange(grid.plan.read_side_px) * grid.plan.side_px0 / grid.plan.read_side_px
    for corner, patch in list(zip(grid.top_left_px0, patches, strict=True))[::5]:
        expected = in_waves(*np.meshgrid(corner[0] + steps, corner[1] + steps))
        inside = (slice(0, 200), slice(0, 200))  # patches may reach over the edge
        for axis in (0, 1):
            off_px0 = np.median(np.abs(patch[inside][..., axis] - expected[inside][..., axis]))
            assert off_px0 <= 1.5  # one, and half a grey level
