"""Fit a calibration on predictions of slides that the model has not seen.

What the guarantees say. Class-conditional split conformal prediction (Vovk, 2012; Mondrian) holds exactly, in
finite samples and whatever the model, when the slides it is fitted on and those to come are exchangeable within a
class, and all are scored by one model that has seen none of them. Out-of-fold predictions stand in for that: each
comes from a model trained on a part of the patients, and the model that is shipped is another one. The guarantee
is then approximate, and void where slides come from another scanner or population than those here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax
from scipy.stats import beta

from s4mil_monai.errors import TableError
from s4mil_monai.statistics.calibration import Calibration, Scaling
from s4mil_monai.statistics.predictions import logit_columns, probability_columns

TEMPERATURES = (0.02, 50.0)
"""Range that is searched."""

STEEPEST_LOGIT = 700.0
"""Log odds of a probability of 0 or 1 as it stands in a table."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold on the probability of class 1 and what it gives, with exact 95 % intervals."""

    threshold: float
    sensitivity: float
    sensitivity_low: float
    sensitivity_high: float
    specificity: float
    specificity_low: float
    specificity_high: float


def logits_of(rows: pd.DataFrame) -> np.ndarray:
    """(n, C) logits of checked predictions: those of the table, else the logarithms of its probabilities.

    Logarithms are logits but for a constant of each row, which softmax does not see.
    """
    columns = logit_columns(rows)
    if columns:
        return rows[columns].to_numpy(float)
    probabilities = rows[probability_columns(rows)].to_numpy(float)
    return np.log(np.maximum(probabilities, math.exp(-STEEPEST_LOGIT)))


def fit_calibration(
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    patients: np.ndarray | None = None,
    method: Literal["temperature", "platt"] = "temperature",
    sensitivity: float = 0.95,
    alpha: float = 0.05,
    provenance: str = "",
    where: str = "predictions",
) -> Calibration:
    """Fit probabilities, an operating threshold and a refer band.

    Where a patient has several slides, the threshold and the band look at the worst of them: the lowest true-class
    probability of a patient's slides of a class. What they promise then holds for all slides of a patient at once.

    The refer band always contains the threshold: it is widened to it where it would lie to one side, and there
    is none where the classes are so well apart that nothing has to be referred, for which the threshold
    may be lowered. Both keep the promise,
    and outside the band the decision is the threshold's.

    Args:
        labels: (n,) class numbers.
        logits: (n, C) of slides the model has not seen, each slide once.
        patients: (n,) names; None where each slide is a patient.
        method: ``temperature``, or ``platt`` for two classes.
        sensitivity: Wanted at the threshold.
        alpha: Share of each class's slides that may be called the other class.
        provenance: Which predictions these are.
        where: File or experiment, for the error.

    Raises:
        TableError: A class has too few patients for ``alpha``, or the model orders slides the
            wrong way round.
        ValueError: A share is not between 0 and 1, or shapes do not fit.
    """
    labels, logits = np.asarray(labels), np.asarray(logits, float)
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"logits are (n, C) for n labels, got {logits.shape} for {len(labels)}")
    for name, share in (("sensitivity", sensitivity), ("alpha", alpha)):
        if not 0 < share < 1:
            raise ValueError(f"{name} is a share between 0 and 1, got {share}")
    classes = logits.shape[1]
    patients = np.arange(len(labels)) if patients is None else np.asarray(patients)
    scaling = _fit_scaling(labels, logits, method, where)
    p = scaling.apply(logits)
    worst = worst_by_patient(labels, p, patients)
    floors = tuple(_floor_or_refuse(worst[c], c, alpha, where) for c in range(classes))
    cut: dict[str, Any] = {}
    if classes == 2:
        # minus p_1 orders slides as p_0 does, and what is equal stays equal
        of_negatives, of_positives = worst_by_patient(labels, p[:, 1:] * [-1, 1], patients)
        cut = _cut(of_positives, -of_negatives, alpha, sensitivity)
    return Calibration(
        class_floors=floors,
        alpha=alpha,
        n=len(labels),
        n_patients=len(set(patients.tolist())),
        provenance=provenance,
        **scaling.model_dump(),
        **cut,
    )


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The temperature at which the labels are most likely (Guo et al., ICML 2017), within ``TEMPERATURES``.

    Labels are drawn in as in ``draw_in``; a few dozen slides without an error would else ask for temperature 0 and
    probabilities of 0 and 1.

    Args:
        labels: (n,) class numbers.
        logits: (n, C).
    """
    targets = draw_in(labels, logits.shape[1])

    def surprise(log_temperature: float) -> float:
        return -float((targets * log_softmax(logits / math.exp(log_temperature), axis=1)).sum(1).mean())

    low, high = map(math.log, TEMPERATURES)
    return math.exp(minimize_scalar(surprise, bounds=(low, high), method="bounded", options={"xatol": 1e-8}).x)


def fit_platt(labels: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of a logistic line on the difference of two logits, labels drawn in (Platt, 1999).

    Args:
        labels: (n,) of 0 and 1.
        logits: (n, 2).
    """
    margin, targets = logits[:, 1] - logits[:, 0], draw_in(labels, 2)[:, 1]
    # a line on margins of about 1 is the better posed problem
    scale = float(np.abs(margin).mean()) or 1.0
    design = np.column_stack([margin / scale, np.ones_like(margin)])

    def surprise(line: np.ndarray) -> tuple[float, np.ndarray]:
        z = design @ line
        return float((np.logaddexp(0, z) - targets * z).mean()), design.T @ (expit(z) - targets) / len(z)

    slope, intercept = minimize(surprise, np.array([1.0, 0.0]), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return float(slope / scale), float(intercept)


def draw_in(labels: np.ndarray, classes: int) -> np.ndarray:
    """Labels a little away from 0 and 1, as if every class had been seen once more among slides of each label.

    Of a class with n slides the true one gets (n + 1) / (n + C), the others 1 / (n + C); with two classes these
    are Platt's targets. The effect goes as slides become many.

    Args:
        labels: (n,) class numbers.
        classes: C.

    Returns:
        (n, C), rows adding up to 1.
    """
    counts = np.bincount(labels, minlength=classes)[labels][:, None]
    return (np.eye(classes)[labels] * counts + 1) / (counts + classes)


def conformal_floor(p_true: np.ndarray, alpha: float) -> float | None:
    """Probability of a class that a new slide of it falls below with a chance of at most ``alpha``.

    The ceil((n + 1)(1 - alpha))-th smallest of n nonconformities 1 - p; the chance is over calibration and new
    slide together, and at least alpha - 1/(n + 1) where no two are equal.

    Args:
        p_true: (n,) probabilities of the class, of slides of that class.
        alpha: The share.

    Returns:
        None where n is too small for any floor but 0.
    """
    n = len(p_true)
    # 1e-9: (n + 1) (1 - alpha) of 19.000000000000004 is 19
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    return None if rank > n else float(np.sort(p_true)[n - rank])


def choose_threshold(p_positives: np.ndarray, p_negatives: np.ndarray, *, sensitivity: float) -> OperatingPoint:
    """The highest threshold with a sensitivity on these patients.

    Whatever the distribution, the sensitivity on new patients at the m-th smallest of n positive scores is
    Beta(n - m + 1, m): its interval comes from that, so that choosing the threshold on the same
    slides is paid for. The specificity's interval is Clopper and Pearson's, since negatives had no part in it.

    Args:
        p_positives: (n,) probabilities of class 1, of patients of class 1.
        p_negatives: (m,) of the others.
        sensitivity: Share of positives wanted at or above the threshold.
    """
    n = len(p_positives)
    misses = min(n - 1, math.floor(n * (1 - sensitivity) + 1e-9))
    return operating_point(p_positives, p_negatives, misses=misses)


def operating_point(p_positives: np.ndarray, p_negatives: np.ndarray, *, misses: int) -> OperatingPoint:
    """What the threshold gives that leaves ``misses`` positives below it; arguments as in ``choose_threshold``."""
    ordered = np.sort(p_positives)
    threshold = float(ordered[misses])
    kept = int((np.asarray(p_negatives) < threshold).sum())
    low, high = beta.ppf([0.025, 0.975], len(ordered) - misses, misses + 1)
    specificity_low, specificity_high = clopper_pearson(kept, len(p_negatives))
    return OperatingPoint(
        threshold=threshold,
        sensitivity=float((ordered >= threshold).mean()),
        sensitivity_low=float(low),
        sensitivity_high=float(high),
        specificity=kept / len(p_negatives),
        specificity_low=specificity_low,
        specificity_high=specificity_high,
    )


def clopper_pearson(hits: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share (Clopper and Pearson, Biometrika, 1934)."""
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.isf(tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def worst_by_patient(labels: np.ndarray, probabilities: np.ndarray, patients: np.ndarray) -> list[np.ndarray]:
    """By class, the lowest probability of that class among each patient's slides of it."""
    worst = []
    for c in range(probabilities.shape[1]):
        of_class = labels == c
        worst.append(pd.Series(probabilities[of_class, c]).groupby(patients[of_class]).min().to_numpy(float))
    return worst


def _fit_scaling(
    labels: np.ndarray, logits: np.ndarray, method: Literal["temperature", "platt"], where: str
) -> Scaling:
    classes = logits.shape[1]
    absent = sorted(set(range(classes)) - set(labels.tolist()))
    if absent:
        raise TableError(where, f"no slide of class {', '.join(map(str, absent))} to calibrate on")
    if method == "temperature":
        return Scaling(method=method, classes=classes, temperature=fit_temperature(labels, logits))
    if classes != 2:
        raise ValueError(f"platt is for two classes, got {classes}")
    slope, intercept = fit_platt(labels, logits)
    if slope <= 0:
        raise TableError(where, f"positives score below negatives (slope {slope:.3g}); are the labels swapped?")
    return Scaling(method=method, classes=classes, slope=slope, intercept=intercept)


def _floor_or_refuse(p_true: np.ndarray, label: int, alpha: float, where: str) -> float:
    floor = conformal_floor(p_true, alpha)
    if floor is None:
        fewest = math.ceil((1 - alpha) / alpha - 1e-9)
        raise TableError(
            where, f"alpha {alpha:g} needs {fewest} patients of each class; class {label} has {len(p_true)}"
        )
    return floor


def _cut(
    p_positives: np.ndarray,
    p_negatives: np.ndarray,
    alpha: float,
    sensitivity: float,
) -> dict[str, Any]:
    """Threshold and refer band of two classes, from probabilities of class 1.

    Class 1 cannot be ruled out from its floor on, class 0 up to its ceiling. Where these overlap, a slide is
    referred; where they leave a gap, any cut in it keeps the promise to both classes, and a threshold above the
    gap is lowered to it, which finds more positives. One below it stays, and what lies between is referred.
    """
    point = choose_threshold(p_positives, p_negatives, sensitivity=sensitivity)
    positive_from = conformal_floor(p_positives, alpha) or 0.0
    negative_to = -(conformal_floor(-p_negatives, alpha) or 0.0)
    if negative_to < positive_from < point.threshold:
        misses = int((p_positives < positive_from).sum())
        point = operating_point(p_positives, p_negatives, misses=misses)
    facts = {**vars(point), "stated_sensitivity": sensitivity}
    if negative_to < point.threshold <= positive_from:
        return facts
    edges = [point.threshold, negative_to, *([positive_from] if positive_from <= negative_to else [])]
    return {**facts, "refer_low": min(edges), "refer_high": max(edges)}
