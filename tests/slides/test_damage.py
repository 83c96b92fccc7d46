"""Patches compared with the overview of their slide."""

from __future__ import annotations

import numpy as np
import pytest

from s4mil_monai.geometry import ReadPlan
from s4mil_monai.slides.damage import COLOUR_TOLERANCE, ColourCheck
from s4mil_monai.slides.grid import PatchGrid
from s4mil_monai.slides.overview import Overview

SIDE = 128


def make_check(*, overview_level: int = 1) -> tuple[ColourCheck, np.ndarray, np.ndarray]:
    """A slide of 300 x 260 px whose colour is a slow wave, its overview at 1:4, a grid that reaches outside."""
    y, x = np.mgrid[:260, :300] + 0.5
    slide = np.stack((127 + 100 * np.sin(x / 60), 127 + 100 * np.cos(y / 50), 200 - x / 3), axis=-1)
    small = slide.reshape(65, 4, 75, 4, 3).mean(axis=(1, 3))
    corners = np.array([(x, y) for y in (0, 128, 256) for x in (0, 128, 256)], np.int64)
    plan = ReadPlan(level=0, read_side_px=SIDE, patch_side_px=SIDE, side_px0=float(SIDE), mpp=0.5)
    grid = PatchGrid(corners, np.ones(len(corners), np.float32), plan, "row_major")
    padded = np.full((384, 384, 3), 255.0)
    padded[:260, :300] = slide
    blocks = np.stack([padded[y : y + SIDE, x : x + SIDE] for x, y in corners])
    colours = blocks.reshape(len(corners), 4, 32, 4, 32, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    overview = Overview(np.rint(small).astype(np.uint8), (4.0, 4.0), level=overview_level)
    return ColourCheck(overview, grid), colours.astype(np.float32), corners


def test_sound_patches_agree_within_rounding_also_over_the_edge():
    check, colours, _ = make_check()
    assert check.differences(0, colours).max() < 1.0
    assert not check.disagreeing(0, colours).any()


def test_one_block_of_other_colour_is_enough():
    check, colours, _ = make_check()
    colours[4, 1, 2, 3] += COLOUR_TOLERANCE + 2
    assert np.flatnonzero(check.disagreeing(0, colours)).tolist() == [4]


def test_a_batch_is_compared_with_its_own_place():
    check, colours, _ = make_check()
    assert check.differences(3, colours[3:5]).max() < 1.0
    assert check.differences(2, colours[3:5]).max() > 1.0


@pytest.mark.parametrize(("level", "possible"), [(0, False), (1, True)])
def test_nothing_can_be_told_where_both_come_from_the_same_level(level, possible):
    assert make_check(overview_level=level)[0].possible is possible
