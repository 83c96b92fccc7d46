"""Pyramids whose levels contradict each other."""

from __future__ import annotations

import numpy as np
import tifffile

from s4mil_monai.slides.reader import open_slide
from tests.conftest import tissue_picture


def write_levels(path, pictures):
    with tifffile.TiffWriter(path) as file:
        for level, picture in enumerate(pictures):
            file.write(
                picture, subfiletype=int(level > 0), tile=(256, 256), photometric="rgb", compression="deflate"
            )


def test_level_with_swapped_colours_is_dropped_and_the_others_stay(tmp_path):
    fine = tissue_picture()
    write_levels(tmp_path / "s.tif", [fine, 255 - fine[::2, ::2], fine[::4, ::4]])
    with open_slide(tmp_path / "s.tif") as slide:
        assert [level.size_px for level in slide.levels] == [(1536, 1280), (384, 320)]
        assert len(slide.notes) == 1
        assert slide.notes[0].startswith("level 1 is not used: its colours differ by")
        region = slide.read_region(top_left_px0=(0, 0), size_px=(384, 320), level=1)
    np.testing.assert_array_equal(region, fine[::4, ::4])


def test_sound_pyramid_keeps_every_level_and_has_no_note(tissue_slide):
    with open_slide(tissue_slide) as slide:
        assert len(slide.levels) == 3
        assert slide.notes == ()
