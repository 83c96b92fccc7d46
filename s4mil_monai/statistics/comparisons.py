"""Whether two models differ: on the same slides, on the same folds, and among many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest, chi2, false_discovery_control, norm
from scipy.stats import t as student

from s4mil_monai.errors import TableError
from s4mil_monai.statistics.intervals import (
    RESAMPLES,
    bootstrap,
    delong_covariance,
    place,
    statistic_of,
    why_no_delong,
)
from s4mil_monai.statistics.metrics import measure
from s4mil_monai.statistics.predictions import (
    PooledRuns,
    has_same_folds,
    is_cross_validation,
    models_of,
    pool_runs,
    probability_columns,
    rows_of,
)

FEWEST_FOR_CHI_SQUARE = 25
"""Discordant pairs below which McNemar's test is the exact one."""

TESTS_WITH_P_VALUE = ("delong", "paired_t", "corrected_t", "mcnemar")


@dataclass(frozen=True)
class Comparison:
    """One test of a model against another; differences are the model's value minus the other's."""

    test: str
    difference: float
    low: float
    high: float
    """95 % interval of the difference; NaN where the test has none."""
    statistic: float
    p_value: float
    n: int
    """Slides, folds or discordant pairs it rests on."""
    note: str = ""
    """Why there is no p-value, or what to know about it."""


def compare_aurocs(
    labels: np.ndarray, scores: np.ndarray, other_scores: np.ndarray, patients: np.ndarray | None = None
) -> Comparison:
    """DeLong's test of two AUROCs on the same slides.

    Args:
        labels: (n,) of 0 and 1.
        scores: (n,), or (R, n) of several trainings, whose mean AUROC is compared.
        other_scores: As ``scores``.
        patients: (n,) names where patients have several slides.

    Raises:
        ValueError: A class has no slides.
    """
    placed = np.stack([place(labels, scores).mean(0), place(labels, other_scores).mean(0)])
    auroc, covariance = delong_covariance(labels, placed, patients)
    difference = float(auroc[0] - auroc[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    return _two_sided("delong", difference, variance, len(labels), freedom=None)


def paired_t_test(values: np.ndarray, other_values: np.ndarray) -> Comparison:
    """Paired t-test over folds.

    Folds share most of their training slides, so their values are not independent and the p-value is too small;
    it is here because papers report it. See ``corrected_t_test``.

    Args:
        values: (J,) one a fold; folds with NaN in either are left out.
        other_values: (J,) in the same order.
    """
    return _t_test("paired_t", values, other_values, test_over_train=0.0)


def corrected_t_test(values: np.ndarray, other_values: np.ndarray, *, test_over_train: float) -> Comparison:
    """Paired t-test over folds with the variance corrected for shared training slides.

    The variance of the mean difference is s² (1/J + n_test/n_train) in place of s²/J (Nadeau and Bengio, Machine
    Learning, 2003).

    Args:
        values: (J,) one a fold; folds with NaN in either are left out.
        other_values: (J,) in the same order.
        test_over_train: Slides tested over slides trained on, of one fold. With k folds it is 1/(k - 1) only where
            no slides are held back for validation.
    """
    return _t_test("corrected_t", values, other_values, test_over_train=test_over_train)


def mcnemar_test(correct: np.ndarray, other_correct: np.ndarray) -> Comparison:
    """McNemar's test of two models' errors on the same slides.

    Exact binomial below 25 discordant pairs, else chi-square with Edwards' continuity correction. It takes slides
    for independent.

    Args:
        correct: (n,) bool.
        other_correct: (n,) bool.
    """
    correct, other_correct = np.asarray(correct, bool), np.asarray(other_correct, bool)
    only, only_other = int((correct & ~other_correct).sum()), int((~correct & other_correct).sum())
    discordant, difference = only + only_other, float(correct.mean() - other_correct.mean())
    nan = float("nan")
    if discordant == 0:
        return Comparison("mcnemar", difference, nan, nan, nan, 1.0, 0, "no discordant pair")
    if discordant < FEWEST_FOR_CHI_SQUARE:
        p_value = float(binomtest(only, discordant).pvalue)
        return Comparison("mcnemar", difference, nan, nan, float(only), p_value, discordant, "exact")
    statistic = max(0, abs(only - only_other) - 1) ** 2 / discordant
    p_value = float(chi2.sf(statistic, 1))
    return Comparison("mcnemar", difference, nan, nan, statistic, p_value, discordant, "chi-square")


def adjust_holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment, which keeps the chance of any false finding; NaN stay and do not count."""
    return _adjusted(p_values, _holm)


def adjust_benjamini_hochberg(p_values: Sequence[float]) -> np.ndarray:
    """Benjamini and Hochberg's adjustment, which keeps the share of false findings; NaN stay and do not count."""
    return _adjusted(p_values, lambda known: np.asarray(false_discovery_control(known)))


def measure_folds(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Measure each fold of each model.

    Where a fold holds back the same slides under every seed, its value is the mean over seeds, so that the spread
    over folds is not made smaller by training more often; else every fold of every seed stands for itself.

    Args:
        frame: Checked predictions.
        metrics: Names.

    Returns:
        ``model``, ``seed`` (-1 for the mean over seeds), ``fold``, ``metric``, ``value``, ``n``, ``reason`` (empty
        where there is a value).
    """
    columns, rows = probability_columns(frame), []
    for (model, seed, fold), part in frame.groupby(["model", "seed", "fold"], sort=False):
        labels, probabilities = part["label"].to_numpy(), part[columns].to_numpy(float)
        for metric in metrics:
            found = measure(metric, labels, probabilities)
            rows.append((model, seed, fold, metric, found.value, found.n, found.reason or ""))
    values = pd.DataFrame(rows, columns=["model", "seed", "fold", "metric", "value", "n", "reason"])
    means = [_mean_over_seeds(values[values["model"] == m], rows_of(frame, m)) for m in models_of(frame)]
    return pd.concat(means, ignore_index=True)


def compare_with_reference(
    frame: pd.DataFrame,
    reference: str,
    *,
    metric: str = "auroc",
    test_over_train: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    where: str = "predictions",
) -> pd.DataFrame:
    """Test every model against one.

    ``bootstrap`` gives the 95 % interval of the pooled difference over patients, ``delong`` tests the pooled
    AUROC (two classes), ``paired_t`` and ``corrected_t`` the metric over folds, ``mcnemar`` the pooled classes.
    Pooling puts scores of different fold models on one scale, which they need not share.

    Args:
        frame: Checked predictions.
        reference: The model the others are compared with.
        metric: Of the bootstrap and the t-tests.
        test_over_train: For the corrected t-test, which is left out without it: predictions do not say how many
            slides their models were trained on.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        where: File or experiment, for the error.

    Returns:
        ``model``, ``reference``, ``test``, ``measured``, ``difference`` (model minus reference), ``low``,
        ``high``, ``statistic``, ``p``, ``p_holm``, ``p_bh``, ``n``, ``note``. P-values of one test are
        adjusted for the number of models compared.

    Raises:
        UnknownNameError: There is no such model or metric.
        TableError: A model lacks slides or runs that the reference has, or has others.
    """
    other, folds = pool_runs(frame, reference), measure_folds(frame, [metric])
    share_slides = not is_cross_validation(rows_of(frame, reference))
    rows = []
    for model in models_of(frame):
        if model == reference:
            continue
        pooled = pool_runs(frame, model)
        _check_alignment(pooled, other, where)
        values, other_values = _paired_values(folds, model, reference, where)
        results = (
            _bootstrap_test(metric, pooled, other, resamples=resamples, seed=seed),
            _delong_test(pooled, other),
            paired_t_test(values, other_values),
            _corrected_or_not(values, other_values, test_over_train, share_slides=share_slides),
            _mcnemar_of(pooled, other),
        )
        rows += [_row(model, reference, metric, result) for result in results]
    return _with_adjusted(pd.DataFrame(rows, columns=_COLUMNS))


_COLUMNS = [
    "model", "reference", "test", "measured", "difference", "low", "high", "statistic", "p", "n", "note",
]  # fmt: skip

_MEASURED = {"delong": "auroc", "mcnemar": "accuracy"}


def _row(model: str, reference: str, metric: str, result: Comparison) -> tuple[object, ...]:
    measured = _MEASURED.get(result.test, metric)
    return (
        model, reference, result.test, measured, result.difference, result.low, result.high,
        result.statistic, result.p_value, result.n, result.note,
    )  # fmt: skip


def _with_adjusted(rows: pd.DataFrame) -> pd.DataFrame:
    place_of_p = _COLUMNS.index("p") + 1
    for name, adjust in (("p_bh", adjust_benjamini_hochberg), ("p_holm", adjust_holm)):
        adjusted = pd.Series(np.nan, rows.index, dtype=float)
        for _, part in rows.groupby("test"):
            adjusted[part.index] = adjust(part["p"].tolist())
        rows.insert(place_of_p, name, adjusted)
    return rows


def _two_sided(test: str, difference: float, variance: float, n: int, *, freedom: int | None) -> Comparison:
    """Normal, or Student's with ``freedom``, test of a difference being 0."""
    nan = float("nan")
    if np.isnan(variance):
        return Comparison(test, difference, nan, nan, nan, nan, n, "the variance is not known")
    if variance <= 1e-18:
        equal = abs(difference) < 1e-12
        note = "no difference anywhere" if equal else "the variance is 0"
        return Comparison(test, difference, nan, nan, nan, 1.0 if equal else nan, n, note)
    deviation = np.sqrt(variance)
    law = norm() if freedom is None else student(freedom)
    half, statistic = law.ppf(0.975) * deviation, difference / deviation
    p_value = float(2 * law.sf(abs(statistic)))
    return Comparison(test, difference, difference - half, difference + half, float(statistic), p_value, n)


def _t_test(test: str, values: np.ndarray, other_values: np.ndarray, *, test_over_train: float) -> Comparison:
    differences = np.asarray(values, float) - np.asarray(other_values, float)
    kept = differences[~np.isnan(differences)]
    if len(kept) < 2:
        nan = float("nan")
        mean = float(kept.mean()) if len(kept) else nan
        return Comparison(test, mean, nan, nan, nan, nan, len(kept), f"{len(kept)} folds with a value")
    variance = float(kept.var(ddof=1)) * (1 / len(kept) + test_over_train)
    return _two_sided(test, float(kept.mean()), variance, len(kept), freedom=len(kept) - 1)


def _corrected_or_not(
    values: np.ndarray, other_values: np.ndarray, ratio: float | None, *, share_slides: bool
) -> Comparison:
    if ratio is not None:
        return corrected_t_test(values, other_values, test_over_train=ratio)
    plain, nan = paired_t_test(values, other_values), float("nan")
    why = "folds share test slides" if share_slides else "slides tested over slides trained on is not given"
    return Comparison("corrected_t", plain.difference, nan, nan, nan, nan, plain.n, f"no corrected_t: {why}")


def _bootstrap_test(
    metric: str, pooled: PooledRuns, other: PooledRuns, *, resamples: int, seed: int
) -> Comparison:
    ours, theirs = statistic_of(metric, pooled), statistic_of(metric, other)
    found = bootstrap(
        lambda weights: ours(weights) - theirs(weights),
        labels=pooled.labels,
        patients=pooled.patients,
        resamples=resamples,
        seed=seed,
    )
    nan, note = float("nan"), found.reason or "interval only"
    return Comparison("bootstrap", found.value, found.low, found.high, nan, nan, len(pooled.slides), note)


def _delong_test(pooled: PooledRuns, other: PooledRuns) -> Comparison:
    why = why_no_delong(pooled)
    if why:
        nan = float("nan")
        return Comparison("delong", nan, nan, nan, nan, nan, len(pooled.slides), why)
    scores, other_scores = pooled.probabilities[:, :, 1], other.probabilities[:, :, 1]
    return compare_aurocs(pooled.labels, scores, other_scores, pooled.patients)


def _mcnemar_of(pooled: PooledRuns, other: PooledRuns) -> Comparison:
    """Of the mean probabilities where there are several runs, since a slide may count once only."""
    correct = pooled.mean_probabilities.argmax(1) == pooled.labels
    return mcnemar_test(correct, other.mean_probabilities.argmax(1) == other.labels)


def _check_alignment(pooled: PooledRuns, other: PooledRuns, where: str) -> None:
    odd = sorted(set(pooled.slides.tolist()) ^ set(other.slides.tolist()))
    if odd:
        rest = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise TableError(
            where, f"{pooled.model} and {other.model} are not of the same slides: {', '.join(odd[:5])}{rest}"
        )
    seen, other_seen = (np.isnan(runs.probabilities).any(2) for runs in (pooled, other))
    if seen.shape != other_seen.shape or (seen != other_seen).any():
        raise TableError(where, f"{pooled.model} and {other.model} do not have the same seeds and folds")


def _paired_values(folds: pd.DataFrame, model: str, reference: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    keys = ["seed", "fold"]
    both = folds[folds["model"] == model].merge(
        folds[folds["model"] == reference], "outer", on=keys, indicator=True
    )
    if (both["_merge"] != "both").any():
        raise TableError(where, f"{model} and {reference} do not have the same seeds and folds")
    return both["value_x"].to_numpy(float), both["value_y"].to_numpy(float)


def _mean_over_seeds(values: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    if rows["seed"].nunique() == 1 or not has_same_folds(rows):
        return values
    kept = {
        "value": ("value", lambda of: of.mean(skipna=False)),
        "n": ("n", "first"),
        "reason": ("reason", "first"),
    }
    means = values.groupby(["model", "fold", "metric"], sort=False).agg(**kept).reset_index()
    return means.assign(seed=-1)[list(values.columns)]


def _adjusted(p_values: Sequence[float], adjust) -> np.ndarray:
    adjusted = np.array(p_values, float)
    known = ~np.isnan(adjusted)
    if known.any():
        adjusted[known] = adjust(adjusted[known])
    return adjusted


def _holm(p_values: np.ndarray) -> np.ndarray:
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(steps)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted
