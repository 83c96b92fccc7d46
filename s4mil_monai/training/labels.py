"""Tables of slides: which class each is of, whose it is and where it comes from.

Everything wrong with a table is refused with its rows named, since a slide that is silently left out or labelled
wrongly is found by nobody. Cells are texts: slide ``007`` stays ``007``, and a site may be called ``NA``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from s4mil_monai.errors import TableError

CAMELYON16_CLASSES = ("normal", "tumour")
MUTATION_CLASSES = ("wild type", "mutated")
RCC_CLASSES = ("KIRC", "KIRP", "KICH")

RCC_ALIASES = {"CCRCC": "KIRC", "PRCC": "KIRP", "CHRCC": "KICH"}
"""OncoTree's names of the subtypes, as CLAM's tables have them, and TCGA's of the projects."""

ENDINGS = (".npy", ".h5", ".pt", ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".dcm")
"""Left off a slide's name, one after the other; the name of a TCGA slide has another point in it."""

BARCODE = re.compile(r"TCGA-(?P<site>[0-9A-Z]{2})-[0-9A-Z]{4}(?=-|$)")
DIAGNOSTIC = re.compile(r"TCGA-\w{2}-\w{4}-\w{3}-\w{2}-DX")
TRUTH = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}


class SlideEntry(NamedTuple):
    """One row of a table of slides."""

    slide: str
    label: int
    """Class number."""
    patient: str
    site: str
    """Empty where it is unknown."""


@dataclass(frozen=True)
class SlideTable:
    """Slides that were checked: each once, each with a class that has a name."""

    path: str
    """Where they were read; names the table in errors."""
    rows: pd.DataFrame
    """Columns ``slide``, ``label`` (class number), ``patient``, ``site`` (or empty), ``line`` in the file."""
    classes: tuple[str, ...]
    """Names; class 0 comes first."""
    test_slides: tuple[str, ...] = ()
    """The official test set; empty where a data set has none."""
    notes: tuple[str, ...] = ()
    """What was decided while reading, for whoever reports on the data."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def slides(self) -> tuple[str, ...]:
        """Names, in the order of the table."""
        return tuple(self.rows["slide"])

    def entries(self) -> Iterator[SlideEntry]:
        """The rows one by one, in the order of the table."""
        columns = (self.rows[name].tolist() for name in SlideEntry._fields)
        return map(SlideEntry._make, zip(*columns, strict=True))

    def counts(self) -> dict[str, int]:
        """How many slides each class has."""
        found = self.rows["label"].value_counts()
        return {name: int(found.get(i, 0)) for i, name in enumerate(self.classes)}

    def take(self, slides: Iterable[str]) -> pd.DataFrame:
        """The rows of some slides, in the order of the table."""
        return self.rows[self.rows["slide"].isin(set(slides))]


# A user's own table -------------------------------------------------------------------------------------------


def read_slide_table(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    slide_column: str = "slide",
    label_column: str = "label",
    patient_column: str | None = None,
    site_column: str | None = None,
) -> SlideTable:
    """Read a CSV with one row a slide.

    Args:
        path: The table.
        classes: Names of the classes, class 0 first. Labels are then names or numbers; without, they are numbers
            0, 1, …, because no order can be guessed from names.
        slide_column: Holds the slide's file name without ending.
        label_column: Holds the class.
        patient_column: Holds the patient; without, ``patient`` if there is such a column, and else every slide
            counts as a patient of its own.
        site_column: Holds the hospital or laboratory; without, ``site`` if there is such a column.

    Raises:
        TableError: The table cannot be read, lacks a column, a slide, a label or a patient, names a slide twice,
            has an unknown label, or no slide of some class. The rows are named.
    """
    cells = read_cells(path)
    needed = [slide_column, label_column, patient_column, site_column]
    require_columns(path, cells, [column for column in needed if column])
    patients, sites = patient_column or "patient", site_column or "site"
    rows = pd.DataFrame(
        {
            "slide": cells[slide_column],
            "label": cells[label_column],
            "patient": cells[patients] if patients in cells else cells[slide_column],
            "site": cells.get(sites, ""),
            "line": cells["line"],
        }
    )
    return check_slides(path, rows, classes)


def check_slides(path: str | Path, rows: pd.DataFrame, classes: Sequence[str] | None) -> SlideTable:
    """Check rows of texts (``slide``, ``label``, ``patient``, ``site``, ``line``) and number their classes.

    Raises:
        TableError: As :func:`read_slide_table` says.
    """
    table = str(path)
    if not len(rows):
        raise TableError(table, "has no slides")
    for column, what in (("slide", "slide"), ("label", "label"), ("patient", "patient")):
        _refuse(table, rows[rows[column] == ""], f"there is no {what} in")
    _refuse(table, rows[rows["slide"].map(_is_path)], "slides are file names without folder; they are not in")
    _refuse(table, rows[rows["slide"].duplicated(keep=False)], "a slide has one row, and these have more:")
    numbers, names = _number_classes(table, rows, classes)
    checked = rows.assign(label=numbers).reset_index(drop=True)
    _refuse_missing_classes(table, checked, names)
    return SlideTable(table, checked[["slide", "label", "patient", "site", "line"]], names)


def _number_classes(
    table: str, rows: pd.DataFrame, classes: Sequence[str] | None
) -> tuple[pd.Series, tuple[str, ...]]:
    """The class number of each row, and the classes' names."""
    if classes is None:
        numbers = rows["label"].map(_as_class_number)
        _refuse(
            table,
            rows[numbers.isna()],
            "without declared classes, labels are class numbers 0, 1, …; they are not for",
            labels=True,
        )
        return numbers.astype(int), tuple(str(i) for i in range(int(numbers.max()) + 1))
    known = {str(i): i for i in range(len(classes))}
    known.update({name: i for i, name in enumerate(classes)})

    def number_of(label: str) -> int | None:
        return known.get(label, known.get(_plain_number(label) or ""))

    numbers = rows["label"].map(number_of)
    _refuse(table, rows[numbers.isna()], f"labels are {', '.join(classes)}; they are not for", labels=True)
    return numbers.astype(int), tuple(classes)


def _refuse_missing_classes(table: str, rows: pd.DataFrame, names: tuple[str, ...]) -> None:
    found = set(rows["label"])
    if len(found) == 1:
        raise TableError(
            table, f"all {len(rows)} slides are of class {names[found.pop()]}; two classes are needed"
        )
    missing = [name for i, name in enumerate(names) if i not in found]
    if missing:
        raise TableError(table, f"no slide is of class {', '.join(missing)}; classes count from 0")


def _as_class_number(label: str) -> float | None:
    plain = _plain_number(label)
    # More classes than this are a column of something else.
    return int(plain) if plain is not None and plain.isdigit() and int(plain) < 1000 else None


def _plain_number(label: str) -> str | None:
    """``1`` for ``1`` and for ``1.0``, which spreadsheets and pandas make of it."""
    match = re.fullmatch(r"(\d{1,9})(?:\.0*)?", label)
    return str(int(match[1])) if match else None


def _is_path(slide: str) -> bool:
    return "/" in slide or "\\" in slide or slide in (".", "..")


# Reading cells ------------------------------------------------------------------------------------------------


def read_cells(path: str | Path, *, header: bool = True) -> pd.DataFrame:
    """All cells of a CSV as texts without blanks around them, and ``line``, where each row stands in the file.

    Raises:
        TableError: It is missing or no CSV.
    """
    try:
        cells = pd.read_csv(
            path,
            dtype=str,
            header=0 if header else None,
            keep_default_na=False,
            skip_blank_lines=False,
            encoding="utf-8-sig",
        )
    except (OSError, ValueError) as error:
        raise TableError(str(path), f"cannot be read as CSV ({' '.join(str(error).split())})") from error
    if not isinstance(cells.index, pd.RangeIndex):
        raise TableError(str(path), "cannot be read as CSV (its rows have more cells than its header)")
    cells = cells.fillna("").apply(lambda column: column.str.strip())
    cells = cells.rename(columns=lambda name: name.strip() if isinstance(name, str) else name)
    empty = (cells == "").all(axis=1)
    return cells.assign(line=cells.index + (2 if header else 1))[~empty]


def require_columns(path: str | Path, cells: pd.DataFrame, columns: Iterable[str]) -> None:
    """Refuse a table that lacks a column.

    Raises:
        TableError: It does; the columns it has are listed.
    """
    there = [column for column in cells.columns if column != "line"]
    for column in columns:
        if column not in there:
            raise TableError(str(path), f"lacks the column {column!r}; it has {', '.join(there)}")


def name_rows(rows: pd.DataFrame, *, labels: bool = False) -> str:
    """The first rows of a table in words: ``line 3 (slide_a), line 5 (slide_b)``."""
    named = [
        f"line {row['line']} ({row['slide'] or 'no slide'}{': ' + repr(row['label']) if labels else ''})"
        for _, row in rows.head(5).iterrows()
    ]
    return list_names(named, total=len(rows))


def list_names(names: Sequence[object], *, total: int | None = None) -> str:
    """The first five of some names, and how many more there are."""
    total = len(names) if total is None else total
    shown = ", ".join(str(name) for name in names[:5])
    return shown if total <= 5 else f"{shown} and {total - 5} more"


def _refuse(table: str, rows: pd.DataFrame, reason: str, *, labels: bool = False) -> None:
    if len(rows):
        raise TableError(table, f"{reason} {name_rows(rows, labels=labels)}")


def without_ending(name: str) -> str:
    """A slide's name without the endings of slide and feature files.

    >>> without_ending("tumor_001.tif.npy"), without_ending("TCGA-05-4244-01Z-00-DX1.d4ff32cd.svs")
    ('tumor_001', 'TCGA-05-4244-01Z-00-DX1.d4ff32cd')
    """
    while name.lower().endswith(ENDINGS):
        name = name[: name.rindex(".")]
    return name


# CAMELYON16 ---------------------------------------------------------------------------------------------------


def read_camelyon16(
    labels: str | Path,
    *,
    metadata: str | Path | None = None,
    reference: str | Path | None = None,
    classes: Sequence[str] = CAMELYON16_CLASSES,
) -> SlideTable:
    """Read CAMELYON16's slides.

    Args:
        labels: CSV with ``filenames`` and ``tumor`` (True or False).
        metadata: CSV with ``slide_name`` and ``hospital_corrected`` (or ``hospital``), which is the site.
        reference: The challenge's ``reference.csv``, without header: slide, Normal or Tumor, kind, size. Its
            slides are the official test set, and it is right where ``labels`` says something else, as for
            Test_114; such slides, and those of it that ``labels`` lacks, as Test_049, are noted.
        classes: Names of normal and tumour.

    Raises:
        TableError: One of the tables is wrong, or lacks a slide of ``labels``.
    """
    cells = read_cells(labels)
    require_columns(labels, cells, ("filenames", "tumor"))
    slides = cells["filenames"].map(without_ending)
    sites = pd.Series("", cells.index) if metadata is None else slides.map(_read_hospitals(metadata))
    rows = pd.DataFrame(
        {
            "slide": slides,
            "label": _truth(labels, cells.assign(slide=slides), "tumor"),
            "patient": slides,
            "site": sites,
            "line": cells["line"],
        }
    )
    if metadata is not None:
        _refuse(str(labels), rows[rows["site"].isna()], f"{metadata} has no hospital for")
    table = check_slides(labels, rows, classes)
    return table if reference is None else _with_reference(table, reference)


def _read_hospitals(metadata: str | Path) -> dict[str, str]:
    cells = read_cells(metadata)
    column = "hospital_corrected" if "hospital_corrected" in cells else "hospital"
    require_columns(metadata, cells, ("slide_name", column))
    slides = cells["slide_name"].map(without_ending)
    hospitals = [_plain_number(text) or text for text in cells[column]]
    return {slide: f"hospital {name}" for slide, name in zip(slides, hospitals, strict=True) if name}


def _with_reference(table: SlideTable, reference: str | Path) -> SlideTable:
    """Mark the test set, and take its labels from the reference."""
    cells = read_cells(reference, header=False)
    if 1 not in cells:
        raise TableError(str(reference), "wants two columns: slide, and Normal or Tumor")
    cells = cells.rename(columns={0: "slide", 1: "label"})
    truth = cells["label"].str.lower().map({"normal": 0, "tumor": 1, "tumour": 1})
    _refuse(str(reference), cells[truth.isna()], "labels are Normal and Tumor; they are not for", labels=True)
    told = dict(zip(cells["slide"].map(without_ending).str.lower(), truth.astype(int), strict=True))

    rows = table.rows.copy()
    folded = rows["slide"].str.lower()
    forgotten = rows[folded.str.startswith("test") & ~folded.isin(set(told))]
    _refuse(table.path, forgotten, f"{reference} does not have")
    official = folded.map(told)
    differing = rows[official.notna() & (official != rows["label"])]
    rows["label"] = official.fillna(rows["label"]).astype(int)
    name = Path(reference).name
    notes = [
        f"{slide} is {table.classes[told[slide.lower()]]}, as {name} has it; the label table differs"
        for slide in differing["slide"]
    ]
    notes += [f"{slide} of {name} is not in the label table" for slide in set(told) - set(folded)]
    return replace(
        table, rows=rows, test_slides=tuple(rows["slide"][official.notna()]), notes=tuple(sorted(notes))
    )


def _truth(path: str | Path, cells: pd.DataFrame, column: str) -> pd.Series:
    """Class numbers as texts, of a column of True and False."""
    numbers = cells[column].str.lower().map(TRUTH)
    cells = cells.assign(label=cells[column])
    _refuse(str(path), cells[numbers.isna()], f"{column} is True or False; it is not for", labels=True)
    return numbers.astype(int).astype(str)


# TCGA ---------------------------------------------------------------------------------------------------------


def tcga_patient(barcode: str) -> str:
    """The patient of a TCGA barcode: its first twelve characters.

    >>> tcga_patient("TCGA-55-8507-01Z-00-DX1.3C6198CF")
    'TCGA-55-8507'

    Raises:
        ValueError: It is no barcode.
    """
    return _barcode(barcode)[0]


def tcga_site(barcode: str) -> str:
    """The tissue source site of a TCGA barcode: the two characters after ``TCGA-``.

    >>> tcga_site("TCGA-55-8507-01Z-00-DX1")
    '55'

    Raises:
        ValueError: It is no barcode.
    """
    return _barcode(barcode)["site"]


def _barcode(text: str) -> re.Match[str]:
    match = BARCODE.match(text)
    if match is None:
        raise ValueError(f"a TCGA barcode begins like TCGA-05-4244, got {text!r}")
    return match


def is_diagnostic(slide: str) -> bool:
    """Whether a TCGA slide is a diagnostic one (DX: fixed, in paraffin) and no frozen section.

    >>> is_diagnostic("TCGA-55-8507-01Z-00-DX1.3C6198CF"), is_diagnostic("TCGA-55-8507-01A-01-TS1.f6baa937")
    (True, False)
    """
    return DIAGNOSTIC.match(slide) is not None


def read_tcga_genes(
    path: str | Path, *, gene: str = "TP53", classes: Sequence[str] = MUTATION_CLASSES
) -> SlideTable:
    """Read the diagnostic slides of a TCGA table with the mutation status of genes.

    Args:
        path: CSV with ``file_name`` (of the slide) and one column a gene, True where it is mutated.
        gene: Which gene.
        classes: Names of not mutated and mutated.

    Returns:
        The ``-DX`` slides, named as their files; frozen sections are left out and counted in the notes.

    Raises:
        TableError: The table is wrong, lacks the gene, or has no diagnostic slide.
    """
    cells = read_cells(path)
    require_columns(path, cells, ("file_name", gene))
    cells = cells.assign(slide=cells["file_name"].map(without_ending))
    kept, notes = _diagnostic(path, cells)
    return _tcga_table(path, kept, _truth(path, kept, gene), classes, notes)


def read_tcga_subtypes(
    path: str | Path,
    *,
    classes: Sequence[str] = RCC_CLASSES,
    aliases: Mapping[str, str] = RCC_ALIASES,
    slide_column: str | None = None,
    label_column: str | None = None,
) -> SlideTable:
    """Read the diagnostic slides of a TCGA table with the project or subtype of each.

    Args:
        path: CSV with the slide in ``slide``, ``file_name`` or ``slide_id``, and the class in ``label``,
            ``subtype``, ``project`` or ``project_id``.
        classes: Names of the projects without ``TCGA-``.
        aliases: Other names of a class, in capitals.
        slide_column: Where it is called otherwise.
        label_column: Where it is called otherwise.

    Raises:
        TableError: The table is wrong, or has no diagnostic slide.
    """
    cells = read_cells(path)
    slide_column = slide_column or _first_column(path, cells, ("slide", "file_name", "slide_id"))
    label_column = label_column or _first_column(path, cells, ("label", "subtype", "project", "project_id"))
    require_columns(path, cells, (slide_column, label_column))
    kept, notes = _diagnostic(path, cells.assign(slide=cells[slide_column].map(without_ending)))
    names = kept[label_column].str.upper().str.removeprefix("TCGA-")
    return _tcga_table(path, kept, names.replace(dict(aliases)), classes, notes)


def _first_column(path: str | Path, cells: pd.DataFrame, names: Sequence[str]) -> str:
    for name in names:
        if name in cells:
            return name
    require_columns(path, cells, names[:1])
    raise AssertionError


def _diagnostic(path: str | Path, cells: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    strangers = cells[~cells["slide"].str.match(BARCODE)]
    _refuse(str(path), strangers, "TCGA slides begin like TCGA-05-4244; others do in")
    kept = cells[cells["slide"].map(is_diagnostic)]
    if not len(kept):
        raise TableError(str(path), f"none of its {len(cells)} slides is a diagnostic one (-DX)")
    left_out = len(cells) - len(kept)
    return kept, (f"{left_out} slides that are not diagnostic (-DX) are left out",) if left_out else ()


def _tcga_table(
    path: str | Path, cells: pd.DataFrame, labels: pd.Series, classes: Sequence[str], notes: tuple[str, ...]
) -> SlideTable:
    rows = pd.DataFrame(
        {
            "slide": cells["slide"],
            "label": labels,
            "patient": cells["slide"].map(tcga_patient),
            "site": cells["slide"].map(tcga_site),
            "line": cells["line"],
        }
    )
    return replace(check_slides(path, rows, classes), notes=notes)


# A test set of a user's own -----------------------------------------------------------------------------------


def with_test_slides(table: SlideTable, path: str | Path, *, slide_column: str = "slide") -> SlideTable:
    """A table whose test set is the slides of another CSV.

    Raises:
        TableError: It is wrong, or names a slide twice or one that is not in the table.
    """
    cells = read_cells(path)
    require_columns(path, cells, (slide_column,))
    cells = cells.assign(slide=cells[slide_column])
    _refuse(str(path), cells[~cells["slide"].isin(table.slides)], f"{table.path} does not have")
    _refuse(str(path), cells[cells["slide"].duplicated(keep=False)], "a slide has one row, and these have more:")
    return replace(table, test_slides=tuple(table.take(cells["slide"])["slide"]))
