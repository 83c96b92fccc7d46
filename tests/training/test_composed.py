"""Composed bags: what is in them is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mil_monai.errors import TableError
from s4mil_monai.training.composed import BagRecipe, TileFeatures, compose_bags, compose_split, split_tiles

KINDS = ("AC", "H", "S", "T", "V")


def tiles(per_kind: int = 20) -> TileFeatures:
    """One feature, the tile's number; its kind is number // per_kind."""
    labels = np.repeat(KINDS, per_kind)
    return TileFeatures(np.arange(len(labels), dtype=np.float32)[:, None], labels)


def kinds(bag) -> np.ndarray:
    return tiles().labels[bag.features[:, 0].astype(int)]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_positive_bags_have_one_contiguous_run_of_the_finding_and_negative_ones_none(seed):
    negative, positive = compose_bags(tiles(), BagRecipe(), count=2, seed=seed)
    assert (negative.label, positive.label) == (0, 1)
    assert "AC" not in kinds(negative)
    where = np.flatnonzero(kinds(positive) == "AC")
    assert (np.diff(where) == 1).all()
    assert 0.01 < len(where) / len(positive.features) < 0.22
    np.testing.assert_array_equal(positive.patch_labels, kinds(positive) == "AC")


def test_distractors_are_in_bags_of_both_classes_alike():
    bags = compose_bags(tiles(), BagRecipe(), count=400, seed=0)
    share = [np.mean([np.isin(kinds(b), ("S", "T", "V")).any() for b in bags if b.label == y]) for y in (0, 1)]
    assert share == pytest.approx([0.7, 0.7], abs=0.08)  # 200 draws each: three deviations are 0.1


def test_no_tile_is_in_two_parts_and_each_class_is_split_alike():
    parts = split_tiles(tiles(), shares=(0.5, 0.2, 0.3), seed=3)
    drawn = [set(part.features[:, 0].tolist()) for part in parts]
    assert [len(part) for part in drawn] == [50, 20, 30]
    assert not drawn[0] & drawn[1]
    assert not drawn[0] & drawn[2]
    assert not drawn[1] & drawn[2]
    for part, count in zip(parts, (10, 4, 6), strict=True):
        assert [int((part.labels == kind).sum()) for kind in KINDS] == [count] * 5


def test_same_seed_gives_the_same_bags(tmp_path):
    np.savez(tmp_path / "tiles.npz", features=tiles().features, labels=tiles().labels)
    first, second = (compose_split(tmp_path / "tiles.npz", train=4, validation=2, test=2, seed=5) for _ in "ab")
    for a, b in zip(first.train, second.train, strict=True):
        np.testing.assert_array_equal(a.features, b.features)


def test_file_without_tiles_is_refused(tmp_path):
    np.savez(tmp_path / "tiles.npz", features=np.zeros(3))
    with pytest.raises(TableError, match="is no file of tile features"):
        compose_split(tmp_path / "tiles.npz")
