"""How sure a figure is: bootstrap over patients, and DeLong's variance of an AUROC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm, rankdata

from s4mil_monai.statistics.metrics import find_metric
from s4mil_monai.statistics.predictions import PooledRuns

Statistic = Callable[[np.ndarray], np.ndarray]
"""Weights of the slides in R resamples (R, n) → (R,), or (R, K) for K figures of each."""

RESAMPLES = 2000
WEIGHTS_AT_ONCE = 1 << 22
"""Of a block of resamples: 32 MB in float64."""


@dataclass(frozen=True)
class Interval:
    """A figure and the range that holds the true one in ``level`` of all studies made like this one."""

    value: float
    low: float
    high: float
    level: float
    method: str
    reason: str | None = None
    """Why there is no range."""


def statistic_of(metric: str, pooled: PooledRuns) -> Statistic:
    """A metric of pooled predictions as a function of slide weights: the mean over runs of each run's value."""
    compute = find_metric(metric)
    runs = [(~np.isnan(run).any(1), run) for run in pooled.probabilities]

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.mean([compute(pooled.labels[seen], run[seen], weights[:, seen]) for seen, run in runs], 0)

    return statistic


def bootstrap_metric(
    metric: str,
    pooled: PooledRuns,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Measure pooled predictions, with a bootstrap interval over patients.

    The interval says how the figure of these trained models varies with the patients they are tested on, not how
    it varies with those they were trained on. That of the calibration error lies too high in small sets, since a
    resample is further from its own probabilities than the slides it is drawn from.

    Raises:
        UnknownNameError: There is no such metric.
    """
    return bootstrap(
        statistic_of(metric, pooled),
        labels=pooled.labels,
        patients=pooled.patients,
        resamples=resamples,
        level=level,
        seed=seed,
    )


def bootstrap(
    statistic: Statistic,
    *,
    labels: np.ndarray,
    patients: np.ndarray,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a figure, by drawing patients with replacement.

    Args:
        statistic: Weights (R, n) → (R,).
        labels: (n,) class numbers, by which patients are drawn; see ``draw_resamples``.
        patients: (n,); all slides of a patient are drawn together.
        resamples: How many.
        level: Of the interval.
        seed: Of the draws.

    Returns:
        The figure with its interval; without one, and with the reason, where the figure is not defined or every
        resample gives the same value, as at an AUROC of 1: the bootstrap cannot say how far below 1 it may be.
    """
    value = float(statistic(np.ones((1, len(labels))))[0])
    name = f"percentile bootstrap over patients, {resamples} resamples"
    if np.isnan(value):
        return Interval(value, value, value, level, name, "the figure is not defined")
    values = bootstrap_values(statistic, labels=labels, patients=patients, resamples=resamples, seed=seed)
    values = values[~np.isnan(values)]
    if not values.size or np.ptp(values) < 1e-12:
        nan = float("nan")
        return Interval(value, nan, nan, level, name, "every resample gives the same value")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level, name)


def bootstrap_values(
    statistic: Statistic, *, labels: np.ndarray, patients: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """What a statistic says of each resample: (R,) or (R, K)."""
    draws = draw_resamples(labels=labels, patients=patients, resamples=resamples, seed=seed)
    return np.concatenate([statistic(weights) for weights in draws])


def draw_resamples(
    *, labels: np.ndarray, patients: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[np.ndarray]:
    """Draw patients with replacement, as many of each kind as there are, so that no resample lacks a class.

    Patients are of one kind when their slides have the same set of labels; a kind with one patient does not vary.

    Args:
        labels: (n,) class numbers.
        patients: (n,) names.
        resamples: How many in all.
        seed: Of the draws.

    Yields:
        Blocks of weights (r, n): how often a resample holds each slide.
    """
    member, kinds = _patient_kinds(labels, patients)
    generator = np.random.default_rng(seed)
    block = max(1, WEIGHTS_AT_ONCE // max(1, len(labels)))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        counts = np.zeros((rows, len(kinds)))
        for kind in range(kinds.max() + 1):
            of_kind = np.flatnonzero(kinds == kind)
            counts[:, of_kind] = _counts(generator, rows, len(of_kind))
        yield counts[:, member]


def delong_interval(pooled: PooledRuns, *, level: float = 0.95) -> Interval:
    """AUROC of two classes with DeLong's interval over patients.

    It is taken on the log odds of the AUROC, which keeps it in (0, 1) and is closer to its level near 1 (Pepe,
    2003, p. 107). Of several runs it is that of their mean AUROC.

    Args:
        pooled: What one model said.
        level: Of the interval.

    Returns:
        The AUROC with its interval; without one, and with the reason, where the variance is 0 or not known, and
        without either where DeLong's method does not apply.
    """
    name, nan = "DeLong over patients, log odds", float("nan")
    why = why_no_delong(pooled)
    if why:
        return Interval(nan, nan, nan, level, name, why)
    placed = place(pooled.labels, pooled.probabilities[:, :, 1]).mean(0, keepdims=True)
    auroc, covariance = delong_covariance(pooled.labels, placed, pooled.patients)
    value, deviation = float(auroc[0]), float(np.sqrt(covariance[0, 0]))
    if not deviation > 0:
        reason = "one patient of a class" if np.isnan(deviation) else "the variance is 0"
        return Interval(value, nan, nan, level, name, reason)
    half = norm.ppf((1 + level) / 2) * deviation / (value * (1 - value))
    low, high = expit(logit(value) - half), expit(logit(value) + half)
    return Interval(value, float(low), float(high), level, name)


def why_no_delong(pooled: PooledRuns) -> str:
    """Why DeLong's method does not apply to pooled predictions; empty where it does."""
    if not pooled.is_binary:
        return "for two classes only"
    if not pooled.is_complete:
        return "runs are of different slides"
    return "" if len(set(pooled.labels.tolist())) == 2 else "slides are of one class"


def place(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """DeLong's structural components: for a positive the share of negatives below it, for a negative the share of
    positives above it, ties counting half.

    By ranks within the class and in all, in O(n log n) (Sun and Xu, IEEE Signal Processing Letters, 2014).

    Args:
        labels: (n,) of 0 and 1.
        scores: (n,) or (M, n).

    Returns:
        (M, n); the mean over the slides of either class is the AUROC.

    Raises:
        ValueError: A class has no slides.
    """
    scores = np.atleast_2d(np.asarray(scores, float))
    positive = np.asarray(labels) == 1
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        raise ValueError(f"an AUROC needs both classes, got {positives} positives and {negatives} negatives")
    in_all = rankdata(scores, axis=1)
    placed = np.empty_like(scores)
    placed[:, positive] = (in_all[:, positive] - rankdata(scores[:, positive], axis=1)) / negatives
    placed[:, ~positive] = 1 - (in_all[:, ~positive] - rankdata(scores[:, ~positive], axis=1)) / positives
    return placed


def delong_covariance(
    labels: np.ndarray, placed: np.ndarray, patients: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs of several models on the same slides, and how they vary together.

    DeLong, DeLong and Clarke-Pearson (Biometrics, 1988); with patients of several slides, of one class or both,
    Obuchowski's form for clustered data (Biometrics, 1997), which is the same where each patient has one slide.

    Args:
        labels: (n,) of 0 and 1.
        placed: (M, n) of ``place``.
        patients: (n,) names; None where slides are independent.

    Returns:
        (M,) AUROCs and their (M, M) covariance, NaN where all slides of a class are one patient's.
    """
    positive = np.asarray(labels) == 1
    patients = np.arange(len(positive)) if patients is None else patients
    _, member = np.unique(patients, return_inverse=True)
    auroc = placed[:, positive].mean(1)
    of_positives = _patient_sums(placed - auroc[:, None], positive, member)
    of_negatives = _patient_sums(placed - auroc[:, None], ~positive, member)
    across = of_positives @ of_negatives.T
    count = member.max() + 1
    covariance = (
        _corrected(len(set(member[positive]))) * of_positives @ of_positives.T
        + _corrected(len(set(member[~positive]))) * of_negatives @ of_negatives.T
        + _corrected(count) * (across + across.T)
    )
    return auroc, covariance


def _patient_kinds(labels: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) patient number of each slide, and (P,) kind of each patient."""
    names, member = np.unique(patients, return_inverse=True)
    classes, label_number = np.unique(labels, return_inverse=True)
    has = np.zeros((len(names), len(classes)), bool)
    has[member, label_number] = True
    return member, np.unique(has, axis=0, return_inverse=True)[1].reshape(-1)


def _counts(generator: np.random.Generator, rows: int, patients: int) -> np.ndarray:
    drawn = generator.integers(patients, size=(rows, patients)) + patients * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * patients).reshape(rows, patients)


def _patient_sums(residuals: np.ndarray, of_class: np.ndarray, member: np.ndarray) -> np.ndarray:
    """(M, P): sums over each patient's slides of one class, over the number of slides of that class."""
    sums = [np.bincount(member[of_class], row[of_class], minlength=member.max() + 1) for row in residuals]
    return np.array(sums) / of_class.sum()


def _corrected(count: int) -> float:
    return count / (count - 1) if count > 1 else float("nan")
