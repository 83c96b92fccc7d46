"""Folds: which slides train, choose the best epoch and test, each time; made, saved, reread and imported.

A patient's slides are never in two parts of a fold. Without an official test set, every slide is tested once over
all folds. With one, it is the test part of every fold, and what the folds divide is the rest.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from s4mil_monai.errors import OutputError, TableError
from s4mil_monai.training.bags import Bag
from s4mil_monai.training.labels import (
    SlideTable,
    list_names,
    name_rows,
    read_cells,
    require_columns,
    without_ending,
)
from s4mil_monai.training.splits import Split, standardize_split
from s4mil_monai.whole_file import write_whole

FoldKind = Literal["stratified", "site_preserved", "site_preserved_test"]
PARTS = ("train", "validation", "test")
COLUMNS = ("slide", "fold", "part")

PUBLISHED_COLUMNS = {"train": "train", "val": "validation", "test": "test"}
"""Columns of the authors' files, each with ``_label`` beside it, and the parts they are."""


@dataclass(frozen=True)
class Fold:
    """The slides of one fold, in the order of their table."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...] = ()

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Each part by its name."""
        return {name: getattr(self, name) for name in PARTS}


@dataclass(frozen=True)
class Folds:
    """All folds, counted from 0."""

    folds: tuple[Fold, ...]

    def __len__(self) -> int:
        return len(self.folds)

    @property
    def test_over_train(self) -> float | None:
        """Slides reported on over slides trained on, the mean over folds; for the corrected t-test.

        A fold without a test part reports on its validation part. None where a slide is reported on by two folds,
        as on one official test set: what folds have in common is then not their training slides alone.
        """
        reported = [fold.test or fold.validation for fold in self.folds]
        slides = [slide for part in reported for slide in part]
        if len(set(slides)) < len(slides):
            return None
        return float(
            np.mean([len(part) / len(fold.train) for part, fold in zip(reported, self.folds, strict=True)])
        )

    def split(self, fold: int, bags: Iterable[Bag], *, standardize: bool = False) -> Split:
        """The bags of one fold.

        Args:
            fold: Which one, counted from 0.
            bags: All bags of the data set; others may be among them.
            standardize: See :func:`~s4mil_monai.training.splits.standardize_split`; reads all features.

        Raises:
            ValueError: There is no such fold, or a slide of it has no bag.
        """
        if not 0 <= fold < len(self):
            raise ValueError(f"fold counts from 0 to {len(self) - 1}, got {fold}")
        by_slide = {bag.slide: bag for bag in bags}
        parts = self.folds[fold].parts()
        missing = [slide for part in parts.values() for slide in part if slide not in by_slide]
        if missing:
            raise ValueError(f"fold {fold} has slides without a bag: {list_names(missing)}")
        split = Split(**{name: [by_slide[slide] for slide in part] for name, part in parts.items()})
        return standardize_split(split) if standardize else split


# Making -------------------------------------------------------------------------------------------------------


def make_folds(
    table: SlideTable,
    *,
    folds: int = 10,
    seed: int = 0,
    kind: FoldKind = "stratified",
    validation_share: float | None = None,
    official_test: bool = True,
) -> Folds:
    """Divide the slides of a table.

    ``stratified`` deals out the patients of each class evenly, so that two folds differ by at most one patient of
    a class; a patient with slides of several classes counts for the rarest of them.

    ``site_preserved`` keeps each site whole: it trains, validates or tests in a fold. Classes are then as even as
    the sites allow. It needs as many sites of every class as folds, and sites to train and validate on beside.
    With few, ``site_preserved_test`` keeps only the test part's sites apart and draws patients of the other sites
    for validation; two hospitals make two folds. An official test set whose sites also train can do neither.

    Args:
        table: Checked slides.
        folds: How many.
        seed: Of the shuffles; the same seed gives the same folds.
        kind: What is kept together besides patients.
        validation_share: Share of the slides outside the test part that validate, drawn anew for each fold.
            Without, as many validate as a fold has (with 10 folds: 80 % train, 10 % validate, 10 % test), and
            beside an official test set every other slide validates once over all folds.
        official_test: Use the table's test slides, if it has any, as the test part of every fold.

    Raises:
        TableError: A patient is in the official test set and outside it, a site is unknown or has to be split, or
            a class is missing in a part. Fold, part and class, or the rows, are named.
        ValueError: An argument is out of its range.
    """
    if folds < 1 or (validation_share is not None and not 0 < validation_share < 1):
        raise ValueError(f"folds are 1 or more and validation_share is in (0, 1), got {folds}, {validation_share}")
    rows = table.rows
    by_site = kind != "stratified"
    if by_site:
        _refuse_unknown_sites(table)
    official = set(table.test_slides) if official_test else set()
    if folds == 1 and not (official and validation_share):
        raise ValueError("one fold needs an official test set and a validation_share")
    pool = rows[~rows["slide"].isin(official)]
    if official:
        _refuse_straddling(table, official, "site" if by_site else "patient")
        if validation_share is None:
            validations = _divide(table, pool, folds, seed, by_site=by_site)
        else:
            validations = [
                _draw(table, pool, validation_share, seed, fold, by_site=by_site) for fold in range(folds)
            ]
        made = [_fold(table, validation, official) for validation in validations]
    else:
        share = min(0.5, 1 / (folds - 1)) if validation_share is None else validation_share
        made = []
        for fold, test in enumerate(_divide(table, pool, folds, seed, by_site=by_site)):
            rest = pool[~pool["slide"].isin(test)]
            validation = _draw(table, rest, share, seed, fold, by_site=kind == "site_preserved")
            made.append(_fold(table, validation, test))
    _check(table.path, table, made)
    return Folds(tuple(made))


def _fold(table: SlideTable, validation: set[str], test: set[str]) -> Fold:
    train = set(table.slides) - validation - test
    return Fold(*(tuple(slide for slide in table.slides if slide in part) for part in (train, validation, test)))


def _divide(table: SlideTable, rows: pd.DataFrame, count: int, seed: int, *, by_site: bool) -> list[set[str]]:
    """Divide rows into ``count`` parts of whole patients or sites, each with its share of every class."""
    unit = "site" if by_site else "patient"
    for label, group in rows.groupby("label"):
        if (found := group[unit].nunique()) < count:
            raise TableError(
                table.path,
                f"{count} folds need {count} {unit}s with slides of each class; {_name(table, label)} has {found}",
            )
    if by_site:
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        parts = splitter.split(rows["slide"], rows["label"], rows["site"])
        return [set(rows["slide"].iloc[part]) for _, part in parts]
    patients = _patients(rows)
    splitter = StratifiedKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # Few patients count for a class whose slides others have too; whether it is in every part is checked.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        parts = [patients.index[part] for _, part in splitter.split(patients.index, patients)]
    return [set(rows["slide"][rows["patient"].isin(part)]) for part in parts]


def _draw(table: SlideTable, rows: pd.DataFrame, share: float, seed: int, fold: int, *, by_site: bool) -> set[str]:
    """Draw about ``share`` of the rows, of every class, as whole patients or sites."""
    if by_site:
        return _draw_sites(table, rows, share, seed + fold, fold)
    generator = np.random.default_rng([seed, fold])
    patients = _patients(rows)
    drawn: list[str] = []
    for label in sorted(patients.unique()):
        of_class = generator.permutation(patients.index[patients == label])
        drawn += list(of_class[: min(max(1, round(share * len(of_class))), len(of_class) - 1)])
    return set(rows["slide"][rows["patient"].isin(drawn)])


def _draw_sites(table: SlideTable, rows: pd.DataFrame, share: float, seed: int, fold: int) -> set[str]:
    """The best of the divisions into whole sites: all classes on both sides, and nearest to ``share``."""
    fewest = min(group["site"].nunique() for _, group in rows.groupby("label"))
    count = min(max(2, round(1 / share)), fewest)
    parts = _divide(table, rows, count, seed, by_site=True) if count > 1 else []
    classes = set(rows["label"])

    def has_all(part: set[str]) -> bool:
        inside = rows["slide"].isin(part)
        return classes == set(rows["label"][inside]) == set(rows["label"][~inside])

    usable = [part for part in parts if has_all(part)]
    if not usable:
        raise TableError(
            table.path,
            f"fold {fold}: the sites that are left cannot give both training and validation all classes; "
            "make fewer folds, or take site_preserved_test",
        )
    return min(usable, key=lambda part: abs(len(part) / len(rows) - share))


def _patients(rows: pd.DataFrame) -> pd.Series:
    """The class each patient counts for: of several, the one with the fewest patients."""
    frequency = rows.groupby("label")["patient"].nunique()
    rarest_first = rows.assign(frequency=rows["label"].map(frequency)).sort_values(["frequency", "label"])
    return rarest_first.groupby("patient")["label"].first().sort_index()


def _refuse_unknown_sites(table: SlideTable) -> None:
    rows = table.rows
    unknown = rows[rows["site"] == ""]
    if len(unknown):
        raise TableError(table.path, f"site-preserved folds need a site for {name_rows(unknown)}")
    _refuse_shared(table, rows.groupby("patient")["site"].nunique(), "patient", "comes from several sites")


def _refuse_straddling(table: SlideTable, official: set[str], unit: str) -> None:
    """Refuse a patient or site that is in the official test set and outside it."""
    inside = table.rows["slide"].isin(official)
    both = set(table.rows[unit][inside]) & set(table.rows[unit][~inside])
    if both:
        hint = "; site-preserved folds need official_test off" if unit == "site" else ""
        raise TableError(
            table.path, f"the official test set shares a {unit} with the rest: {list_names(sorted(both))}{hint}"
        )


def _refuse_shared(table: SlideTable, counts: pd.Series, unit: str, reason: str) -> None:
    shared = counts.index[counts > 1]
    if len(shared):
        rows = table.rows[table.rows[unit].isin(shared)]
        raise TableError(table.path, f"{unit} {list_names(list(shared))} {reason}: {name_rows(rows)}")


def _name(table: SlideTable, label: object) -> str:
    return f"class {table.classes[int(str(label))]}"


# Checking -----------------------------------------------------------------------------------------------------


def _check(path: str, table: SlideTable, folds: Sequence[Fold]) -> None:
    """Refuse a patient in two parts of a fold, and a part without some class."""
    for number, fold in enumerate(folds):
        part_of = {slide: name for name, part in fold.parts().items() for slide in part}
        rows = table.rows.assign(part=table.rows["slide"].map(part_of)).dropna(subset="part")
        torn = rows.groupby("patient")["part"].nunique()
        for patient in torn.index[torn > 1]:
            where = rows[rows["patient"] == patient]
            slides = ", ".join(f"{row.slide} in {row.part}" for row in where.head(5).itertuples())
            raise TableError(path, f"fold {number}: patient {patient} is in two parts: {slides}")
        for part in PARTS:
            found = set(rows["label"][rows["part"] == part])
            missing = [name for label, name in enumerate(table.classes) if label not in found]
            if missing and (found or part != "test"):  # published folds may have no test part
                raise TableError(path, f"fold {number}: no slide of class {', '.join(missing)} in {part}")


def _collect(path: str, table: SlideTable, rows: pd.DataFrame) -> Folds:
    """Folds of rows ``slide``, ``fold``, ``part``, ``line``, checked against the table of slides."""
    unknown = rows[~rows["slide"].isin(table.slides)]
    if len(unknown):
        raise TableError(path, f"has slides that {table.path} has not: {name_rows(unknown)}")
    numbers = sorted(rows["fold"].unique())
    if numbers != list(range(len(numbers))):
        raise TableError(path, f"folds count from 0 without a gap, and are {list_names(numbers)}")
    folds: list[Fold] = []
    for number, of_fold in rows.groupby("fold"):
        twice = of_fold[of_fold["slide"].duplicated(keep=False)]
        if len(twice):
            raise TableError(path, f"fold {number} names a slide twice: {name_rows(twice)}")
        missing = table.rows[~table.rows["slide"].isin(of_fold["slide"])]
        if len(missing):
            raise TableError(path, f"fold {number} lacks slides of {table.path}: {name_rows(missing)}")
        parts = {name: set(of_fold["slide"][of_fold["part"] == name]) for name in PARTS}
        folds.append(_fold(table, parts["validation"], parts["test"]))
    _check(path, table, folds)
    return Folds(tuple(folds))


# Files --------------------------------------------------------------------------------------------------------


def save_folds(folds: Folds, path: str | Path) -> None:
    """Write folds as a CSV with the columns ``slide``, ``fold`` and ``part``; it appears when it is whole.

    Raises:
        OutputError: It cannot be written.
    """
    path = Path(path)
    rows = [
        (slide, number, name)
        for number, fold in enumerate(folds.folds)
        for name, part in fold.parts().items()
        for slide in part
    ]
    rows = pd.DataFrame(rows, columns=list(COLUMNS))
    try:
        write_whole(path, rows.to_csv(index=False, lineterminator="\n"))
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror or error})") from error


def read_folds(path: str | Path, table: SlideTable) -> Folds:
    """Read folds, and check them against the table of slides they are to be used with.

    Raises:
        TableError: It is no table of folds, has a slide that the table has not or lacks one that it has, has a
            slide or a patient in two parts of a fold, or a part without some class.
    """
    cells = read_cells(path)
    require_columns(path, cells, COLUMNS)
    odd = cells[~cells["part"].isin(PARTS)]
    if len(odd):
        raise TableError(str(path), f"parts are {', '.join(PARTS)}; they are not in {name_rows(odd)}")
    odd = cells[~cells["fold"].str.fullmatch(r"\d{1,6}")]
    if len(odd):
        raise TableError(str(path), f"folds are numbers 0, 1, …; they are not in {name_rows(odd)}")
    return _collect(str(path), table, cells.assign(fold=cells["fold"].astype(int)))


def read_folds_of_any_layout(path: str | Path, table: SlideTable) -> Folds:
    """Read folds as :func:`save_folds` writes them, or in the authors' layout: a folder, or a ``train`` column.

    Raises:
        TableError: As :func:`read_folds` and :func:`import_published_folds` say.
    """
    published = Path(path).is_dir() or "train" in read_cells(path)
    return import_published_folds(path, table) if published else read_folds(path, table)


def import_published_folds(path: str | Path, table: SlideTable) -> Folds:
    """Read folds in the authors' layout: one CSV a fold, with slides and class numbers of the three parts.

    The columns are ``train``, ``train_label``, ``val``, ``val_label``, ``test`` and ``test_label``, each as long
    as its part; others, such as a row number, are not looked at.

    Args:
        path: One file, or a folder of them, taken in the order of the numbers in their names.
        table: The slides they divide.

    Raises:
        TableError: A file has another layout or another label than the table, or is refused as in
            :func:`read_folds`.
    """
    path = Path(path)
    files = sorted(path.glob("*.csv"), key=_natural) if path.is_dir() else [path]
    if not files:
        raise TableError(str(path), "has no CSV files")
    folds: list[Fold] = []
    for file in files:
        rows = _read_published(file)
        _refuse_other_labels(file, table, rows)
        folds += _collect(str(file), table, rows.assign(fold=0)).folds
    return Folds(tuple(folds))


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that puts ``fold2`` before ``fold10``."""
    return [(int(word) if word.isdigit() else -1, word) for word in re.split(r"(\d+)", path.name)]


def _read_published(path: Path) -> pd.DataFrame:
    cells = read_cells(path)
    parts = []
    for column, part in PUBLISHED_COLUMNS.items():
        require_columns(path, cells, (column, f"{column}_label"))
        of_part = pd.DataFrame(
            {
                "slide": cells[column].map(without_ending),
                "label": cells[f"{column}_label"],
                "part": part,
                "line": cells["line"],
            }
        )
        parts.append(of_part[(of_part["slide"] != "") | (of_part["label"] != "")])
    return pd.concat(parts, ignore_index=True)


def _refuse_other_labels(path: Path, table: SlideTable, rows: pd.DataFrame) -> None:
    expected = rows["slide"].map(dict(zip(table.slides, table.rows["label"], strict=True)))
    told = pd.Series(pd.to_numeric(rows["label"], errors="coerce"), rows.index)
    odd = rows[expected.notna() & (told != expected)]
    if len(odd):
        raise TableError(str(path), f"has other labels than {table.path} for {name_rows(odd, labels=True)}")
