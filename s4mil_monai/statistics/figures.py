"""Figures for a paper: ROC with band, confusion, reliability, training curves.

Each is drawn on a Figure of its own, without pyplot and its global state, in the colours of Okabe and Ito, which
colour-blind people can tell apart; lines differ in their dashes as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import norm

from s4mil_monai.errors import OutputError, TableError
from s4mil_monai.statistics.intervals import (
    RESAMPLES,
    Statistic,
    bootstrap_metric,
    bootstrap_values,
)
from s4mil_monai.statistics.metrics import CALIBRATION_BINS, assign_bins, at_thresholds, confidences, find_metric
from s4mil_monai.statistics.predictions import PooledRuns, models_of, pool_runs

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito (2008), without yellow, which is faint on white."""

DASHES = ("-", "--", "-.", ":")
GREY = "#666666"
ROC_GRID = np.linspace(0, 1, 201)
"""1 - specificity at which bands are drawn."""

FORMATS = ("png", "svg", "pdf")
DOTS_PER_INCH = 200


def plot_roc(
    frame: pd.DataFrame,
    models: Sequence[str] | None = None,
    *,
    positive: int = 1,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Figure:
    """ROC of models from pooled out-of-fold predictions, with pointwise 95 % bands over patients.

    With several runs, sensitivities are averaged at equal specificity. The AUROC beside each name is that of
    ``positive`` against all other classes, with its bootstrap interval.

    Args:
        frame: Checked predictions.
        models: Which; all where None.
        positive: The class to be found.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        UnknownNameError: There is no such model.
        TableError: There are no slides of the class, or no others.
    """
    figure, axes = _new_figure(5.0, 5.0)
    for (colour, dash), model in zip(_styles(), models or models_of(frame), strict=False):
        pooled = _against_the_rest(pool_runs(frame, model), positive)
        labels, patients = pooled.labels, pooled.patients
        curve = _roc_of(pooled)
        values = bootstrap_values(curve, labels=labels, patients=patients, resamples=resamples, seed=seed)
        low, high = np.nanquantile(values, [0.025, 0.975], axis=0)
        area = bootstrap_metric("auroc", pooled, resamples=resamples, seed=seed)
        text = f"{model}: {area.value:.3f}" + ("" if area.reason else f" ({area.low:.3f} to {area.high:.3f})")
        axes.fill_between(ROC_GRID, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(*_drawn_curve(pooled, curve), color=colour, linestyle=dash, linewidth=1.8, label=text)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
    _label(axes, "1 − specificity", "Sensitivity")
    _square(axes)
    axes.legend(loc="lower right", frameon=False, fontsize=8, title="AUROC (95 % interval)", title_fontsize=8)
    return figure


def plot_confusion(
    labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str], *, title: str = ""
) -> Figure:
    """Counts of slides by true and predicted class, shaded by the share of the true class.

    Args:
        labels: (n,) class numbers.
        predicted: (n,) class numbers.
        class_names: One a class.
        title: Over the figure.

    Raises:
        ValueError: A number is none of the classes.
    """
    classes = len(class_names)
    labels, predicted = np.asarray(labels, int), np.asarray(predicted, int)
    if not (min(labels.min(), predicted.min()) >= 0 and max(labels.max(), predicted.max()) < classes):
        raise ValueError(f"classes are 0 to {classes - 1}, one for each of {', '.join(class_names)}")
    counts = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = 2.2 + 0.9 * classes
    figure, axes = _new_figure(side + 0.8, side)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        colour = "white" if shares[row, column] > 0.55 else "black"
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=10)
    axes.set_xticks(range(classes), class_names)
    axes.set_yticks(range(classes), class_names, rotation=90, va="center")
    _label(axes, "Predicted", "True")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="Share of the true class", fraction=0.046)
    return figure


def plot_reliability(
    labels: np.ndarray, probabilities: np.ndarray, *, bins: int = CALIBRATION_BINS, title: str = ""
) -> Figure:
    """How often what has a probability happens, over how many slides have it.

    With two classes of class 1, with more of the most probable class, as in ``metrics.calibration_error``, which
    stands in the figure. Bars are 95 % intervals of Wilson's and take slides for independent.

    Args:
        labels: (n,) class numbers.
        probabilities: (n, C).
        bins: Equally wide ones.
        title: Over the figure.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, float)
    confidence, happened = confidences(labels, probabilities)
    member = assign_bins(confidence, bins=bins)
    counts = np.bincount(member, minlength=bins)
    some = counts > 0
    mean = np.bincount(member, confidence, minlength=bins)[some] / counts[some]
    share = np.bincount(member, happened, minlength=bins)[some] / counts[some]
    low, high = _wilson(share, counts[some])
    error = find_metric("calibration_error")(labels, probabilities, np.ones((1, len(labels))))[0]

    figure = Figure(figsize=(4.6, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    above.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (1, 3)), label="Perfect")
    bars = np.array([share - low, high - share])
    above.errorbar(mean, share, bars, fmt="o-", color=COLOURS[0], capsize=3, linewidth=1.5, label="Observed")
    above.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    text = f"Calibration error {error:.3f}\n{len(labels)} slides"
    above.text(0.97, 0.05, text, ha="right", transform=above.transAxes, fontsize=9)
    above.legend(loc="upper left", frameon=False, fontsize=9)
    above.set_title(title, fontsize=10)
    below.bar((np.arange(bins) + 0.5) / bins, counts, width=0.9 / bins, color=COLOURS[0])
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    binary = probabilities.shape[1] == 2
    _label(above, "", "Share of positives" if binary else "Share that is right")
    _label(below, "Probability of class 1" if binary else "Probability of the predicted class", "Slides")
    return figure


def plot_training_curves(history: pd.DataFrame, *, title: str = "") -> Figure:
    """Metrics over epochs, a panel each: folds thin, their mean thick.

    The mean goes on over the folds that are still training, after others have stopped early; it is drawn as far
    as half of them.

    Args:
        history: ``epoch``, ``metric``, ``value`` and, if wanted, ``fold`` and ``part`` (``train``,
            ``validation``), which share a panel.
        title: Over the figure.

    Raises:
        TableError: A column is missing, or there are no rows.
    """
    missing = [column for column in ("epoch", "metric", "value") if column not in history.columns]
    if missing or history.empty:
        raise TableError("training history", f"lacks {', '.join(missing) or 'rows'}")
    history = history.assign(**{name: 0 for name in ("fold", "part") if name not in history.columns})
    metrics = list(dict.fromkeys(history["metric"]))
    styles = dict(zip(dict.fromkeys(history["part"]), _styles(), strict=False))
    figure = Figure(figsize=(4.2 * len(metrics), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        parts = history[history["metric"] == metric].groupby("part", sort=False)
        for part, rows in parts:
            _draw_curves(axes, rows, str(part), *styles[part])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label(axes, "Epoch", str(metric))
        if parts.ngroups > 1:
            axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def save_figure(figure: Figure, path: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a figure in several formats; the same figure gives the same files.

    Args:
        figure: It.
        path: Where; the suffix is replaced by each format's, and the folder is made.
        formats: Of ``png``, ``svg`` and ``pdf``.

    Raises:
        ValueError: A format is none of these.
        OutputError: It cannot be written there.
    """
    strange = [name for name in formats if name not in FORMATS]
    if strange:
        raise ValueError(f"figures are written as {', '.join(FORMATS)}, got {', '.join(strange)}")
    path = Path(path)
    stem = path.with_suffix("") if path.suffix[1:] in FORMATS else path
    written = [stem.parent / f"{stem.name}.{name}" for name in formats]
    # Text stays text, for editing and searching; names of parts and dates would differ from run to run.
    no_date = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "s4mil"}):
            for name, file in zip(formats, written, strict=True):
                figure.savefig(file, format=name, dpi=DOTS_PER_INCH, metadata=no_date[name])
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror})") from error
    return written


def _new_figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _styles() -> zip[tuple[str, str]]:
    return zip(cycle(COLOURS), cycle(DASHES), strict=False)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _square(axes: Axes) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")


def _against_the_rest(pooled: PooledRuns, positive: int) -> PooledRuns:
    """Two classes: ``positive`` and all others."""
    labels = (pooled.labels == positive).astype(int)
    if not 0 < labels.sum() < len(labels):
        raise TableError("predictions", f"a ROC of class {positive} needs slides of it and of others")
    p_positive = pooled.probabilities[:, :, positive]
    probabilities = np.stack([1 - p_positive, p_positive], -1)
    return PooledRuns(pooled.model, pooled.slides, pooled.patients, labels, probabilities)


def _roc_of(pooled: PooledRuns) -> Statistic:
    """(R, n) weights → (R, K) sensitivities at ``ROC_GRID``, the mean over runs."""
    runs = [(~np.isnan(run[:, 1]), run[:, 1]) for run in pooled.probabilities]

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.mean([_sensitivities(pooled.labels[s], p[s], weights[:, s]) for s, p in runs], 0)

    return statistic


def _sensitivities(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    alarms, hits = _roc_points(labels, scores, weights)
    return np.array([np.interp(ROC_GRID, x, y) for x, y in zip(alarms, hits, strict=True)])


def _roc_points(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R, 1 + G) shares of negatives and of positives at or above each score, from (0, 0) to (1, 1)."""
    hits, alarms = at_thresholds(labels == 1, scores, weights)
    start = np.zeros((len(weights), 1))
    alarms, hits = (np.cumsum(np.hstack([start, part]), 1) for part in (alarms, hits))
    with np.errstate(invalid="ignore"):  # a run may lack a class in a resample, where it then has no curve
        return alarms / alarms[:, -1:], hits / hits[:, -1:]


def _drawn_curve(pooled: PooledRuns, curve: Statistic) -> tuple[np.ndarray, np.ndarray]:
    """Every step of a single run; the mean of several on the grid."""
    once = np.ones((1, len(pooled.slides)))
    if len(pooled.probabilities) > 1:
        return np.r_[0.0, ROC_GRID], np.r_[0.0, curve(once)[0]]
    alarms, hits = _roc_points(pooled.labels, pooled.probabilities[0, :, 1], once)
    return alarms[0], hits[0]


def _wilson(share: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of shares (Wilson, 1927)."""
    z2 = norm.ppf(0.975) ** 2
    middle = (share + z2 / (2 * counts)) / (1 + z2 / counts)
    half = np.sqrt(z2 * (share * (1 - share) / counts + z2 / (4 * counts**2))) / (1 + z2 / counts)
    return np.minimum(share, middle - half), np.maximum(share, middle + half)


def _draw_curves(axes: Axes, rows: pd.DataFrame, name: str, colour: str, dash: str) -> None:
    by_fold = rows.pivot_table(index="epoch", columns="fold", values="value")
    if by_fold.shape[1] > 1:
        for fold in by_fold.columns:
            axes.plot(by_fold.index, by_fold[fold], color=colour, linewidth=0.6, alpha=0.35)
        by_fold = by_fold[by_fold.notna().sum(axis=1) * 2 >= by_fold.shape[1]]
    axes.plot(by_fold.index, by_fold.mean(axis=1), color=colour, linestyle=dash, linewidth=2, label=name)
