"""Pooled models: hand-calculated logits, blind to order, and a forest that comes back from its file unchanged."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import skops.io
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer

from s4mil_monai.errors import WeightsError
from s4mil_monai.models.pooled import PooledForest, PooledModel, load_forest, pool_bags

POOLINGS = ("mean", "max")


def tiny(pooling: str, classes: int = 2) -> PooledModel:
    torch.manual_seed(0)
    return PooledModel(10, classes=classes, pooling=pooling).eval()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("classes", "parameters"), [(2, 1_025), (3, 3_075)])
def test_two_classes_share_one_unit_and_more_have_their_own(pooling, classes, parameters):
    model = PooledModel(1024, classes=classes, pooling=pooling)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(2, 5, 1024)).logits.shape == (2, classes)


@pytest.mark.parametrize(
    ("pooling", "log_odds"),
    [
        ("mean", 1.5),  # mean (2, 3): 0.5 + 2 * 2 - 1 * 3
        ("max", 0.5),  # maximum (3, 6): 0.5 + 2 * 3 - 1 * 6
    ],
)
def test_logits_are_zero_and_the_log_odds_calculated_by_hand(pooling, log_odds):
    model = PooledModel(2, pooling=pooling)
    model.load_state_dict({"head.weight": torch.tensor([[2.0, -1.0]]), "head.bias": torch.tensor([0.5])})
    logits = model(torch.tensor([[[1.0, 0.0], [3.0, 6.0]]])).logits
    torch.testing.assert_close(logits, torch.tensor([[0.0, log_odds]]))
    torch.testing.assert_close(logits.softmax(1)[0, 1].item(), 1 / (1 + math.exp(-log_odds)))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_parameter_learns(pooling):
    model = tiny(pooling).train()
    model(torch.randn(2, 30, 10)).logits.logsumexp(1).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).all(), name


@pytest.mark.parametrize("model", [PooledModel, PooledForest])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"pooling": "median"}, "mean, max, got 'median'"), ({"classes": 1}, "2 or more, got 1")],
)
def test_settings_that_make_no_model_are_refused(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        model(**wrong)


def draw_bags(count: int = 24, classes: int = 2) -> tuple[list[np.ndarray], np.ndarray]:
    """Whole numbers, so that sums are exact in any order; channel 0 of every patch says the class."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % classes
    bags = [generator.integers(-4, 5, (generator.integers(3, 20), 6)).astype(np.float32) for _ in labels]
    for bag, label in zip(bags, labels, strict=True):
        bag[:, 0] = 10 * label
    return bags, labels


@pytest.fixture(scope="module")
def forest() -> PooledForest:
    return PooledForest(trees=20).fit(*draw_bags())


def test_pooled_vectors_are_those_calculated_by_hand():
    bags = [np.array([[1, 0], [3, 6]], np.float32), np.array([[-2, -4]], np.float32)]
    assert pool_bags(bags, "mean").tolist() == [[2, 3], [-2, -4]]
    assert pool_bags(bags, "max").tolist() == [[3, 6], [-2, -4]]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_forest_learns_what_the_pooled_vector_tells(pooling):
    bags, labels = draw_bags(classes=3)
    probabilities = PooledForest(pooling=pooling, classes=3, trees=20).fit(bags, labels).predict_proba(bags)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (probabilities.argmax(axis=1) == labels).all()


def test_order_of_the_patches_does_not_change_what_the_forest_predicts(forest):
    bags, _ = draw_bags()
    assert (forest.predict_proba([bag[::-1] for bag in bags]) == forest.predict_proba(bags)).all()


def test_forest_has_200_trees_and_the_same_seed_grows_the_same_ones():
    bags, labels = draw_bags()
    first, second, other = (PooledForest(seed=seed).fit(bags, labels) for seed in (3, 3, 4))
    assert len(first.forest.estimators_) == 200
    new = [bag + 3 for bag in bags]
    assert (first.predict_proba(new) == second.predict_proba(new)).all()
    assert (first.predict_proba(new) != other.predict_proba(new)).any()


def test_class_that_training_never_saw_has_probability_zero_in_its_own_column():
    bags, labels = draw_bags()
    probabilities = PooledForest(classes=4, trees=5).fit(bags, labels * 2).predict_proba(bags)
    assert probabilities.shape == (24, 4)
    assert (probabilities[:, [1, 3]] == 0).all()


@pytest.mark.parametrize(
    ("bags", "labels", "message"),
    [
        ([], [], "got none"),
        (
            [np.zeros((2, 6)), np.zeros((0, 6))],
            [0, 1],
            r"bag 1: wanted features \(L, 6\) with L > 0, got \(0, 6\)",
        ),
        ([np.zeros((2, 6)), np.zeros((2, 5))], [0, 1], r"bag 1: .* got \(2, 5\)"),
        ([np.zeros(6)], [0], r"bag 0: .* got \(6,\)"),
        ([np.full((2, 6), np.inf)], [0], "bag 0: features are not finite"),
        ([np.zeros((2, 6))], [2], "class numbers 0 to 1, got 2"),
        ([np.zeros((2, 6))], [0.5], "class numbers 0 to 1, got 0.5"),
    ],
    ids=["none", "empty", "width", "rank", "infinite", "label", "fraction"],
)
def test_bags_a_forest_cannot_learn_from_are_refused(bags, labels, message):
    with pytest.raises(ValueError, match=message):
        PooledForest().fit(bags, labels)


def test_forest_that_learned_nothing_neither_predicts_nor_is_saved(tmp_path):
    with pytest.raises(ValueError, match="not fitted"):
        PooledForest().predict_proba(draw_bags()[0])
    with pytest.raises(ValueError, match="not fitted"):
        PooledForest().save(tmp_path / "forest.skops")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_saved_forest_comes_back_with_identical_predictions(tmp_path, pooling):
    bags, labels = draw_bags(classes=3)
    before = PooledForest(pooling=pooling, classes=3, trees=20).fit(bags, labels)
    before.save(tmp_path / "forest.skops")
    after = load_forest(tmp_path / "forest.skops")
    new = [bag + 3 for bag in bags]
    assert (after.pooling, after.classes) == (pooling, 3)
    assert (after.predict_proba(new) == before.predict_proba(new)).all()


def test_forest_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"forest\.skops: there is no such forest file"):
        load_forest(tmp_path / "forest.skops")


@pytest.mark.parametrize("damage", ["empty", "start only", "end lost", "one bit"])
def test_damaged_forest_file_is_refused(tmp_path, forest, damage):
    path = tmp_path / "forest.skops"
    forest.save(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    parts = {"empty": b"", "start only": whole[:middle], "end lost": whole[:-10], "one bit": flipped}
    path.write_bytes(parts[damage])
    with pytest.raises(WeightsError, match=r"forest\.skops: damaged"):
        load_forest(path)


def make_file(path: str) -> str:
    """What a hostile file would call."""
    with open(path, "w") as file:
        file.write("ran")
    return path


class Hostile:
    """Calls :func:`make_file` where it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return make_file, (self.path,)


def test_pickle_is_refused_and_its_code_does_not_run(tmp_path):
    path, trace = tmp_path / "forest.skops", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Hostile(str(trace))))
    with pytest.raises(WeightsError, match="no forest saved with skops"):
        load_forest(path)
    assert not trace.exists()


def test_file_with_a_function_of_its_own_is_refused_by_name(tmp_path, forest):
    path = tmp_path / "forest.skops"
    content = {"pooling": "mean", "classes": 2, "forest": forest.forest, "more": FunctionTransformer(make_file)}
    skops.io.dump(content, path)
    with pytest.raises(WeightsError, match=r"holds .*make_file, which no forest does; it was not loaded"):
        load_forest(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no fitted forest"),
        ({"pooling": "mean", "classes": 2}, "holds no fitted forest"),
        ({"pooling": "median", "classes": 2, "forest": None}, "holds no fitted forest"),
        ({"pooling": "mean", "classes": 2, "forest": RandomForestClassifier()}, "holds no fitted forest"),
        (
            {"pooling": "mean", "classes": 2, "forest": LogisticRegression().fit([[0], [1]], [0, 1])},
            "holds a LogisticRegression, wanted a RandomForestClassifier",
        ),
    ],
    ids=["list", "lacks the forest", "pooling", "not fitted", "another model"],
)
def test_file_that_holds_something_else_is_refused(tmp_path, content, message):
    skops.io.dump(content, tmp_path / "forest.skops")
    with pytest.raises(WeightsError, match=message):
        load_forest(tmp_path / "forest.skops")
