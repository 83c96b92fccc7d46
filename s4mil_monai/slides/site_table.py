"""A table that a site keeps of its slides, as a spreadsheet writes it: CSV in UTF-8 with a header."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from s4mil_monai.errors import TableError

LONGEST_BYTES = 16 << 20


def read_text(path: Path) -> str:
    """The text of a small file, less the byte order mark that spreadsheets put in front.

    Raises:
        TableError: It cannot be read, is far too large, or is not UTF-8.
    """
    try:
        if path.stat().st_size > LONGEST_BYTES:
            raise TableError(str(path), f"is larger than {LONGEST_BYTES >> 20} MB; is it the right file?")
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except OSError as error:
        raise TableError(str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise TableError(str(path), "is not UTF-8 text; save it as CSV in UTF-8") from error


def read_rows(
    path: Path, find_header_problem: Callable[[Sequence[str]], str | None]
) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells by column of every row that is not empty.

    Args:
        path: The table.
        find_header_problem: Gives what is wrong with the names of the columns, if anything is.

    Raises:
        TableError: The file cannot be read, its header is refused, or a row has more cells than the header.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if (problem := find_header_problem(header)) is not None:
            raise TableError(str(path), f"line 1: {problem}")
        found = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise TableError(str(path), f"line {reader.line_num}: is not CSV ({error})") from error
    for line, cells in found:
        if any(cells) and len(cells) > len(header):
            raise TableError(str(path), f"line {line}: {len(cells)} cells, the header has {len(header)}")
    return [(line, dict(zip(header, cells, strict=False))) for line, cells in found if any(cells)]
