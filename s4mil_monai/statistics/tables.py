"""Summaries of predictions, the paper's tables, and their Markdown, CSV and LaTeX.

No value is set in bold: the best of nine means over ten folds is rarely better than the second by more than
chance, and a bold figure says that it is. Where models are compared, the interval and p-value of the difference
stand beside it. CSV holds what the others hold, as text; the numbers behind it come from ``summarize``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from s4mil_monai.errors import OutputError, TableError, UnknownNameError
from s4mil_monai.statistics.comparisons import TESTS_WITH_P_VALUE, compare_with_reference, measure_folds
from s4mil_monai.statistics.intervals import RESAMPLES, Interval, bootstrap_metric, delong_interval
from s4mil_monai.statistics.metrics import LOWER_IS_BETTER
from s4mil_monai.statistics.predictions import has_same_folds, models_of, pool_runs, rows_of

TITLES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auroc": "AUROC",
    "auroc_per_slide": "AUROC per slide",
    "auprc": "AUPRC",
    "f1": "F1",
    "calibration_error": "Calibration error",
    "brier": "Brier score",
}
LONG_PERCENTILE = 85.0
"""Table 5 of the paper."""


@dataclass(frozen=True)
class Table:
    """Cells as they are printed, with what has to be said about them."""

    title: str
    cells: pd.DataFrame
    """Text; columns of one level, or of two where a heading spans several."""
    notes: tuple[str, ...] = ()


def summarize(
    frame: pd.DataFrame, metrics: Sequence[str], *, resamples: int = RESAMPLES, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Every metric of every model: over folds, and pooled out of fold with an interval.

    Pooling puts scores of different fold models on one scale, which they need not share; the pooled AUROC then is
    lower than the mean of the folds'. With several seeds the fold values are means over seeds where the folds are
    the same, and the pooled value is the mean of the seeds'.

    Args:
        frame: Checked predictions.
        metrics: Names.
        resamples: Of the patient-level bootstrap.
        level: Of the intervals.
        seed: Of the bootstrap.

    Returns:
        ``model``, ``metric``, ``fold_mean``, ``fold_sd`` (of the sample, n - 1), ``folds`` (that have a value),
        ``pooled``, ``low``, ``high``, ``delong_low``, ``delong_high`` (of the AUROC of two classes, else NaN),
        ``slides``, ``patients``, ``note``.
    """
    folds, rows = measure_folds(frame, metrics), []
    for model in models_of(frame):
        pooled = pool_runs(frame, model)
        delong = delong_interval(pooled, level=level)
        for metric in metrics:
            found = folds[(folds["model"] == model) & (folds["metric"] == metric)]
            interval = bootstrap_metric(metric, pooled, resamples=resamples, level=level, seed=seed)
            rows.append(
                {
                    "model": model,
                    "metric": metric,
                    **_over_folds(found),
                    "pooled": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "delong_low": delong.low if metric == "auroc" else float("nan"),
                    "delong_high": delong.high if metric == "auroc" else float("nan"),
                    "slides": len(pooled.slides),
                    "patients": len(set(pooled.patients.tolist())),
                    "note": _note(found, interval),
                }
            )
    return pd.DataFrame(rows)


def table_of_models(
    data_sets: Mapping[str, pd.DataFrame], metrics: Sequence[str] = ("accuracy", "auroc"), *, title: str = ""
) -> Table:
    """Table 1 of the paper: models by data sets, mean ± standard deviation over folds.

    Args:
        data_sets: Checked predictions by the name of the data set, in the order of the columns.
        metrics: Names.
        title: Over the table.
    """
    columns: dict[tuple[str, str], pd.Series] = {}
    notes: list[str] = []
    for name, frame in data_sets.items():
        folds = measure_folds(frame, metrics)
        for metric in metrics:
            found = folds[folds["metric"] == metric].groupby("model", sort=False)
            columns[name, _titled(metric)] = pd.Series(
                {model: _mean_and_deviation(_over_folds(part)) for model, part in found}
            )
        notes += _fold_notes(name, folds)
    models = list(dict.fromkeys(model for frame in data_sets.values() for model in models_of(frame)))
    cells = pd.DataFrame(columns).reindex(models).fillna("")
    cells.columns = pd.MultiIndex.from_tuples(list(columns))
    return Table(title, _with_models(cells), ("Mean ± standard deviation over folds.", *notes))


def table_of_differences(
    frame: pd.DataFrame,
    reference: str,
    metrics: Sequence[str] = ("accuracy", "auroc"),
    *,
    metric: str = "auroc",
    test: str = "corrected_t",
    test_over_train: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    title: str = "",
) -> Table:
    """Table 3 of the paper: variants on one data set, each against a reference.

    Args:
        frame: Checked predictions.
        reference: The model the others are compared with.
        metrics: Shown with pooled value and interval.
        metric: That differences are of.
        test: Whose p-value is shown: ``delong``, ``paired_t``, ``corrected_t`` or ``mcnemar``.
        test_over_train: See ``compare_with_reference``.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        title: Over the table.

    Raises:
        UnknownNameError: There is no such model, metric or test.
        TableError: The models are not of the same slides.
    """
    if test not in TESTS_WITH_P_VALUE:
        raise UnknownNameError("test", test, TESTS_WITH_P_VALUE)
    summary = summarize(frame, metrics, resamples=resamples, seed=seed)
    tests = compare_with_reference(
        frame, reference, metric=metric, test_over_train=test_over_train, resamples=resamples, seed=seed
    )
    cells = pd.DataFrame(index=pd.Index(models_of(frame)))
    for shown in metrics:
        of_metric = summary[summary["metric"] == shown].set_index("model")
        cells[_titled(shown)] = of_metric.apply(lambda row: _with_interval(row.pooled, row.low, row.high), axis=1)
    difference = tests[tests["test"] == "bootstrap"].set_index("model")
    p_values = tests[tests["test"] == test].set_index("model")
    cells["Difference"] = difference.apply(
        lambda row: _with_interval(row.difference, row.low, row.high, "+"), axis=1
    )
    cells["p"], cells["p (Holm)"] = p_values["p"].map(_p_text), p_values["p_holm"].map(_p_text)
    notes = (
        "Pooled out-of-fold values with 95 % intervals of a patient-level bootstrap.",
        f"Difference in {_titled(metric)} from {reference}; p-values of the test {test}, and after Holm for "
        f"{len(p_values)} comparisons.",
        *sorted({note for note in p_values["note"] if note}),
    )
    return Table(title, _with_models(cells.fillna("")), notes)


def table_of_multitask(
    frame: pd.DataFrame,
    patch_values: pd.DataFrame,
    metrics: Sequence[str] = ("accuracy", "auroc"),
    *,
    title: str = "",
) -> Table:
    """Table 4 of the paper: slide-only and multitask models, with the metrics of patches where a model has them.

    Args:
        frame: Checked predictions of slides.
        patch_values: ``model``, ``fold``, ``metric``, ``value`` and, if wanted, ``seed``: metrics over the patches
            of each fold, of which a table of predictions would be too long.
        metrics: Of slides.
        title: Over the table.

    Raises:
        TableError: ``patch_values`` lacks a column, or is of a model that ``frame`` does not have.
    """
    missing = [column for column in ("model", "fold", "metric", "value") if column not in patch_values.columns]
    if missing:
        raise TableError("patch values", f"lack {', '.join(missing)}")
    strangers = sorted(set(patch_values["model"]) - set(models_of(frame)))
    if strangers:
        raise TableError("patch values", f"are of {', '.join(strangers)}, which the predictions do not have")
    # as measure_folds does with slides: seeds are averaged where they hold back the same ones
    averaged = all(has_same_folds(rows_of(frame, model)) for model in models_of(frame))
    own_folds = ["seed"] if "seed" in patch_values.columns and not averaged else []
    keys = ["model", *own_folds, "fold", "metric"]
    by_fold = patch_values.groupby(keys, sort=False, as_index=False)["value"].mean()
    slides, columns = measure_folds(frame, metrics), {}
    for heading, values in (("Slides", slides), ("Patches", by_fold)):
        for metric in dict.fromkeys(values["metric"]):
            found = values[values["metric"] == metric].groupby("model", sort=False)
            columns[heading, _titled(metric)] = pd.Series(
                {model: _mean_and_deviation(_over_folds(part)) for model, part in found}
            )
    cells = pd.DataFrame(columns).reindex(models_of(frame)).fillna("–")
    cells.columns = pd.MultiIndex.from_tuples(list(columns))
    notes = ("Mean ± standard deviation over folds.", *_fold_notes("", slides))
    return Table(title, _with_models(cells), notes)


def table_of_long_slides(
    data_sets: Mapping[str, pd.DataFrame],
    lengths: Mapping[str, Mapping[str, int]],
    metrics: Sequence[str] = ("accuracy", "auroc"),
    *,
    percentile: float = LONG_PERCENTILE,
    title: str = "",
) -> Table:
    """Table 5 of the paper: the longest slides of each data set only.

    Args:
        data_sets: Checked predictions by the name of the data set.
        lengths: By data set and slide, the number of patches.
        metrics: Names.
        percentile: Slides at or above this percentile of length are kept.
        title: Over the table.

    Raises:
        TableError: A slide's length is not known.
    """
    kept, notes = {}, []
    for name, frame in data_sets.items():
        kept[name] = long_slides(frame, lengths[name], percentile=percentile, where=name)
        slides = kept[name]["slide"].unique()
        shortest = min(lengths[name][slide] for slide in slides)
        notes.append(f"{name}: {len(slides)} of {frame['slide'].nunique()} slides, from {shortest:,} patches on.")
    table = table_of_models(kept, metrics, title=title)
    return Table(title, table.cells, (*table.notes, *notes))


def long_slides(
    frame: pd.DataFrame,
    lengths: Mapping[str, int],
    *,
    percentile: float = LONG_PERCENTILE,
    where: str = "predictions",
) -> pd.DataFrame:
    """Keep the predictions of the longest slides.

    Args:
        frame: Checked predictions.
        lengths: By slide, the number of patches.
        percentile: Of the lengths of the slides in ``frame``, each counted once; linear between two.
        where: File or experiment, for the error.

    Returns:
        The rows of slides at or above it.

    Raises:
        TableError: A slide's length is not known.
        ValueError: ``percentile`` is none.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile lies between 0 and 100, got {percentile}")
    slides = list(dict.fromkeys(frame["slide"]))
    unknown = [slide for slide in slides if slide not in lengths]
    if unknown:
        rest = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise TableError(where, f"the number of patches is not known of {', '.join(unknown[:5])}{rest}")
    patches = np.array([lengths[slide] for slide in slides])
    long = patches >= np.percentile(patches, percentile)
    return frame[frame["slide"].isin({slide for slide, kept in zip(slides, long, strict=True) if kept})]


def table_of_summary(summary: pd.DataFrame, *, title: str = "") -> Table:
    """What ``summarize`` gives, for people: fold mean ± deviation, and pooled with interval, of each metric."""
    columns: dict[tuple[str, str], pd.Series] = {}
    for metric, part in summary.groupby("metric", sort=False):
        rows = part.set_index("model")
        columns[_titled(str(metric)), "folds"] = rows.apply(lambda row: _mean_and_deviation(dict(row)), axis=1)
        columns[_titled(str(metric)), "pooled"] = rows.apply(
            lambda row: _with_interval(row.pooled, row.low, row.high), axis=1
        )
    cells = pd.DataFrame(columns).reindex(list(dict.fromkeys(summary["model"])))
    cells.columns = pd.MultiIndex.from_tuples(list(columns))
    lower = [_titled(metric) for metric in dict.fromkeys(summary["metric"]) if metric in LOWER_IS_BETTER]
    notes = [
        "Mean ± standard deviation over folds; pooled out of fold with the interval of a patient-level bootstrap."
    ]
    notes += [f"Lower is better: {', '.join(lower)}."] if lower else []
    if "calibration_error" in set(summary["metric"]):
        notes.append("The calibration error, and its interval more so, is biased upwards in small sets.")
    notes += [f"{row.model}, {_titled(str(row.metric))}: {row.note}." for row in summary.itertuples() if row.note]
    return Table(title, _with_models(cells), tuple(notes))


def write_table(table: Table, path: str | Path) -> Path:
    """Write a table as Markdown (``.md``), CSV (``.csv``) or LaTeX for booktabs (``.tex``).

    Raises:
        ValueError: The suffix is none of these.
        OutputError: It cannot be written there.
    """
    path = Path(path)
    writers: dict[str, Callable[[Table], str]] = {".md": to_markdown, ".csv": to_csv, ".tex": to_latex}
    if path.suffix not in writers:
        raise ValueError(f"a table is written as {', '.join(writers)}, got {path.name}")
    try:
        path.write_text(writers[path.suffix](table), encoding="utf-8")
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror})") from error
    return path


def to_markdown(table: Table) -> str:
    """A table of GitHub's Markdown, under its title and over its notes."""
    cells = _with_one_heading(table.cells)
    rows = [list(cells.columns), [":--"] + ["--:"] * (cells.shape[1] - 1), *cells.to_numpy().tolist()]
    lines = [f"| {' | '.join(_markdown_text(cell) for cell in row)} |" for row in rows]
    title = [f"**{table.title}**", ""] if table.title else []
    notes = ["", *(f"{note}\n" for note in table.notes)] if table.notes else []
    return "\n".join([*title, *lines, *notes]).rstrip("\n") + "\n"


def to_csv(table: Table) -> str:
    """The cells alone, as they are printed."""
    return _with_one_heading(table.cells).to_csv(index=False, lineterminator="\n")


def to_latex(table: Table) -> str:
    """A ``table`` environment that needs the package booktabs, and multirow or siunitx nowhere."""
    cells = table.cells.map(_latex_text)
    cells.columns = cells.columns.map(
        lambda name: tuple(map(_latex_text, name)) if isinstance(name, tuple) else _latex_text(name)
    )
    levels = cells.columns.nlevels
    headings = [_latex_row(cells.columns.get_level_values(level).tolist()) for level in range(levels)]
    if levels == 2:
        headings[:1] = _latex_spans(cells.columns.get_level_values(0).tolist())
    lines = [
        r"\begin{table}",
        r"\centering",
        *([rf"\caption{{{_latex_text(table.title)}}}"] if table.title else []),
        rf"\begin{{tabular}}{{l{'r' * (cells.shape[1] - 1)}}}",
        r"\toprule",
        *headings,
        r"\midrule",
        *(_latex_row(row) for row in cells.to_numpy().tolist()),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\smallskip {{\footnotesize {_latex_text(note)}}}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _over_folds(folds: pd.DataFrame) -> dict[str, Any]:
    values = folds["value"].dropna().to_numpy(float)
    return {
        "fold_mean": float(values.mean()) if len(values) else float("nan"),
        "fold_sd": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
        "folds": len(values),
    }


def _note(folds: pd.DataFrame, interval: Interval) -> str:
    undefined = folds[folds["value"].isna()]
    notes = []
    if len(undefined):
        first = undefined.iloc[0]
        notes = [f"{len(undefined)} of {len(folds)} folds left out (fold {first['fold']}: {first['reason']})"]
    return "; ".join([*notes, f"no interval, {interval.reason}"] if interval.reason else notes)


def _fold_notes(data_set: str, folds: pd.DataFrame) -> list[str]:
    undefined = folds[folds["value"].isna()].drop_duplicates(["metric", "fold"])
    before = f"{data_set}, " if data_set else ""
    return [
        f"{before}{_titled(metric)}: folds without a value left out ({', '.join(map(str, part['fold']))})."
        for metric, part in undefined.groupby("metric", sort=False)
    ]


def _titled(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " ").capitalize())


def _with_models(cells: pd.DataFrame) -> pd.DataFrame:
    """The index as a first column, with the heading Model at the lowest level."""
    name = ("", "Model") if cells.columns.nlevels == 2 else "Model"
    models = cells.index.astype(str)
    cells = cells.reset_index(drop=True)
    cells.insert(0, name, models)
    return cells


def _mean_and_deviation(found: Mapping[str, Any]) -> str:
    if np.isnan(found["fold_mean"]):
        return "–"
    deviation = "" if np.isnan(found["fold_sd"]) else f" ± {found['fold_sd']:.3f}"
    return f"{found['fold_mean']:.3f}{deviation}"


def _with_interval(value: float, low: float, high: float, sign: str = "") -> str:
    if np.isnan(value):
        return "–"
    interval = "" if np.isnan(low) else f" ({_signed(low, sign)} to {_signed(high, sign)})"
    return f"{_signed(value, sign)}{interval}"


def _signed(value: float, sign: str) -> str:
    return f"{value:{sign}.3f}".replace("-", "−")


def _p_text(p_value: float) -> str:
    if np.isnan(p_value):
        return "–"
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _with_one_heading(cells: pd.DataFrame) -> pd.DataFrame:
    cells = cells.copy()
    if cells.columns.nlevels == 2:
        cells.columns = [" ".join(filter(None, name)) for name in cells.columns]
    return cells


def _markdown_text(cell: str) -> str:
    return str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "\n": " ",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in str(text))


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_spans(headings: list[str]) -> list[str]:
    """Headings that stand over several columns, with a rule under each."""
    spans: list[tuple[str, int, int]] = []
    for column, heading in enumerate(headings, 1):
        if spans and spans[-1][0] == heading:
            spans[-1] = (heading, spans[-1][1], column)
        else:
            spans.append((heading, column, column))
    cells = [rf"\multicolumn{{{last - first + 1}}}{{c}}{{{heading}}}" for heading, first, last in spans]
    rules = [rf"\cmidrule(lr){{{first}-{last}}}" for heading, first, last in spans if heading]
    return [_latex_row(cells), " ".join(rules)]
