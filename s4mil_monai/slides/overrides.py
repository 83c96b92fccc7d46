"""The operator's table of µm/px, for slides and scanners that do not say it or say it wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from s4mil_monai.errors import TableError
from s4mil_monai.slides.site_table import read_rows
from s4mil_monai.slides.slide import Slide
from s4mil_monai.slides.vendor_tags import Finding, as_positive, read_findings, scanner_words

COLUMNS = ("slide", "scanner", "mpp")
OPTIONAL_COLUMNS = ("reason",)

MPP_RANGE = (0.02, 50.0)
"""µm/px that a table may hold; beyond, the unit is mistaken."""


@dataclass(frozen=True)
class Override:
    """One row of the table: a resolution for slides or for a scanner, one of the two being empty."""

    mpp: float
    """µm per level-0 pixel."""
    slide: str = ""
    """File or folder name, or a pattern with ``*``, ``?`` or ``[…]``."""
    scanner: str = ""
    """Serial number, model or maker as the file says it; upper and lower case are the same."""
    reason: str = ""
    """For whoever reads the table."""


@dataclass(frozen=True)
class Overrides:
    """All rows, in the order of the table."""

    rows: tuple[Override, ...]

    def find(self, slide: Slide, findings: Sequence[Finding] | None = None) -> tuple[float, str] | None:
        """The resolution set for a slide.

        Its exact name wins over a pattern, a pattern over its scanner; of a scanner the serial number wins over
        the model and that over the maker. Where several patterns fit, the first row counts.

        Args:
            slide: An open slide.
            findings: What the file says, where it has been read already.

        Returns:
            µm per level-0 pixel, and ``override:slide`` or ``override:scanner``; None where no row fits.
        """
        for row in (*self._named(slide.name), *self._fitting(slide.name)):
            return row.mpp, "override:slide"
        by_scanner = {_folded(row.scanner): row.mpp for row in self.rows if row.scanner}
        if not by_scanner:
            return None
        words = identify_scanner(slide) if findings is None else scanner_words(tuple(findings))
        mpp = next((by_scanner[_folded(word)] for word in words if _folded(word) in by_scanner), None)
        return None if mpp is None else (mpp, "override:scanner")

    def _named(self, name: str) -> list[Override]:
        return [row for row in self.rows if row.slide == name]

    def _fitting(self, name: str) -> list[Override]:
        return [row for row in self.rows if row.slide and fnmatchcase(name, row.slide)]


def identify_scanner(slide: Slide) -> tuple[str, ...]:
    """How the file names its scanner: serial numbers, then models, then makers; empty where it does not."""
    return scanner_words(read_findings(slide))


def read_overrides(path: str | Path) -> Overrides:
    """Read a CSV with the columns ``slide``, ``scanner``, ``mpp`` and, if wanted, ``reason``.

    Every row fills either ``slide`` (a file name, or a pattern such as ``2024_*.svs``) or ``scanner``. Empty
    lines are passed over.

    Raises:
        TableError: The file cannot be read, has other columns or no rows, or a row cannot be meant; the text
            names the line.
    """
    path = Path(path)
    rows: list[Override] = []
    lines: dict[tuple[str, str], int] = {}
    for line, cells in read_rows(path, _find_header_problem):
        row = _as_override(path, line, cells)
        key = (row.slide, _folded(row.scanner))
        if key in lines:
            raise TableError(str(path), f"line {line}: {row.slide or row.scanner} is in line {lines[key]} already")
        lines[key] = line
        rows.append(row)
    if not rows:
        raise TableError(str(path), "holds no rows")
    return Overrides(tuple(rows))


def _find_header_problem(header: Sequence[str]) -> str | None:
    wanted = f"the header is {','.join(COLUMNS)} and, if wanted, {','.join(OPTIONAL_COLUMNS)}"
    if not any(header):
        return f"is empty; {wanted}"
    problems = [f"unknown column {name!r}" for name in header if name not in COLUMNS + OPTIONAL_COLUMNS]
    problems += [f"column {name!r} twice" for name in dict.fromkeys(header) if header.count(name) > 1]
    problems += [f"no column {name!r}" for name in COLUMNS if name not in header]
    return f"{problems[0]}; {wanted}" if problems else None


def _as_override(path: Path, line: int, cells: dict[str, str]) -> Override:
    slide, scanner, mpp_text = (cells.get(column, "") for column in COLUMNS)

    def refuse(reason: str) -> TableError:
        return TableError(str(path), f"line {line}: {reason}")

    if bool(slide) == bool(scanner):
        raise refuse(
            f"{'both' if slide else 'neither'} of slide and scanner are filled in; a row is for one of them"
        )
    if "/" in slide or "\\" in slide:
        raise refuse(f"slide is a file name without its folder, got {slide}")
    mpp = as_positive(mpp_text)
    if mpp is None or not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise refuse(f"mpp is µm per pixel, from {MPP_RANGE[0]:g} to {MPP_RANGE[1]:g}, got {mpp_text!r}")
    return Override(mpp, slide, scanner, cells.get("reason", ""))


def _folded(word: str) -> str:
    return " ".join(word.split()).casefold()
