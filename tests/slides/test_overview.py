"""The whole slide as one small picture, from levels that may be damaged."""

from __future__ import annotations

import numpy as np
import pytest

from s4mil_monai.errors import UnreadableSlideError
from s4mil_monai.features.prepare import prepare_slide
from s4mil_monai.geometry import Level
from s4mil_monai.result import PatchSettings
from s4mil_monai.slides import overview
from s4mil_monai.slides.overview import read_overview
from s4mil_monai.slides.reader import open_slide


def damage(slide, monkeypatch, is_damaged):
    """Reads for which ``is_damaged(x, y, level)`` fail, as those of tiles that do not decode."""
    real = slide.read_inside

    def damaged(x, y, width, height, level):
        if is_damaged(x, y, level.number):
            raise RuntimeError("Huffman table corrupt")
        return real(x, y, width, height, level)

    monkeypatch.setattr(slide, "read_inside", damaged)


def test_block_that_is_damaged_on_a_level_is_read_from_the_next_finer_one(tissue_slide, monkeypatch):
    with open_slide(tissue_slide) as slide:
        sound = read_overview(slide, px0_per_px=4.0)
        damage(slide, monkeypatch, lambda x, y, level: level == 2)
        found = read_overview(slide, px0_per_px=4.0)
    assert (sound.level, found.unreadable) == (2, 0.0)
    assert np.abs(found.pixels.astype(int) - sound.pixels).mean() < 2.0


def test_what_no_level_holds_is_white_and_said(tissue_slide, monkeypatch):
    monkeypatch.setattr(overview, "BLOCK_PX", 16)
    with open_slide(tissue_slide) as slide:
        damage(slide, monkeypatch, lambda x, y, level: (x, y) == (0, 0))
        found = read_overview(slide, px0_per_px=4.0)
        assert (found.pixels[:16, :16] == 255).all()
        assert found.unreadable == pytest.approx(16 * 16 / (384 * 320))
        quality = prepare_slide(slide, PatchSettings()).quality
    assert quality.verdict == "warn"
    (finding,) = [finding for finding in quality.findings if finding.code == "damaged"]
    assert finding.text == "3.3% of the overview cannot be decoded; tissue that lies there is not seen"


def test_slide_of_which_too_much_cannot_be_decoded_is_refused(tissue_slide, monkeypatch):
    with open_slide(tissue_slide) as slide:
        damage(slide, monkeypatch, lambda x, y, level: True)
        with pytest.raises(
            UnreadableSlideError, match=r"tissue\.tif: 100% of the slide cannot be decoded, at most 5%"
        ):
            read_overview(slide, px0_per_px=4.0)


def test_giant_without_a_coarse_level_is_refused_before_anything_is_read(tissue_slide):
    with open_slide(tissue_slide) as slide:
        slide.levels = (Level((120_000, 90_000), 1.0, 0),)
        with pytest.raises(UnreadableSlideError, match="120,000 x 90,000 pixels, which would take hours"):
            read_overview(slide, px0_per_px=16.0)
