"""How good predictions are, for a whole test set or for thousands of resamples of it at once.

Every metric takes weights (R, n), one row a resample, and gives (R,) values: a slide that a resample holds twice
weighs 2 there. Calling scikit-learn 2,000 times takes as many milliseconds and more; these take one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from s4mil_monai.errors import UnknownNameError

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(labels (n,), probabilities (n, C), weights (R, n)) → values (R,), NaN where a resample lacks a class."""

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Measurement:
    """One metric of one set of predictions."""

    metric: str
    value: float
    """NaN where the metric is not defined."""
    n: int
    """Slides it is of."""
    reason: str | None = None
    """Why there is no value."""


def measure(metric: str, labels: np.ndarray, probabilities: np.ndarray) -> Measurement:
    """Measure predictions of slides.

    The predicted class is the most probable one, the first of equals. With two classes, class 1 is the positive:
    AUROC, AUPRC and F1 are its. With more, AUROC and AUPRC are the plain mean of each class against the rest, F1
    that of the classes. AUPRC is the average precision, without interpolation. The calibration error is of
    ``calibration_error`` with ten equally wide bins; the Brier score lies in [0, 1] for two classes and in
    [0, 2], a sum over classes, for more.

    Args:
        metric: A name in ``METRICS``.
        labels: (n,) class numbers.
        probabilities: (n, C).

    Returns:
        The value; NaN with the reason where slides of a class are missing and the metric needs them.

    Raises:
        UnknownNameError: There is no such metric.
    """
    compute = find_metric(metric)
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, float)
    reason = _undefined(metric, labels, probabilities.shape[1])
    if reason:
        return Measurement(metric, float("nan"), len(labels), reason)
    return Measurement(metric, float(compute(labels, probabilities, np.ones((1, len(labels))))[0]), len(labels))


def find_metric(metric: str) -> Metric:
    """The weighted form of a metric.

    Raises:
        UnknownNameError: There is no such metric.
    """
    if metric not in METRICS:
        raise UnknownNameError("metric", metric, tuple(METRICS))
    return METRICS[metric]


def accuracy(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of slides whose most probable class is the true one."""
    return _ratio(weights @ (probabilities.argmax(1) == labels), weights.sum(1))


def balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over classes of the share of its slides that are found."""
    correct = probabilities.argmax(1) == labels
    found = [
        _ratio(weights @ (correct & (labels == label)), weights @ (labels == label))
        for label in range(probabilities.shape[1])
    ]
    return np.mean(found, 0)


def f1(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision and recall, 0 where no slide is found."""
    predicted = probabilities.argmax(1)

    def of_class(label: int) -> np.ndarray:
        hits = weights @ ((predicted == label) & (labels == label))
        return _ratio(2 * hits, weights @ (predicted == label) + weights @ (labels == label))

    return np.mean([of_class(label) for label in _positive_classes(probabilities)], 0)


def auroc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of pairs of a positive and a negative slide that are in order, ties counting half."""
    return np.mean(
        [_auroc(labels == c, probabilities[:, c], weights) for c in _positive_classes(probabilities)], 0
    )


def auprc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision: at each threshold, the precision times the gain in recall."""
    return np.mean(
        [_auprc(labels == c, probabilities[:, c], weights) for c in _positive_classes(probabilities)], 0
    )


def brier(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean squared distance of the probabilities from what is true."""
    squared = ((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(1)
    return weights @ (squared / 2 if probabilities.shape[1] == 2 else squared) / weights.sum(1)


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error: the mean over slides of how far their bin is from what happens in it.

    With two classes it compares the probability of class 1 with how often class 1 is true; with more, the highest
    probability with how often that class is true (Guo et al., ICML 2017). It is biased upwards in small sets.

    Args:
        labels: (n,) class numbers.
        probabilities: (n, C).
        weights: (R, n).
    """
    confidence, happened = confidences(labels, probabilities)
    members = np.eye(CALIBRATION_BINS)[assign_bins(confidence, bins=CALIBRATION_BINS)]
    gaps = (weights * (happened - confidence)) @ members
    return np.abs(gaps).sum(1) / weights.sum(1)


def confidences(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) probabilities that are to be compared with (n,) bool of what they say having happened."""
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], labels == 1
    return probabilities.max(1), probabilities.argmax(1) == labels


def assign_bins(confidence: np.ndarray, *, bins: int) -> np.ndarray:
    """(n,) bin numbers of probabilities (n,): equally wide on [0, 1], open on the left except for the first."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")


def at_thresholds(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of positives and of negatives at each distinct score, the highest first.

    Args:
        positive: (n,) bool.
        scores: (n,).
        weights: (R, n).

    Returns:
        (R, G) and (R, G) for G scores.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    ordered, is_positive = weights[:, order], positive[order]
    return (
        np.add.reduceat(ordered * is_positive, starts, axis=1),
        np.add.reduceat(ordered * ~is_positive, starts, axis=1),
    )


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "auroc": auroc,
    "auprc": auprc,
    "f1": f1,
    "calibration_error": calibration_error,
    "brier": brier,
}

NEED_EVERY_CLASS = ("balanced_accuracy", "auroc", "auprc", "f1")
"""Metrics that say nothing where a class has no slide."""

LOWER_IS_BETTER = ("calibration_error", "brier")


def _undefined(metric: str, labels: np.ndarray, classes: int) -> str | None:
    if not len(labels):
        return "there are no slides"
    absent = sorted(set(range(classes)) - set(labels.tolist()))
    if absent and metric in NEED_EVERY_CLASS:
        return f"none of the {len(labels)} slides is of class {', '.join(map(str, absent))}"
    return None


def _positive_classes(probabilities: np.ndarray) -> range:
    classes = probabilities.shape[1]
    return range(1, 2) if classes == 2 else range(classes)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """NaN where the whole is 0: the resample lacks what is measured."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _auroc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hits, alarms = at_thresholds(positive, scores, weights)
    # A negative of a threshold is below all positives of higher ones and ties with those of its own.
    in_order = (alarms * (np.cumsum(hits, 1) - hits / 2)).sum(1)
    return _ratio(in_order, hits.sum(1) * alarms.sum(1))


def _auprc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hits, alarms = at_thresholds(positive, scores, weights)
    found, called = np.cumsum(hits, 1), np.cumsum(hits + alarms, 1)
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    return _ratio((hits * precision).sum(1), found[:, -1])
