"""benchmarks/composed_colon.py: which bags it measures on, and how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import composed_colon as benchmark
from s4mil_monai.training.composed import BagRecipe, compose_bags, compose_split
from s4mil_monai.training.datasets import DatasetSettings, read_dataset
from tests.training.test_composed import stained, tiles


@pytest.fixture
def settings(tmp_path) -> DatasetSettings:
    tile = stained()
    np.savez(tmp_path / "tiles.npz", features=tile.features, labels=tile.labels, colours=tile.colours)
    declared = Path(__file__).resolve().parents[1] / "configs" / "datasets" / "composed_colon_hard.yaml"
    return read_dataset(declared, data_folder=tmp_path, bags=(4, 4, 6), seed=3)


def test_bags_are_the_experiments_own_and_those_of_a_resample_are_of_its_test_tiles_drawn_again(settings):
    split = benchmark.load_split(settings)
    trained = compose_split(
        settings.place(settings.feature_folder), train=4, validation=4, test=6, seed=3, apart="stain",
        recipe=settings.recipe,
    )  # fmt: skip
    for ours, theirs in ((split.train, trained.train), (split.test, trained.test)):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.features, b.features)
    tested = benchmark.tiles_of(split.test)
    drawn = benchmark.compose_anew(settings, tested, 1)
    assert [len(bag.drawn) for bag in drawn] != [len(bag.drawn) for bag in split.test]
    assert set(drawn[0].tiles.features[:, 0]) <= set(tested.features[:, 0])  # numbers of stains
    assert not np.array_equal(drawn[0].tiles.features, tested.features)


def test_what_was_measured_is_not_measured_again_and_a_new_model_is_added(settings, tmp_path):
    test = benchmark.composed(benchmark.load_split(settings).test)
    asked = []

    def guesses(name):
        def predict(features):
            asked.append(name)
            return 0.5, None

        return {name: predict}

    file = tmp_path / "seed3_000.csv"
    benchmark.measure_resample(settings, test, guesses("a"), 0, file)
    rows = benchmark.measure_resample(settings, test, guesses("a") | guesses("b"), 0, file)
    assert asked == ["a"] * 6 + ["b"] * 6
    assert list(rows["model"]) == ["a", "b"]
    assert list(rows["auroc"]) == [0.5, 0.5]


def test_model_that_knows_the_finding_has_an_auroc_of_1_and_one_that_knows_nothing_a_half():
    def knows(features):
        is_finding = (features[:, 0] < 20).astype(float)  # the number of the tile; those of the finding come first
        return float(is_finding.any()), is_finding

    coloured = replace(tiles(), colours=np.zeros((100, 6), np.float32))
    bags = compose_bags(coloured, BagRecipe(), count=6, seed=0)
    found = benchmark.measure({"knows": knows, "guesses": lambda features: (0.5, None)}, bags).set_index("model")
    assert list(found.loc["knows"]) == [1, 1, 1]
    assert list(found.loc["guesses", ["auroc", "accuracy"]]) == [0.5, 0.5]
    assert np.isnan(found.loc["guesses", "patch_auroc"])


def test_interval_is_of_the_mean_over_seeds_from_the_variance_within_each():
    # Variances of the two resamples of each seed: 0.045 and 0.005; mean 0.025, halved 0.0125, 1.96 roots 0.219.
    index = pd.MultiIndex.from_product([(0, 1), (0, 1, 2)], names=["seed", "resample"])
    values = pd.Series([0.9, 0.7, 1.0, 0.8, 0.9, 0.8], index)
    assert benchmark.interval(values) == "0.850 ± 0.219"
    assert benchmark.interval(values - 0.5, signed=True) == "+0.350 ± 0.219"
