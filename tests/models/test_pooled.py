"""Pooled models: hand-calculated logits, blind to order, and a forest that comes back from its file unchanged."""

from __future__ import annotations

import math
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skops.io
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer

from s4mil_monai.errors import WeightsError
from s4mil_monai.models.pooled import (
    TRUSTED_TYPES,
    PooledForest,
    PooledModel,
    fit_logistic,
    is_sealed,
    load_forest,
    pool_bags,
    seal,
)

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


@pytest.mark.parametrize("use", ["solve", "fit", "predict"])
def test_features_of_one_slide_are_let_go_before_the_next_are_read(use, forest):
    bags, labels = draw_bags()
    seen: list[weakref.ref] = []

    def read() -> Iterator[np.ndarray]:
        for number in range(len(bags)):
            features = bags[number].copy()
            seen.append(weakref.ref(features))
            yield features
            del features
            assert sum(bag() is not None for bag in seen) <= 1  # the one that was just pooled

    if use == "solve":
        fit_logistic(PooledModel(6), read(), labels)
    elif use == "fit":
        PooledForest(trees=2).fit(read(), labels)
    else:
        assert len(forest.predict_proba(read())) == len(bags)
    assert len(seen) == len(bags)


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


@pytest.mark.parametrize("damage", ["empty", "start only", "end lost", "longer"])
def test_damaged_forest_file_is_refused(tmp_path, forest, damage):
    path = tmp_path / "forest.skops"
    forest.save(path)
    whole = path.read_bytes()
    parts = {"empty": b"", "start only": whole[: len(whole) // 2], "end lost": whole[:-10], "longer": whole + b"0"}
    path.write_bytes(parts[damage])
    with pytest.raises(WeightsError, match=r"forest\.skops: damaged"):
        load_forest(path)


def test_forest_file_is_refused_whichever_byte_of_it_differs(tmp_path, forest):
    """Headers of the zip and its checksum too: the first and last 300 bytes and 300 between, all eight bits."""
    path = tmp_path / "forest.skops"
    forest.save(path)
    whole = path.read_bytes()
    assert is_sealed(whole)
    inside = np.linspace(300, len(whole) - 300, 300, dtype=int)
    for where in (*range(300), *inside.tolist(), *range(-300, 0)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[where] ^= 1 << bit
            assert not is_sealed(bytes(damaged)), (where, bit)
    path.write_bytes(bytes(damaged))
    with pytest.raises(WeightsError, match=r"forest\.skops: damaged"):
        load_forest(path)


def test_sealed_forest_file_is_still_a_skops_file(tmp_path, forest):
    forest.save(tmp_path / "forest.skops")
    content = skops.io.load(tmp_path / "forest.skops", trusted=list(TRUSTED_TYPES))
    assert content["classes"] == 2


def save_sealed(content: object, path: Path) -> None:
    """As someone who knows how files are sealed can write them."""
    path.write_bytes(seal(skops.io.dumps(content)))


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
    with pytest.raises(WeightsError, match="no forest saved with skops by s4mil_monai"):
        load_forest(path)
    assert not trace.exists()


def test_file_with_a_function_of_its_own_is_refused_by_name(tmp_path, forest):
    path = tmp_path / "forest.skops"
    content = {"pooling": "mean", "classes": 2, "forest": forest.forest, "more": FunctionTransformer(make_file)}
    save_sealed(content, path)
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
    save_sealed(content, tmp_path / "forest.skops")
    with pytest.raises(WeightsError, match=message):
        load_forest(tmp_path / "forest.skops")


def bags_of(classes: int) -> tuple[list[np.ndarray], list[int]]:
    generator = np.random.default_rng(0)
    labels = [i % classes for i in range(30)]
    return [generator.normal(label, 2, size=(5 + label, 4)).astype(np.float32) for label in labels], labels


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("classes", [2, 3])
def test_fitted_logistic_regression_is_where_its_penalised_loss_is_lowest(pooling, classes):
    bags, labels = bags_of(classes)
    model = PooledModel(4, classes=classes, pooling=pooling)
    fit_logistic(model, bags, labels)
    pooled = torch.from_numpy(pool_bags(bags, pooling))
    deviation = pooled.std(0, correction=0)

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        z = pooled @ weight.T + bias
        logits = torch.cat([torch.zeros_like(z), z], 1) if classes == 2 else z
        fit = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
        return fit + (weight * deviation).square().sum() / 2

    weight, bias = (p.detach().double().requires_grad_() for p in (model.head.weight, model.head.bias))
    loss(weight, bias).backward()
    assert weight.grad.abs().max() < 0.02  # of a loss whose gradient at no weights is above 1
    assert bias.grad.abs().max() < 0.02
    start = torch.zeros_like(weight).requires_grad_()
    loss(start, bias.detach()).backward()
    assert start.grad.abs().max() > 1


def test_logistic_regression_of_a_class_without_bags_is_refused():
    bags, labels = bags_of(2)
    with pytest.raises(ValueError, match="wanted bags of each class 0 to 2"):
        fit_logistic(PooledModel(4, classes=3), bags, labels)
