"""What an experiment found: predictions, tables, figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from s4mil_monai.experiments.plan import Piece, Plan, find_lengths, find_test_over_train, load_data
from s4mil_monai.statistics.comparisons import compare_with_reference
from s4mil_monai.statistics.figures import (
    plot_confusion,
    plot_reliability,
    plot_roc,
    plot_training_curves,
    save_figure,
)
from s4mil_monai.statistics.predictions import PooledRuns, check_predictions, models_of, pool_runs
from s4mil_monai.statistics.tables import (
    Table,
    summarize,
    table_of_differences,
    table_of_long_slides,
    table_of_models,
    table_of_multitask,
    table_of_summary,
    write_table,
)

SHOWN = ("accuracy", "auroc")
"""Metrics of the paper's tables."""

PATCH_METRICS = {"patch_accuracy": "accuracy", "patch_auroc": "auroc", "patch_auroc_per_slide": "auroc_per_slide"}
"""Metrics of a training over patches, and their names under the heading Patches of Table 4."""


def collect_predictions(plan: Plan) -> pd.DataFrame:
    """Out-of-fold predictions of all finished pieces, checked."""
    frames = [_read_piece(piece) for piece in plan.pieces if piece.is_finished]
    return check_predictions(pd.concat(frames, ignore_index=True), str(plan.folder))


def _read_piece(piece: Piece) -> pd.DataFrame:
    # Names such as 007 or NA are text.
    frame = pd.read_csv(piece.folder / "predictions.csv", dtype=str, keep_default_na=False)
    return frame.assign(model=piece.model.name, fold=piece.fold, seed=piece.seed)


def collect_patch_metrics(plan: Plan) -> pd.DataFrame:
    """``model, seed, fold, metric, value`` over the patches of each finished piece that has patch scores."""
    rows = [
        {"model": piece.model.name, "seed": piece.seed, "fold": piece.fold, "metric": metric, "value": value}
        for piece in plan.pieces
        if piece.is_finished
        for name, value in read_metrics(piece).items()
        if value is not None and (metric := PATCH_METRICS.get(name))
    ]
    return pd.DataFrame(rows)


def read_metrics(piece: Piece) -> dict[str, float | None]:
    """What a finished training reported of its fold; None for a metric that is not defined there."""
    return json.loads((piece.folder / "metrics.json").read_text(encoding="utf-8"))


def write_results(plan: Plan) -> list[Path]:
    """Write predictions, tables and figures of what is finished; gives the files.

    Raises:
        TableError: Predictions contradict each other.
        OutputError: They cannot be written.
    """
    frame = collect_predictions(plan)
    predictions = plan.folder / "predictions.csv"
    frame.to_csv(predictions, index=False)
    return [predictions, *_write_tables(plan, frame), *_write_figures(plan, frame)]


def _write_tables(plan: Plan, frame: pd.DataFrame) -> list[Path]:
    settings = plan.settings
    dataset = load_data(settings.dataset, settings.seeds[0])
    name = dataset.settings.name
    summary = summarize(frame, settings.metrics)
    tables: dict[str, Table] = {
        "summary": table_of_summary(summary, title=f"{settings.name}: all metrics"),
        "models": table_of_models({name: frame}, SHOWN, title=f"{settings.name}: models"),
    }
    tests: pd.DataFrame | None = None
    if settings.reference is not None and len(models_of(frame)) > 1:
        ratio = find_test_over_train(plan)
        tables["differences"] = table_of_differences(
            frame, settings.reference, SHOWN, test_over_train=ratio, title=settings.name
        )
        tests = compare_with_reference(frame, settings.reference, test_over_train=ratio)
    patches = collect_patch_metrics(plan)
    if len(patches):
        tables["multitask"] = table_of_multitask(
            frame, patches, SHOWN, title=f"{settings.name}: slides and patches"
        )
    lengths = {name: find_lengths(settings)}
    if set(frame["slide"]) <= lengths[name].keys():
        tables["long_slides"] = table_of_long_slides(
            {name: frame},
            lengths,
            SHOWN,
            percentile=settings.percentile_long,
            title=f"{settings.name}: long slides",
        )
    folder = plan.folder / "tables"
    folder.mkdir(exist_ok=True)
    written = [
        write_table(table, folder / f"{stem}{suffix}")
        for stem, table in tables.items()
        for suffix in (".md", ".csv", ".tex")
    ]
    summary.to_csv(folder / "summary_numbers.csv", index=False)
    if tests is not None:
        tests.to_csv(folder / "tests.csv", index=False)
    return written


def _write_figures(plan: Plan, frame: pd.DataFrame) -> list[Path]:
    folder = plan.folder / "figures"
    dataset = load_data(plan.settings.dataset, plan.settings.seeds[0])
    written = (
        save_figure(plot_roc(frame), folder / "roc") if pool_runs(frame, models_of(frame)[0]).is_binary else []
    )
    for model in models_of(frame):
        pooled = pool_runs(frame, model)
        predicted = pooled.mean_probabilities.argmax(1)
        title = _title_of_mean(pooled)
        written += save_figure(
            plot_confusion(pooled.labels, predicted, dataset.table.classes, title=title),
            folder / f"confusion_{model}",
        )
        reliability = plot_reliability(pooled.labels, pooled.mean_probabilities, title=title)
        written += save_figure(reliability, folder / f"reliability_{model}")
        history = _history(plan, model)
        if history is not None:
            written += save_figure(plot_training_curves(history, title=model), folder / f"curves_{model}")
    return written


def _title_of_mean(pooled: PooledRuns) -> str:
    """A model's name, and that a figure of each slide's mean probability is not that of one training.

    Tables hold the mean of the trainings' figures instead.
    """
    most = int((~np.isnan(pooled.probabilities).any(2)).sum(0).max())
    return pooled.model if most == 1 else f"{pooled.model}, mean probability of {most} trainings"


def _history(plan: Plan, model: str) -> pd.DataFrame | None:
    """Metrics by epoch of all folds of a model; None for one that has no epochs."""
    frames = []
    for piece in plan.pieces:
        file = piece.folder / "history.csv"
        if piece.model.name == model and piece.is_finished and file.is_file():
            wide = pd.read_csv(file)
            columns = [column for column in ("train_loss", "val_auroc") if column in wide]
            long = wide.melt("epoch", columns, "metric", "value").dropna()
            frames.append(long.assign(fold=f"{piece.seed}/{piece.fold}"))
    return pd.concat(frames, ignore_index=True) if frames else None
