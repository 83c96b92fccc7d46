"""Patches read in strips are the patches read one by one."""

from __future__ import annotations

import numpy as np
import pytest

from s4mil_monai.slides.patches import read_patches
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.slides.reader import open_slide


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    picture = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("patches") / "noise.tif"
    write_pyramid(picture, path, mpp=0.5, levels=2, compression="deflate", shrink=2.0005)
    with open_slide(path, backends=["tifffile"]) as opened:
        opened.levels = opened.levels[:2]
        yield opened


@pytest.mark.parametrize("level", [0, 1])
def test_strips_give_the_pixels_of_single_reads(slide, level):
    side = 50
    step = side * slide.levels[level].downsample
    rows = [[(round(column * step), round(row * step)) for column in range(12)] for row in range(4)]
    corners = [corner for row in rows for corner in row]
    del corners[5], corners[20:23]  # holes, as where there is no tissue
    patches = read_patches(slide, corners, side_px=side, level=level)
    for patch, corner in zip(patches, corners, strict=True):
        alone = slide.read_region(top_left_px0=corner, size_px=(side, side), level=level)
        np.testing.assert_array_equal(patch, alone)


def test_neighbours_are_read_at_once(slide, monkeypatch):
    reads = []
    real = slide.read_region
    monkeypatch.setattr(slide, "read_region", lambda **where: reads.append(where["size_px"]) or real(**where))
    read_patches(slide, [(0, 0), (50, 0), (100, 0), (200, 0), (0, 50)], side_px=50, level=0)
    assert reads == [(150, 50), (50, 50), (50, 50)]


def test_any_order_is_read_in_strips_and_comes_back_in_that_order(slide, monkeypatch):
    corners = [(100, 50), (50, 0), (0, 0), (50, 50), (0, 0), (300, 0)]
    single = [slide.read_region(top_left_px0=corner, size_px=(50, 50)) for corner in corners]
    reads = []
    real = slide.read_region
    monkeypatch.setattr(slide, "read_region", lambda **where: reads.append(where["size_px"]) or real(**where))
    np.testing.assert_array_equal(read_patches(slide, corners, side_px=50, level=0), single)
    assert sorted(reads) == [(50, 50), (50, 50), (100, 50), (100, 50)]
