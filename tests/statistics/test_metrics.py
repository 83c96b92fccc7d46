"""Metrics against scikit-learn and by hand, one set of slides and many resamples at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from s4mil_monai.errors import UnknownNameError
from s4mil_monai.statistics.metrics import METRICS, NEED_EVERY_CLASS, find_metric, measure


def by_scikit_learn(metric: str, labels: np.ndarray, p: np.ndarray, weights: np.ndarray) -> float:
    classes = p.shape[1]
    predicted, hot = p.argmax(1), np.eye(classes)[labels]
    given_weights = {"sample_weight": weights}
    if metric == "accuracy":
        return sk.accuracy_score(labels, predicted, **given_weights)
    if metric == "balanced_accuracy":
        return sk.balanced_accuracy_score(labels, predicted, **given_weights)
    if metric == "f1":
        average = "binary" if classes == 2 else "macro"
        return sk.f1_score(labels, predicted, average=average, zero_division=0, **given_weights)
    if metric == "brier":
        return float(np.average(((p - hot) ** 2).sum(1) / (2 if classes == 2 else 1), weights=weights))
    score = {"auroc": sk.roc_auc_score, "auprc": sk.average_precision_score}[metric]
    if classes == 2:
        return score(labels, p[:, 1], **given_weights)
    return float(np.mean([score(hot[:, c], p[:, c], **given_weights) for c in range(classes)]))


def random_predictions(classes: int, *, seed: int, slides: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Rounded to whole twentieths, so that scores tie."""
    generator = np.random.default_rng(seed)
    labels = np.arange(slides) % classes
    p = generator.dirichlet(np.ones(classes), slides) + 0.3 * np.eye(classes)[labels]
    p = np.round(p / p.sum(1, keepdims=True) * 20) / 20
    p[:, 0] = 1 - p[:, 1:].sum(1)
    return labels, p.clip(0, 1)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"calibration_error"}))
def test_metric_agrees_with_scikit_learn_with_and_without_weights(metric, classes):
    for seed in range(5):
        labels, p = random_predictions(classes, seed=seed)
        ones = np.ones(len(labels))
        assert measure(metric, labels, p).value == pytest.approx(by_scikit_learn(metric, labels, p, ones))
        weights = np.random.default_rng(seed).integers(0, 4, (6, len(labels))).astype(float)
        wanted = [by_scikit_learn(metric, labels, p, row) for row in weights]
        np.testing.assert_allclose(find_metric(metric)(labels, p, weights), wanted, rtol=1e-12)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_weight_of_two_is_the_slide_twice(metric):
    labels, p = random_predictions(2, seed=3)
    weights = np.random.default_rng(0).integers(0, 3, len(labels))
    repeated = np.repeat(np.arange(len(labels)), weights)
    by_weight = find_metric(metric)(labels, p, weights[None].astype(float))[0]
    assert by_weight == pytest.approx(measure(metric, labels[repeated], p[repeated]).value)


def positives(*p_positive: float) -> np.ndarray:
    return np.stack([1 - np.array(p_positive), np.array(p_positive)], -1)


def test_auroc_counts_pairs_in_order_and_half_of_ties():
    # pairs: .9>.8, .9>.1, .4<.8, .4>.1: 3 of 4
    assert measure("auroc", np.array([1, 0, 1, 0]), positives(0.9, 0.8, 0.4, 0.1)).value == 0.75
    assert measure("auroc", np.array([1, 0]), positives(0.5, 0.5)).value == 0.5


def test_average_precision_by_hand():
    # positives found at ranks 1 and 3 of 4: (1/1 + 2/3) / 2
    found = measure("auprc", np.array([1, 0, 1, 0]), positives(0.9, 0.8, 0.4, 0.1)).value
    assert found == pytest.approx(5 / 6)


def test_calibration_error_by_hand():
    labels, p = np.array([1, 0, 1, 1]), positives(0.15, 0.18, 0.95, 0.95)
    # bin (.1, .2]: 2 slides, said .165, happened .5; bin (.9, 1]: said .95, happened 1
    assert measure("calibration_error", labels, p).value == pytest.approx((2 * 0.335 + 2 * 0.05) / 4)


def test_probability_on_the_edge_of_two_bins_is_in_the_lower():
    # (.1, .2] holds both: said .175, happened .5
    assert measure("calibration_error", np.array([0, 1]), positives(0.15, 0.2)).value == pytest.approx(0.325)


def test_calibration_error_of_several_classes_is_of_the_predicted_one():
    p = np.array([[0.62, 0.2, 0.18], [0.1, 0.66, 0.24]])
    # one bin (.6, .7]: said .64, right in 1 of 2
    assert measure("calibration_error", np.array([0, 2]), p).value == pytest.approx(0.14)


def test_brier_score_of_two_classes_is_the_squared_error_of_the_positive():
    assert measure("brier", np.array([1, 0]), positives(0.8, 0.4)).value == pytest.approx((0.04 + 0.16) / 2)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_fold_of_one_class_has_a_reason_and_no_value_where_both_are_needed(metric):
    found = measure(metric, np.array([1, 1, 1]), positives(0.2, 0.6, 0.7))
    assert math.isnan(found.value) == (metric in NEED_EVERY_CLASS)
    wanted = "none of the 3 slides is of class 0" if metric in NEED_EVERY_CLASS else None
    assert found.reason == wanted


def test_no_slides_at_all_is_a_reason_too():
    assert measure("accuracy", np.array([], int), np.zeros((0, 2))).reason == "there are no slides"


def test_unknown_metric_is_refused_and_the_known_are_listed():
    with pytest.raises(UnknownNameError, match="unknown metric 'auc'; known: accuracy, balanced_accuracy, auroc"):
        measure("auc", np.array([0, 1]), positives(0.1, 0.9))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=2, max_size=30))
def test_auroc_of_swapped_classes_is_one_minus_it(slides):
    labels = np.array([label for label, _ in slides], int)
    p = positives(*(score / 20 for _, score in slides))
    found, swapped = measure("auroc", labels, p).value, measure("auroc", 1 - labels, p).value
    assert math.isnan(found) == (len(set(labels)) == 1)
    if not math.isnan(found):
        assert found + swapped == pytest.approx(1)
