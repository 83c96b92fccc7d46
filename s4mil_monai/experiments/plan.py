"""The work of an experiment, piece by piece, and where each piece lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pandas as pd

from s4mil_monai.experiments.settings import ExperimentError, ExperimentSettings, ModelSettings
from s4mil_monai.training.datasets import Dataset, load_dataset, read_dataset
from s4mil_monai.training.folds import Folds, make_folds, read_folds, read_folds_of_any_layout, save_folds
from s4mil_monai.training.labels import SlideTable, name_rows
from s4mil_monai.whole_file import write_whole

FINISHED = "finished.json"
"""Written last into the folder of a piece; what lacks it is run, or goes on."""


CHECKPOINTS = "checkpoint_*.pt"
"""Some 15 MB a training, of no use once it is finished."""


@dataclass(frozen=True)
class Piece:
    """One training: a model, on one fold, with one seed."""

    model: ModelSettings
    seed: int
    fold: int
    folder: Path
    folds_table: Path

    @property
    def is_finished(self) -> bool:
        """Whether it was run to its end."""
        return (self.folder / FINISHED).is_file()

    def finish(self, seconds: float) -> None:
        """Mark it as run to its end; what was kept to go on from is let go."""
        write_json(self.folder / FINISHED, {"seconds": round(seconds, 3)})
        for checkpoint in self.folder.glob(CHECKPOINTS):
            checkpoint.unlink()


@dataclass(frozen=True)
class Plan:
    """All pieces of an experiment in a folder."""

    settings: ExperimentSettings
    folder: Path
    pieces: tuple[Piece, ...]

    @property
    def unfinished(self) -> tuple[Piece, ...]:
        """The pieces that are still to be run."""
        return tuple(piece for piece in self.pieces if not piece.is_finished)


def plan_experiment(settings: ExperimentSettings, folder: Path) -> Plan:
    """Make an experiment's folder with its settings and folds, or find it as it was made before.

    Raises:
        ExperimentError: The folder holds another experiment.
        TableError: The labels or folds are wrong.
    """
    _keep_settings(settings, folder)
    tables = {seed: _keep_folds(settings, folder, seed) for seed in settings.seeds}
    pieces = [
        Piece(model, seed, fold, folder / "runs" / model.name / f"seed{seed}" / f"fold{fold}", table)
        for seed, (table, count) in tables.items()
        for fold in range(count)
        for model in settings.models
    ]
    return Plan(settings, folder, tuple(pieces))


def load_data(settings_path: Path, seed: int) -> Dataset:
    """The data set of an experiment; composed bags are composed anew by each seed."""
    settings = read_dataset(settings_path)
    if settings.kind == "composed_colon":
        settings = settings.model_copy(update={"seed": seed})
    return load_dataset(settings)


def load_folds(dataset: Dataset, folds_table: Path) -> Folds:
    """The folds that an experiment keeps in a table."""
    return read_folds(folds_table, dataset.table)


def find_test_over_train(plan: Plan) -> float | None:
    """Slides tested over slides trained on, the mean over all folds; None where folds share their test slides."""
    tables = {piece.seed: piece.folds_table for piece in plan.pieces}
    folds = [load_folds(load_data(plan.settings.dataset, seed), table) for seed, table in tables.items()]
    ratios = [ratio for of_seed in folds if (ratio := of_seed.test_over_train) is not None]
    return fmean(ratios) if len(ratios) == len(folds) else None


def _keep_settings(settings: ExperimentSettings, folder: Path) -> None:
    kept = folder / "experiment.json"
    now = json.loads(settings.model_dump_json())
    now["dataset_settings"] = json.loads(read_dataset(settings.dataset).model_dump_json())
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        before.setdefault("dataset_settings", now["dataset_settings"])  # of a version that did not keep them
        changed = [key for key in now if before.get(key) != now[key] and key not in _MAY_CHANGE]
        added = [model for model in now["models"] if model not in before.get("models", [])]
        gone = [model["name"] for model in before.get("models", []) if model not in now["models"]]
        if changed or gone:
            what = ", ".join([*changed, *(f"model {name}" for name in gone)])
            raise ExperimentError(
                str(folder), f"holds an experiment with other settings ({what}); choose another --out"
            )
        if not added and before == now:
            return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(kept, now)


_MAY_CHANGE = ("models", "metrics", "reference", "percentile_long")
"""Models may be added, and tables made anew; what was trained stays as it is."""


def _keep_labels(table: SlideTable, folder: Path, seed: int) -> None:
    """Refuse to go on with other labels or patients than before; folds know slides by name alone."""
    kept = folder / f"slides_seed{seed}.csv"
    now = table.rows[["slide", "label", "patient", "site"]].astype(str)
    if not kept.is_file():
        write_whole(kept, now.to_csv(index=False, lineterminator="\n"))
        return
    before = pd.read_csv(kept, dtype=str, keep_default_na=False).set_index("slide")
    changed = ~(before.reindex(now["slide"]).to_numpy() == now.drop(columns="slide").to_numpy()).all(axis=1)
    if changed.any():
        raise ExperimentError(
            str(folder),
            f"was begun with another label, patient or site for {name_rows(table.rows[changed])} of {table.path}; "
            "choose another --out",
        )


def _keep_folds(settings: ExperimentSettings, folder: Path, seed: int) -> tuple[Path, int]:
    """The table of folds of one seed, drawn if it is not there yet, and their number."""
    table = folder / f"folds_seed{seed}.csv"
    dataset = load_data(settings.dataset, seed)
    _keep_labels(dataset.table, folder, seed)
    if not table.is_file():
        save_folds(_draw(settings, dataset, seed), table)
    return table, len(read_folds(table, dataset.table))


def _draw(settings: ExperimentSettings, dataset: Dataset, seed: int) -> Folds:
    if dataset.folds is not None:
        return dataset.folds
    if settings.folds_table is not None:
        return read_folds_of_any_layout(settings.folds_table, dataset.table)
    return make_folds(dataset.table, folds=settings.folds, seed=seed, kind=settings.fold_kind)


def write_json(path: Path, content: object) -> None:
    """Write JSON whose name appears when it is whole."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def find_lengths(settings: ExperimentSettings) -> dict[str, int]:
    """Each slide of an experiment with its number of patches."""
    composed_anew = read_dataset(settings.dataset).kind == "composed_colon"
    seeds = settings.seeds if composed_anew else settings.seeds[:1]
    return {bag.slide: bag.length for seed in seeds for bag in load_data(settings.dataset, seed).bags}
