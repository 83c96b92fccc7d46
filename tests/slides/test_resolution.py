"""What µm/px a slide has, who said so, and which level is read."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from s4mil_monai.errors import TooCoarseError, UnknownResolutionError, UnreadableSlideError
from s4mil_monai.geometry import Resolution
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.slides.reader import open_slide
from s4mil_monai.slides.resolution import plan_reading

PICTURE = np.full((600, 800, 3), 200, np.uint8)


def write_tiff(path, *, description=None, resolution=None, unit=None):
    tags = {} if resolution is None else {"resolution": resolution, "resolutionunit": unit}
    tifffile.imwrite(
        path, PICTURE, tile=(256, 256), photometric="rgb", description=description, metadata=None, **tags
    )
    return path


def resolution_of(path, **options) -> Resolution | None:
    with open_slide(path, **options) as slide:
        return slide.resolution


def test_override_wins_over_the_file(tissue_slide):
    assert resolution_of(tissue_slide, assume_mpp=0.25) == Resolution(0.25, "override")


def test_tiff_tags_with_a_real_unit_count(tmp_path):
    assert resolution_of(write_tiff(tmp_path / "cm.tif", resolution=(20000, 20000), unit=3)) == Resolution(
        0.5, "tiff"
    )
    assert resolution_of(write_tiff(tmp_path / "in.tif", resolution=(50800, 50800), unit=2)) == Resolution(
        0.5, "tiff"
    )


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"resolution": (20000, 20000), "unit": 1},  # no unit
        {"resolution": (72, 72), "unit": 2},  # a printer's default
        {"resolution": (300, 300), "unit": 2},
    ],
    ids=["no tags", "no unit", "72 dpi", "300 dpi"],
)
def test_without_a_real_resolution_there_is_none(tmp_path, tags):
    assert resolution_of(write_tiff(tmp_path / "s.tif", **tags)) is None


def test_vendor_description_wins_over_tiff_tags(tmp_path):
    path = write_tiff(
        tmp_path / "s.tif", description="Scanner|AppMag = 40|MPP = 0.2527|", resolution=(20000, 20000), unit=3
    )
    assert resolution_of(path, backends=["tifffile"]) == Resolution(0.2527, "vendor:aperio")


def test_ome_description_is_read(tmp_path):
    text = '<OME><Image><Pixels PhysicalSizeX="0.25" PhysicalSizeXUnit="µm" PhysicalSizeY="0.25"/></Image></OME>'
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, PICTURE, tile=(256, 256), photometric="rgb", description=text.encode(), metadata=None)
    assert resolution_of(path, backends=["tifffile"]) == Resolution(0.25, "vendor:ome")


def test_pixels_that_are_not_square_are_refused(tmp_path):
    path = write_tiff(tmp_path / "s.tif", resolution=(20000, 10000), unit=3)
    with pytest.raises(UnreadableSlideError, match=r"not square \(0.5 by 1 µm, from tiff\)"):
        open_slide(path)


@pytest.mark.parametrize("assume_mpp", [0, -1, float("nan"), float("inf")])
def test_override_that_is_no_resolution_is_refused(tissue_slide, assume_mpp):
    with pytest.raises(ValueError, match="positive"):
        open_slide(tissue_slide, assume_mpp=assume_mpp)


def test_unknown_resolution_is_refused_with_the_setting_to_fill_in(tmp_path):
    with (
        open_slide(write_tiff(tmp_path / "s.tif")) as slide,
        pytest.raises(UnknownResolutionError, match="assume_mpp"),
    ):
        plan_reading(slide, mpp=0.5, patch_side_px=256)


def plan(tmp_path, *, mpp0, wanted, levels=3, shrink=2.0):
    path = write_pyramid(PICTURE, tmp_path / "s.tif", mpp=mpp0, levels=levels, shrink=shrink)
    with open_slide(path) as slide:
        return plan_reading(slide, mpp=wanted, patch_side_px=256)


def test_level_of_the_wanted_resolution_is_read_as_it_is(tmp_path):
    found = plan(tmp_path, mpp0=0.25, wanted=0.5)
    assert (found.level, found.read_side_px, found.side_px0, found.mpp) == (1, 256, 512.0, 0.5)


def test_nearest_finer_level_is_read_and_resampled(tmp_path):
    found = plan(tmp_path, mpp0=0.2, wanted=0.5)
    # 0.5 / 0.4 = 1.25 pixels of level 1 for each wanted one: 320 px
    assert (found.level, found.read_side_px, found.side_px0) == (1, 320, 640.0)
    assert found.mpp == pytest.approx(0.5)
    assert found.note is None


def test_slightly_coarser_scan_is_upsampled_with_a_note(tmp_path):
    found = plan(tmp_path, mpp0=0.586, wanted=0.5)
    assert (found.level, found.read_side_px) == (0, 218)  # 256 x 0.5 / 0.586 = 218.4
    assert found.note == "upsampled from 0.586 to 0.5 µm/px"


def test_up_to_25_percent_coarser_is_read_and_beyond_is_refused_with_both_resolutions(tmp_path):
    assert plan(tmp_path, mpp0=0.62, wanted=0.5).note is not None
    with pytest.raises(TooCoarseError, match=r"0\.63 µm/px, the model wants 0\.5 µm/px") as refused:
        plan(tmp_path, mpp0=0.63, wanted=0.5)
    assert (refused.value.found_mpp, refused.value.wanted_mpp) == (0.63, 0.5)


def test_real_slides_have_the_resolution_their_vendors_wrote(shared):
    slides = shared / "slides"
    assert resolution_of(slides / "CMU-1-Small-Region.svs") == Resolution(0.499, "vendor:aperio")
    assert resolution_of(slides / "gallery19_20x.tif") == Resolution(0.586, "tiff")
    assert resolution_of(slides / "TCGA-CR-7395-01A-01-TS1.svs") is None
