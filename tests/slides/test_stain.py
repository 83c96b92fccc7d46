"""Stain and light of pictures whose colours are known."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from skimage.color import rgb_from_hed

from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.overview import Overview
from s4mil_monai.slides.stain import measure_stain, separate_stains
from s4mil_monai.slides.tissue import TissueMask, find_tissue
from tests.conftest import GLASS, PINK

HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])  # Ruifrok and Johnston's table, red, green and blue
EOSIN = np.array([0.07, 0.99, 0.11])


def stained(haematoxylin: float, eosin: float, *, glass=GLASS, side: int = 200) -> TissueMask:
    """A quarter of the picture is tissue with these optical densities, the rest is glass."""
    density = haematoxylin * HAEMATOXYLIN / np.linalg.norm(HAEMATOXYLIN) + eosin * EOSIN / np.linalg.norm(EOSIN)
    return painted(np.round(np.array(glass) * 10**-density), glass=glass, side=side)


def painted(tissue_rgb, *, glass=GLASS, side: int = 200) -> TissueMask:
    pixels = np.full((side, side, 3), glass, np.uint8)
    mask = np.zeros((side, side), bool)
    mask[: side // 2, : side // 2] = True
    pixels[mask] = np.asarray(tissue_rgb, np.uint8)
    return TissueMask(mask, (16.0, 16.0), "s.tif", Overview(pixels, (16.0, 16.0), 0), np.zeros_like(mask))


@pytest.mark.parametrize(("haematoxylin", "eosin"), [(0.0, 0.3), (0.4, 0.0), (0.35, 0.2), (0.1, 0.6)])
def test_density_of_both_stains_comes_back(haematoxylin, eosin):
    found = measure_stain(stained(haematoxylin, eosin))
    assert found.haematoxylin_od == pytest.approx(haematoxylin, abs=0.01)  # colours are whole grey levels
    assert found.eosin_od == pytest.approx(eosin, abs=0.01)


def test_brightness_saturation_and_share_are_those_of_the_colours_painted():
    found = measure_stain(painted(PINK))  # (200, 100, 160) on (244, 244, 244)
    assert found.tissue_brightness == pytest.approx(460 / 3 / 255)
    assert found.glass_brightness == pytest.approx(244 / 255)
    assert found.saturation == pytest.approx(0.5)  # (200 - 100) / 200
    assert found.tissue_share == 0.25


def test_weaker_lamp_changes_brightness_and_not_the_stains():
    bright, dim = measure_stain(stained(0.3, 0.3)), measure_stain(stained(0.3, 0.3, glass=(180, 180, 180)))
    assert dim.glass_brightness < bright.glass_brightness - 0.2
    assert dim.tissue_brightness < bright.tissue_brightness - 0.1
    assert dim.haematoxylin_od == pytest.approx(bright.haematoxylin_od, abs=0.01)
    assert dim.eosin_od == pytest.approx(bright.eosin_od, abs=0.01)


def test_split_is_that_of_a_least_squares_fit_where_there_are_only_the_two_stains():
    colours = rgb_from_hed[:2] / np.linalg.norm(rgb_from_hed[:2], axis=1, keepdims=True)
    density = 0.2 * colours[0] + 0.5 * colours[1]
    second = np.linalg.lstsq(colours.T, density, rcond=None)[0]
    np.testing.assert_allclose(separate_stains(density), second, atol=1e-12)


def test_ink_and_areas_never_scanned_are_not_glass():
    tissue = painted(PINK)
    pixels, ink = tissue.overview.pixels, tissue.ink
    pixels[150:, :] = 255
    pixels[120:150, :] = 0
    pixels[100:120, :], ink[100:120, :] = (20, 30, 90), True
    assert measure_stain(tissue).glass_brightness == pytest.approx(244 / 255)


def test_clipped_glass_is_white():
    assert measure_stain(painted(PINK, glass=(255, 255, 255))).glass_brightness == 1.0


def test_scan_full_of_tissue_has_no_glass_to_measure_and_is_compared_with_white():
    tissue = painted((255, 128, 255))
    full = np.ones_like(tissue.mask)
    tissue.overview.pixels[:] = (255, 128, 255)
    found = measure_stain(replace(tissue, mask=full))
    assert found.glass_brightness is None
    haematoxylin, eosin = separate_stains(np.log10(255 / np.array([255.0, 128.0, 255.0])))
    assert (found.haematoxylin_od, found.eosin_od) == pytest.approx((haematoxylin, eosin), abs=1e-6)


def test_large_overview_gives_the_numbers_of_a_small_one():
    small, large = measure_stain(stained(0.3, 0.2)), measure_stain(stained(0.3, 0.2, side=2000))
    assert asdict(large) == pytest.approx(asdict(small), abs=1e-6)


def test_speck_that_the_lattice_misses_is_measured_all_the_same():
    tissue = painted(GLASS, side=2000)
    mask = np.zeros_like(tissue.mask)
    mask[1, 1] = True
    tissue.overview.pixels[1, 1] = PINK
    assert measure_stain(replace(tissue, mask=mask)).saturation == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "mpp"),
    [("CMU-1-Small-Region.svs", None), ("TCGA-CR-7395-01A-01-TS1.svs", 0.5), ("gallery06_overview.tif", 4.0)],
)
def test_real_slides_have_both_stains_on_bright_glass(shared, name, mpp):
    with open_isolated(shared / "slides" / name, assume_mpp=mpp) as slide:
        found = measure_stain(find_tissue(slide))
    assert 0.85 < found.glass_brightness < 1
    assert 0.4 < found.tissue_brightness < found.glass_brightness
    assert 0.05 < found.haematoxylin_od < 0.6
    assert 0.05 < found.eosin_od < 0.6
