"""Tissue on glass of known shape."""

from __future__ import annotations

import numpy as np
import pytest

from s4mil_monai.errors import NoTissueError
from s4mil_monai.slides.overview import read_overview, read_square
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.slides.reader import open_slide
from s4mil_monai.slides.tissue import find_tissue, mark_tissue
from tests.conftest import GLASS, PINK, tissue_picture


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_rectangle_of_tissue_is_found_where_it_is(tissue_slide):
    with open_slide(tissue_slide) as slide:
        tissue = find_tissue(slide)
    truth = np.zeros((80, 96), bool)
    truth[16:64, 16:80] = True  # 256..1024 and 256..1280 level-0 pixels at 16 a pixel
    assert tissue.mask.shape == truth.shape
    assert dice(tissue.mask, truth) > 0.99


def test_shaded_glass_is_not_tissue(tmp_path):
    picture = tissue_picture().astype(float)
    shade = np.linspace(0.55, 1.0, picture.shape[1])[None, :, None]  # a vignette, grey at any brightness
    path = write_pyramid((picture * shade).astype(np.uint8), tmp_path / "s.tif", mpp=0.5)
    with open_slide(path) as slide:
        tissue = find_tissue(slide)
    truth = np.zeros((80, 96), bool)
    truth[16:64, 16:80] = True
    assert dice(tissue.mask, truth) > 0.98


def test_slide_full_of_tissue_is_all_tissue():
    generator = np.random.default_rng(0)
    stain = np.where(generator.random((200, 200, 1)) < 0.5, (210, 150, 190), (150, 60, 140)).astype(np.uint8)
    assert mark_tissue(stain, smallest_px=10).mean() > 0.99


def test_dust_and_pinholes_are_dropped():
    picture = np.full((300, 300, 3), GLASS, np.uint8)
    picture[100:200, 100:200] = PINK
    picture[20:24, 20:24] = PINK
    picture[150:154, 150:154] = GLASS
    mask = mark_tissue(picture, smallest_px=50)
    assert not mask[:90].any()
    assert mask[145:160, 145:160].all()


def test_black_border_is_not_tissue():
    picture = np.full((200, 200, 3), GLASS, np.uint8)
    picture[:, :50] = (4, 0, 0)  # saturation 1, and yet nothing
    assert not mark_tissue(picture, smallest_px=10).any()


def test_white_slide_has_no_tissue(white_slide):
    with open_slide(white_slide) as slide, pytest.raises(NoTissueError, match=r"white\.tif: no tissue found"):
        find_tissue(slide)


def test_overview_is_the_same_with_and_without_a_pyramid(tmp_path):
    overviews = []
    for levels in (1, 3):
        path = write_pyramid(tissue_picture(), tmp_path / f"{levels}.tif", mpp=0.5, levels=levels)
        with open_slide(path) as slide:
            overviews.append(read_overview(slide, px0_per_px=16).pixels.astype(int))
    assert np.abs(overviews[0] - overviews[1]).max() <= 10  # JPEG of other levels


def test_overview_put_together_from_blocks_has_no_seams(tmp_path, monkeypatch):
    ramp = np.broadcast_to(np.linspace(0, 255, 1500)[None, :, None], (700, 1500, 3)).astype(np.uint8)
    path = write_pyramid(np.ascontiguousarray(ramp), tmp_path / "s.tif", mpp=0.5, levels=1, compression="deflate")
    with open_slide(path) as slide:
        whole = read_overview(slide, px0_per_px=7.3).pixels.astype(int)
        monkeypatch.setattr("s4mil_monai.slides.overview.BLOCK_PX", 17)
        blocks = read_overview(slide, px0_per_px=7.3).pixels.astype(int)
    assert np.abs(whole - blocks).max() <= 1
    assert (np.diff(blocks[0, :, 0]) >= 0).all()


def test_square_is_read_at_the_size_asked_for(tissue_slide):
    with open_slide(tissue_slide) as slide:
        square = read_square(slide, top_left_px0=(256, 256), side_px0=512, side_px=100)
    assert square.shape == (100, 100, 3)
    assert np.abs(square.reshape(-1, 3).mean(0) - PINK).max() < 6
