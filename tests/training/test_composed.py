"""Composed bags: what is in them is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from s4mil_monai.errors import TableError
from s4mil_monai.training.bags import as_items
from s4mil_monai.training.composed import (
    BagRecipe,
    TileFeatures,
    compose_bags,
    compose_split,
    split_stains,
    split_tiles,
)

KINDS = ("AC", "H", "S", "T", "V")
ADENOMA = ("S", "T", "V")


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


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_adenoma_is_one_run_of_one_kind_that_only_the_finding_may_cut(seed):
    recipe = BagRecipe(distractor_share=1.0)
    for bag in compose_bags(tiles(), recipe, count=2, seed=seed):
        adenoma = np.isin(kinds(bag), ADENOMA)
        assert len(set(kinds(bag)[adenoma])) <= 1
        between = slice(*np.flatnonzero(adenoma)[[0, -1]]) if adenoma.any() else slice(0)
        assert set(kinds(bag)[between]) <= {"AC", *kinds(bag)[adenoma]}


def test_lengths_are_log_uniform_from_100_to_5000():
    lengths = [len(bag.drawn) for bag in compose_bags(tiles(), BagRecipe(), count=2000, seed=0)]
    assert 100 <= min(lengths) < 110
    assert 4800 < max(lengths) <= 5000
    assert np.mean(np.array(lengths) < np.sqrt(100 * 5000)) == pytest.approx(0.5, abs=0.04)  # 707 is half way


def test_distractors_are_in_bags_of_both_classes_alike():
    bags = compose_bags(tiles(), BagRecipe(), count=400, seed=0)
    share = [np.mean([np.isin(kinds(b), ADENOMA).any() for b in bags if b.label == y]) for y in (0, 1)]
    assert share == pytest.approx([0.7, 0.7], abs=0.08)  # 200 draws each: three deviations are 0.1


def test_blended_finding_lies_between_its_tile_and_a_healthy_one_and_all_else_is_left_alone():
    # A tile of the finding has feature 1, every other 0: a patch's feature is the share of the finding in it.
    one_hot = TileFeatures((tiles().labels == "AC").astype(np.float32)[:, None], tiles().labels)
    recipe = BagRecipe(finding_share=(0.2, 1.0))
    bags = compose_bags(one_hot, recipe, count=40, seed=0)
    inside = np.concatenate([bag.features[bag.patch_labels == 1, 0] for bag in bags])
    outside = np.concatenate([bag.features[bag.patch_labels == 0, 0] for bag in bags])
    assert (outside == 0).all()
    assert 0.2 <= inside.min() < 0.21
    assert 0.99 < inside.max() <= 1
    assert inside.mean() == pytest.approx(0.6, abs=0.02)  # of a uniform from 0.2 to 1


def test_noise_has_the_wanted_deviation_on_every_patch_and_is_the_same_each_time():
    clean, noisy = (compose_bags(tiles(), BagRecipe(noise=noise), count=10, seed=0) for noise in (0.0, 0.5))
    added = np.concatenate([b.features - a.features for a, b in zip(clean, noisy, strict=True)])
    assert added.std() == pytest.approx(0.5 * tiles().features.std(), rel=0.05)
    np.testing.assert_array_equal(noisy[0].features, noisy[0].features)
    assert not np.array_equal(noisy[0].features[:50] - clean[0].features[:50], added[-50:])


def test_training_gets_the_features_and_labels_that_a_bag_shows():
    bag = compose_bags(tiles(), BagRecipe(noise=0.1), count=2, seed=0)[1]
    item = as_items([bag])[0]
    np.testing.assert_array_equal(item["image"].numpy().T, bag.features)
    np.testing.assert_array_equal(item["patch_label"], bag.patch_labels)
    assert bag.length == bag.loaded().length == len(bag.patch_labels)
    assert (int(item["label"]), item["slide"]) == (1, bag.slide)


def test_no_tile_is_in_two_parts_and_each_class_is_split_alike():
    parts = split_tiles(tiles(), shares=(0.5, 0.2, 0.3), seed=3)
    drawn = [set(part.features[:, 0].tolist()) for part in parts]
    assert [len(part) for part in drawn] == [50, 20, 30]
    assert not drawn[0] & drawn[1]
    assert not drawn[0] & drawn[2]
    assert not drawn[1] & drawn[2]
    for part, count in zip(parts, (10, 4, 6), strict=True):
        assert [int((part.labels == kind).sum()) for kind in KINDS] == [count] * 5


def stained() -> TileFeatures:
    """500 tiles of 20 stains, each with all kinds; the feature is the stain's number."""
    generator = np.random.default_rng(0)
    stain = np.tile(np.arange(20), 25)
    colours = generator.normal(size=(20, 6))[stain] + 0.01 * generator.normal(size=(500, 6))
    return TileFeatures(stain.astype(np.float32)[:, None], np.repeat(KINDS, 100), colours.astype(np.float32))


def test_tiles_of_one_stain_stay_in_one_part_and_the_parts_are_about_5_to_2_to_3():
    parts = split_stains(stained(), seed=1)
    stains = [set(part.features[:, 0].tolist()) for part in parts]
    assert [len(found) for found in stains] == [10, 4, 6]
    assert len(set().union(*stains)) == 20
    assert [len(part.labels) for part in parts] == [250, 100, 150]


def test_stains_cannot_be_kept_apart_without_colours(tmp_path):
    np.savez(tmp_path / "tiles.npz", features=tiles().features, labels=tiles().labels)
    with pytest.raises(TableError, match="has no colours to keep like stains apart by"):
        compose_split(tmp_path / "tiles.npz", apart="stain")


def test_stain_that_alone_has_a_class_is_refused_rather_than_left_out_of_a_part(tmp_path):
    tile = stained()
    alone = np.where((tile.labels == "V")[:, None], 100 + 0.01 * tile.colours, tile.colours)
    np.savez(tmp_path / "tiles.npz", features=tile.features, labels=tile.labels, colours=alone)
    with pytest.raises(TableError, match="leaves a part without a class"):
        compose_split(tmp_path / "tiles.npz", apart="stain")


def test_bootstrap_draws_each_class_with_replacement_and_as_often_as_before():
    drawn = tiles().resample(np.random.default_rng(0))
    assert [int((drawn.labels == kind).sum()) for kind in KINDS] == [20] * 5
    np.testing.assert_array_equal(tiles().labels[drawn.features[:, 0].astype(int)], drawn.labels)
    assert 0.5 < len(np.unique(drawn.features)) / 100 < 0.75  # 1 - 1/e of the tiles is 0.63


def test_same_seed_gives_the_same_bags(tmp_path):
    np.savez(tmp_path / "tiles.npz", features=tiles().features, labels=tiles().labels)
    first, second = (compose_split(tmp_path / "tiles.npz", train=4, validation=2, test=2, seed=5) for _ in "ab")
    for a, b in zip(first.train, second.train, strict=True):
        np.testing.assert_array_equal(a.features, b.features)


def test_standardised_tiles_have_mean_0_and_deviation_1_where_they_are_trained_on(tmp_path):
    shifted = replace(tiles(), features=np.hstack([tiles().features, np.full((100, 1), 3, np.float32)]))
    np.savez(tmp_path / "tiles.npz", features=shifted.features, labels=shifted.labels)
    plain, split = (
        compose_split(tmp_path / "tiles.npz", train=2, validation=2, test=2, standardize=on)
        for on in (False, True)
    )
    known, numbers = split.train[0].tiles.features, plain.train[0].tiles.features[:, 0]
    np.testing.assert_allclose(known[:, 0].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(known[:, 0].std(), 1, atol=1e-6)
    assert (known[:, 1] == 0).all()
    wanted = (plain.test[0].tiles.features[:, 0] - numbers.mean()) / numbers.std()  # not by the test tiles' own
    np.testing.assert_allclose(split.test[0].tiles.features[:, 0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": (0, 10)}, "length is lowest and highest"),
        ({"run_share": (0.3, 0.2)}, "run_share is lowest and highest"),
        ({"finding_share": (0.2, 1.5)}, "finding_share is lowest and highest"),
        ({"lenght": (1, 2)}, "Extra inputs are not permitted"),
    ],
)
def test_recipe_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        BagRecipe(**wrong)


def test_file_without_tiles_is_refused(tmp_path):
    np.savez(tmp_path / "tiles.npz", features=np.zeros(3))
    with pytest.raises(TableError, match="is no file of tile features"):
        compose_split(tmp_path / "tiles.npz")
