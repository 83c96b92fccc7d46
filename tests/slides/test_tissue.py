"""Tissue on glass of known shape."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import ArrayLike

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
    assert tissue_of(stain).mean() > 0.99


def test_dust_and_pinholes_are_dropped():
    picture = np.full((300, 300, 3), GLASS, np.uint8)
    picture[100:200, 100:200] = PINK
    picture[20:24, 20:24] = PINK
    picture[150:154, 150:154] = GLASS
    mask = tissue_of(picture)  # at 8 µm/px specks and holes below 156 pixels go
    assert not mask[:90].any()
    assert mask[145:160, 145:160].all()


@pytest.mark.parametrize("value", [(4, 0, 0), (255, 255, 255)])
def test_area_that_was_never_scanned_is_neither_tissue_nor_ink(value):
    picture = scene()[0]
    picture[:, :80] = value
    mask, ink = mark_tissue(picture, mpp=8.0)
    assert not mask[:, :90].any()
    assert not ink.any()


STAIN = np.array([[0.30, 0.45, 0.20], [0.12, 0.40, 0.10]])
"""Optical density of haematoxylin-rich and eosin-rich tissue, RGB."""


def scene(*, stain: float = 1.0, glass=GLASS, light: ArrayLike = 1.0, noise: float = 1.5, seed: int = 0):
    """(400, 400, 3) picture and its truth: a square of textured tissue on glass, lit unevenly."""
    generator = np.random.default_rng(seed)
    truth = np.zeros((400, 400), bool)
    truth[120:300, 150:330] = True
    share = generator.random((400, 400, 1))
    through = 10 ** -((share * STAIN[0] + (1 - share) * STAIN[1]) * generator.uniform(0.5, 1.5, share.shape))
    through = 1 - stain * (1 - through) * truth[..., None]
    return scanned(through * np.asarray(light), glass, noise, generator), truth


def scanned(through, glass=GLASS, noise: float = 1.5, generator=None):
    generator = generator or np.random.default_rng(1)
    picture = through * np.array(glass) + generator.normal(0, noise, through.shape)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def tissue_of(picture):
    return mark_tissue(picture, mpp=8.0)[0]


RAMP = np.linspace(0.55, 1.0, 400)[None, :, None]


@pytest.mark.parametrize("stain", [1.0, 0.5, 0.35])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"glass": (205, 205, 207)},
        {"glass": (240, 232, 214)},
        {"glass": (240, 228, 236)},
        {"light": RAMP},
        {"glass": (262, 262, 262)},
    ],
    ids=["white", "grey", "warm tint", "pink tint", "uneven light", "clipped white"],
)
def test_stained_and_pale_tissue_is_found_on_any_glass(kind, stain):
    picture, truth = scene(stain=stain, **kind)
    assert dice(tissue_of(picture), truth) > 0.95


def test_stitching_is_not_tissue():
    generator = np.random.default_rng(2)
    fields = np.repeat(np.repeat(generator.uniform(0.95, 1, (8, 8, 1)), 50, 0), 50, 1)
    fields[::50] *= 0.8
    picture, truth = scene(stain=0.5, light=fields)
    assert dice(tissue_of(picture), truth) > 0.95


@pytest.mark.parametrize(
    "through",
    [(0.15, 0.28, 0.68), (0.12, 0.50, 0.32), (0.82, 0.16, 0.20), (0.12, 0.12, 0.13)],
    ids=["blue", "green", "red", "black"],
)
def test_pen_over_glass_and_over_tissue_is_ink_and_not_tissue(through):
    line = np.zeros((400, 400), bool)
    line[200:250] = True  # 0.4 mm wide, from edge to edge across the tissue
    picture, truth = scene(light=np.where(line[..., None], np.array(through), 1.0))
    mask, ink = mark_tissue(picture, mpp=8.0)
    assert dice(ink, line) > 0.9
    assert not (mask & ink).any()
    assert dice(mask, truth & ~line) > 0.95


def test_tissue_without_pen_has_no_ink():
    assert not mark_tissue(scene()[0], mpp=8.0)[1].any()


def blank(kind: str):
    y, x = np.mgrid[-1:1:400j, -1:1:400j][..., None]
    through = np.ones((400, 400, 3))
    if kind == "noisy":
        return scanned(through, noise=8)
    if kind == "tinted and noisy":
        return scanned(through, (240, 232, 214), noise=5)
    if kind == "vignetted":
        return scanned(through * (1 - 0.3 * (x**2 + y**2)))
    if kind == "shadowed":
        return scanned(through * np.where(np.hypot(x - 0.3, y) < 0.3, 0.7, 1.0))
    return scanned(through * np.where(np.abs(x) < 0.1, np.array([0.15, 0.28, 0.68]), 1.0))


@pytest.mark.parametrize("kind", ["noisy", "tinted and noisy", "vignetted", "shadowed", "with pen"])
def test_blank_glass_has_no_tissue(kind, tmp_path):
    path = write_pyramid(blank(kind), tmp_path / "blank.tif", mpp=8.0)
    with open_slide(path) as slide, pytest.raises(NoTissueError, match=r"blank\.tif: no tissue found"):
        find_tissue(slide)


def test_mask_comes_with_the_picture_it_was_found_on(tissue_slide):
    with open_slide(tissue_slide) as slide:
        tissue = find_tissue(slide)
        overview = read_overview(slide, px0_per_px=16)
    assert tissue.overview.level == 2
    assert tissue.ink.shape == tissue.mask.shape
    np.testing.assert_array_equal(tissue.overview.pixels, overview.pixels)


def test_tissue_of_a_real_slide_is_what_is_not_its_white(shared):
    with open_slide(shared / "slides" / "gallery19_20x.tif") as slide:
        tissue = find_tissue(slide)
    grey = tissue.overview.pixels.min(axis=2)
    assert tissue.mask[grey < 170].mean() > 0.995
    assert tissue.mask[10:40, 10:40].mean() == 0  # glass in the corner
    assert not tissue.ink.any()


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
