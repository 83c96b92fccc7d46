"""The table of out-of-fold predictions: its contract, its reader, and how its rows make runs.

One row is what one trained model says of one slide that it was not trained on:

=========================  ==========================================================================
``model``                  Name of the model, as it stands in the tables.
``fold``                   Fold that held the slide back, counted from 0.
``seed``                   Optional; of the training, 0 where the column is absent.
``slide``, ``patient``     Pseudonyms. A patient's slides are resampled together.
``label``                  Number of the true class, counted from 0; of two classes, 1 is the positive.
``p_0`` … ``p_{C-1}``      Probability of each class; they add up to 1.
``logit_0`` …              Optional, for calibration; all of them or none.
=========================  ==========================================================================

Further columns are kept and not looked at.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from s4mil_monai.errors import TableError, UnknownNameError

TEXT_COLUMNS = ("model", "slide", "patient")
INTEGER_COLUMNS = ("fold", "label", "seed")
COLUMNS = ("model", "fold", "slide", "patient", "label")

SUM_TOLERANCE = 1e-3
"""How far the probabilities of a row may be from 1 in sum; tables are written with few digits."""


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read a CSV of out-of-fold predictions and check it.

    Raises:
        TableError: It cannot be read, or breaks the contract of this module.
    """
    try:
        # Names such as 007 or NA are text.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except OSError as error:
        raise TableError(str(path), f"cannot be read ({error.strerror})") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise TableError(str(path), f"cannot be read as CSV ({error})") from error
    return check_predictions(frame, str(path))


def check_predictions(frame: pd.DataFrame, where: str = "predictions") -> pd.DataFrame:
    """Check a table of predictions against the contract of this module.

    Args:
        frame: The table; left as it is.
        where: File or experiment it comes from, for the error.

    Returns:
        A copy with a plain index, a ``seed`` column, text, whole numbers and floats of their kinds, and
        probabilities that add up to 1 exactly.

    Raises:
        TableError: A column is missing; a value is missing or of the wrong kind; probabilities leave [0, 1] or
            do not add up to 1; a slide comes twice in one fold of one training; a slide has two labels or two
            patients; slides of one patient lie in two folds. Rows are counted from 1, without the header.
    """
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise TableError(where, f"lacks {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise TableError(where, "holds no rows")
    checked = frame.reset_index(drop=True).copy()
    if "seed" not in checked.columns:
        checked["seed"] = 0
    _check_text(checked, where)
    _check_numbers(checked, where)
    _check_probabilities(checked, where)
    _check_slides(checked, where)
    return checked


def probability_columns(frame: pd.DataFrame) -> list[str]:
    """``p_0`` … ``p_{C-1}``, as many as there are without a gap."""
    return _numbered(frame, "p_")


def logit_columns(frame: pd.DataFrame) -> list[str]:
    """``logit_0`` …; empty where the table has none."""
    return _numbered(frame, "logit_")


def models_of(frame: pd.DataFrame) -> list[str]:
    """The models, in the order in which the table has them."""
    return list(dict.fromkeys(frame["model"]))


def rows_of(frame: pd.DataFrame, model: str) -> pd.DataFrame:
    """The rows of one model.

    Raises:
        UnknownNameError: The table has no such model.
    """
    rows = frame[frame["model"] == model]
    if rows.empty:
        raise UnknownNameError("model", model, tuple(models_of(frame)))
    return rows


def is_cross_validation(rows: pd.DataFrame) -> bool:
    """Whether each slide is held back by one fold, so that the folds of a seed make one run.

    It is not where all folds are tested on one official test set, or folds are drawn at random and overlap.
    """
    return not rows.duplicated(["model", "seed", "slide"]).any()


def has_same_folds(rows: pd.DataFrame) -> bool:
    """Whether a fold of one number holds back the same slides under every seed."""
    held_back: dict[Hashable, set[str]] = {}
    for (_, fold), part in rows.groupby(["seed", "fold"]):
        slides = set(part["slide"])
        if held_back.setdefault(fold, slides) != slides:
            return False
    return True


@dataclass(frozen=True)
class PooledRuns:
    """What one model said of each slide, in every run.

    A run has each slide once at most: all folds of a seed in cross-validation, else one fold of one seed. A
    figure of several runs is the mean of the figure of each; probabilities of different trainings are never
    mixed, which would be the figure of an ensemble.
    """

    model: str
    slides: np.ndarray
    """(n,) names, sorted."""
    patients: np.ndarray
    """(n,) names."""
    labels: np.ndarray
    """(n,) class numbers."""
    probabilities: np.ndarray
    """(R, n, C); NaN where a run has not seen a slide."""

    @property
    def is_binary(self) -> bool:
        """Whether there are two classes."""
        return self.probabilities.shape[2] == 2

    @property
    def is_complete(self) -> bool:
        """Whether every run has every slide."""
        return not np.isnan(self.probabilities).any()

    @property
    def mean_probabilities(self) -> np.ndarray:
        """(n, C): the mean over runs, for tests that want one prediction a slide."""
        return np.nanmean(self.probabilities, 0)


def pool_runs(frame: pd.DataFrame, model: str) -> PooledRuns:
    """Collect the out-of-fold predictions of one model.

    Raises:
        UnknownNameError: The table has no such model.
    """
    rows = rows_of(frame, model)
    facts = rows.drop_duplicates("slide").sort_values("slide")
    place = pd.Index(facts["slide"])
    columns = probability_columns(rows)
    runs = list(rows.groupby("seed" if is_cross_validation(rows) else ["seed", "fold"]))
    probabilities = np.full((len(runs), len(facts), len(columns)), np.nan)
    for run, (_, part) in enumerate(runs):
        probabilities[run, place.get_indexer(pd.Index(part["slide"]))] = part[columns].to_numpy(float)
    return PooledRuns(
        model,
        facts["slide"].to_numpy(str),
        facts["patient"].to_numpy(str),
        facts["label"].to_numpy(int),
        probabilities,
    )


def _numbered(frame: pd.DataFrame, prefix: str) -> list[str]:
    columns: list[str] = []
    while f"{prefix}{len(columns)}" in frame.columns:
        columns.append(f"{prefix}{len(columns)}")
    return columns


def _check_text(frame: pd.DataFrame, where: str) -> None:
    for column in TEXT_COLUMNS:
        empty = frame[column].isna() | (frame[column].astype(str).str.strip() == "")
        _refuse(frame, empty, where, f"{column} is empty")
        frame[column] = frame[column].astype(str)


def _check_numbers(frame: pd.DataFrame, where: str) -> None:
    for column in INTEGER_COLUMNS:
        values = pd.to_numeric(frame[column], errors="coerce")
        _refuse(frame, ~(values.round() == values) | (values < 0), where, f"{column} is no whole number from 0 on")
        frame[column] = values.astype(int)
    for column in (*probability_columns(frame), *logit_columns(frame)):
        values = pd.to_numeric(frame[column], errors="coerce").astype(float)
        _refuse(frame, ~np.isfinite(values), where, f"{column} is no number")
        frame[column] = values


def _check_probabilities(frame: pd.DataFrame, where: str) -> None:
    columns = probability_columns(frame)
    if len(columns) < 2:
        raise TableError(where, f"lacks p_0 and p_1; it has {', '.join(map(str, frame.columns))}")
    if len(logit_columns(frame)) not in (0, len(columns)):
        raise TableError(where, f"has {len(logit_columns(frame))} logits and {len(columns)} probabilities")
    values = frame[columns].to_numpy(float)
    _refuse(frame, ((values < 0) | (values > 1)).any(1), where, "a probability is outside [0, 1]")
    total = values.sum(1, keepdims=True)
    _refuse(frame, np.abs(total[:, 0] - 1) > SUM_TOLERANCE, where, "probabilities do not add up to 1")
    frame[columns] = values / total
    wanted = f"label is none of the classes 0 to {len(columns) - 1}"
    _refuse(frame, frame["label"] >= len(columns), where, wanted)


def _check_slides(frame: pd.DataFrame, where: str) -> None:
    twice = frame.duplicated(["model", "seed", "fold", "slide"])
    _refuse(frame, twice, where, "slide comes twice in one fold of one model and seed")
    for column in ("label", "patient"):
        several = frame.groupby("slide")[column].transform("nunique") > 1
        _refuse(frame, several, where, f"slide has more than one {column}")
    if is_cross_validation(frame):
        leaking = frame.groupby(["model", "seed", "patient"])["fold"].transform("nunique") > 1
        _refuse(frame, leaking, where, "slides of one patient lie in more than one fold")


def _refuse(frame: pd.DataFrame, bad: pd.Series | np.ndarray, where: str, reason: str) -> None:
    rows = np.flatnonzero(np.asarray(bad)).tolist()
    if rows:
        raise TableError(where, f"{reason}: {_listed(_named(frame, row) for row in rows)}")


def _named(frame: pd.DataFrame, row: int) -> str:
    return f"row {row + 1} (slide {frame['slide'].iloc[row]})"


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
