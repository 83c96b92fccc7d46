"""Verdicts on slides whose faults are known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from s4mil_monai.errors import UnreadableSlideError
from s4mil_monai.result import QualityFinding, QualityRecord
from s4mil_monai.slides.grid import lay_grid
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.slides.quality import LEAST_SHARPNESS, combine, judge_quality, measure_sharpness
from s4mil_monai.slides.reader import open_slide
from s4mil_monai.slides.resolution import plan_reading
from s4mil_monai.slides.tissue import find_tissue
from tests.conftest import GLASS, PINK


def judge(path: Path, *, mpp: float = 1.0) -> QualityRecord:
    with open_slide(path) as slide:
        tissue = find_tissue(slide)
        return judge_quality(slide, tissue, lay_grid(tissue, plan_reading(slide, mpp=mpp, patch_side_px=256)))


@cache
def sharp_tissue() -> NDArray[np.float32]:
    """(1024, 1024, 3): nuclei on pink in 3 x 3 patches on glass, as sharp as pixels are; 0.59 mm² at 1 µm/px."""
    generator = np.random.default_rng(0)
    picture = np.full((1024, 1024, 3), GLASS, np.float32)
    nuclei = gaussian_filter(generator.normal(size=(768, 768)), 3) > 0.05
    texture = generator.normal(0, 6, (768, 768, 1))
    picture[:768, :768] = np.where(nuclei[..., None], (100, 60, 140), PINK) + texture
    return picture


def tissue_picture() -> NDArray[np.float32]:
    return sharp_tissue().copy()


def rounded(picture: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def write(picture, tmp_path: Path, *, mpp: float = 1.0, compression: str | None = "jpeg") -> Path:
    return write_pyramid(rounded(picture), tmp_path / "s.tif", mpp=mpp, compression=compression)


def codes(record: QualityRecord) -> list[tuple[str, str]]:
    return [(finding.code, finding.verdict) for finding in record.findings]


def test_sharp_clean_slide_passes(tmp_path):
    record = judge(write(tissue_picture(), tmp_path))
    assert (record.verdict, record.findings) == ("pass", ())
    assert record.measured["little_tissue"] == pytest.approx((768 * 1e-3) ** 2, rel=0.03)
    assert record.measured["blur"] == record.measured["ink"] == 0
    assert record.measured["light"] == pytest.approx(GLASS[0], abs=8)


@pytest.mark.parametrize("sigma_px", [2, 3, 8])
def test_slide_out_of_focus_is_rejected(tmp_path, sigma_px):
    record = judge(write(gaussian_filter(tissue_picture(), (sigma_px, sigma_px, 0)), tmp_path))
    assert ("blur", "reject") in codes(record)
    assert record.verdict == "reject"


def test_slide_half_out_of_focus_is_warned_of(tmp_path):
    picture = tissue_picture()
    picture[384:] = gaussian_filter(picture, (3, 3, 0))[384:]
    record = judge(write(picture, tmp_path))
    assert codes(record) == [("blur", "warn")]
    assert record.measured["blur"] == pytest.approx(1 / 3)  # the last of three rows; the middle one is half sharp
    assert "out of focus" in record.findings[0].text


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "gallery19_20x.tif"])
def test_real_slide_is_sharp_until_it_is_blurred(shared, tmp_path, name):
    with open_slide(shared / "slides" / name) as slide:
        mpp = slide.mpp
        region = slide.read_region(top_left_px0=(400, 900), size_px=(1024, 1024))
    verdicts = []
    for sigma_px in (0, 2, 3):
        blurred = rounded(gaussian_filter(region.astype(float), (sigma_px, sigma_px, 0)))
        record = judge(write_pyramid(blurred, tmp_path / "s.tif", mpp=mpp), mpp=0.5)
        verdicts.append(dict(codes(record)).get("blur"))
    assert verdicts == [None, "reject", "reject"]


def test_noise_of_the_scanner_does_not_make_a_blurred_patch_sharp():
    generator = np.random.default_rng(0)
    sharp = tissue_picture()[:256, :256]
    blurred = gaussian_filter(sharp, (3, 3, 0)) + generator.normal(0, 1, sharp.shape)
    assert sharpness(blurred) < LEAST_SHARPNESS < sharpness(sharp)


def test_sharpness_does_not_depend_on_contrast():
    patch = tissue_picture()[:256, :256]
    assert sharpness(255 - 0.6 * (255 - patch)) == pytest.approx(sharpness(patch), rel=0.05)


def sharpness(patch) -> float:
    value = measure_sharpness(rounded(patch))
    assert value is not None
    return value


def test_patch_without_contrast_has_no_sharpness():
    assert measure_sharpness(np.full((256, 256, 3), PINK, np.uint8)) is None


@pytest.mark.parametrize(("rows", "verdict"), [((300,), "warn"), ((40, 300, 600), "reject")])
def test_pen_over_patches_is_reported(tmp_path, rows, verdict):
    glass = np.full((1024, 1024, 3), GLASS, np.float32)
    picture = np.concatenate((tissue_picture(), glass), axis=1)
    for row in rows:
        picture[row : row + 100] *= (0.15, 0.28, 0.68)  # a blue line from edge to edge
    record = judge(write(picture, tmp_path))
    assert ("ink", verdict) in codes(record)
    assert record.measured["ink"] == pytest.approx(len(rows) / 3)


def test_share_of_inked_patches_is_counted(tissue_slide):
    with open_slide(tissue_slide) as slide:
        tissue = find_tissue(slide)
        grid = lay_grid(tissue, plan_reading(slide, mpp=0.5, patch_side_px=256))
        ink = np.zeros_like(tissue.mask)
        ink[20:24] = True  # across the first row of 3 rows of patches
        record = judge_quality(slide, replace(tissue, ink=ink), grid)
    assert record.measured["ink"] == pytest.approx(1 / 3)


def test_little_tissue_is_warned_of(tissue_slide):
    record = judge(tissue_slide, mpp=0.5)
    # 1024 x 768 pixels of (0.5 µm)² = 0.197 mm², 12 patches
    assert ("little_tissue", "warn") in codes(record)
    finding = next(finding for finding in record.findings if finding.code == "little_tissue")
    assert finding.value == pytest.approx(0.197, rel=0.03)
    assert finding.text == "only 0.2 mm² of tissue (12 patches)"


def test_a_speck_of_tissue_is_rejected(tmp_path):
    picture = np.full((512, 512, 3), GLASS, np.float32)
    picture[256:, 256:] = tissue_picture()[:256, :256]
    # (128 µm)² = 0.016 mm²
    assert ("little_tissue", "reject") in codes(judge(write(picture, tmp_path, mpp=0.5), mpp=0.5))


@pytest.mark.parametrize(("light", "verdict"), [(0.4, "warn"), (0.2, "reject")])
def test_dark_scan_is_reported(tmp_path, light, verdict):
    assert ("saturation", verdict) in codes(judge(write(tissue_picture() * light, tmp_path)))


def test_overexposed_patches_are_reported(tmp_path):
    picture = tissue_picture()
    picture[np.arange(1024) % 3 > 0] = 255  # two of three rows, in gaps too narrow to be seen as glass
    record = judge(write(picture, tmp_path, compression=None))
    assert ("saturation", "warn") in codes(record)
    assert record.measured["saturation"] == pytest.approx(2 / 3, abs=0.02)


def test_enlarged_patches_are_warned_of(tmp_path):
    record = judge(write(tissue_picture(), tmp_path, mpp=1.2))
    assert codes(record) == [("too_coarse", "warn")]
    assert record.findings[0].text == "patches are upsampled from 1.2 to 1 µm/px"
    assert record.measured["too_coarse"] == pytest.approx(1.2, rel=0.01)


def test_patch_that_cannot_be_decoded_is_left_out(tmp_path, monkeypatch):
    path = write(tissue_picture(), tmp_path)
    with open_slide(path) as slide:
        tissue = find_tissue(slide)
        grid = lay_grid(tissue, plan_reading(slide, mpp=1.0, patch_side_px=256))
        whole = judge_quality(slide, tissue, grid)
        read = slide.read_region

        def read_upper_half(**place):
            if place["top_left_px0"][1] >= 512:
                raise UnreadableSlideError("s.tif", "damaged")
            return read(**place)

        monkeypatch.setattr(slide, "read_region", read_upper_half)
        part = judge_quality(slide, tissue, grid)
    assert part.verdict == whole.verdict == "pass"
    assert part.measured["sharpness"] != whole.measured["sharpness"]


def test_findings_are_added_and_the_worst_decides():
    record = QualityRecord(verdict="pass", measured={"blur": 0.1})
    warning = QualityFinding(code="damaged", verdict="warn", value=0.02, limit=0.01, text="2% are damaged")
    rejection = QualityFinding(code="ink", verdict="reject", value=0.6, limit=0.5, text="pen")
    warned = combine(record, warning)
    assert (warned.verdict, warned.findings) == ("warn", (warning,))
    assert warned.measured == {"blur": 0.1, "damaged": 0.02}
    assert combine(warned, rejection).verdict == "reject"
    assert combine(combine(record, rejection), warning).verdict == "reject"
    assert combine(record) == record
