"""Whose slide it is: patient and study of a slide file, from a JSON beside it or a table of the site."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from s4mil_monai.errors import TableError
from s4mil_monai.slides.mixed_folder import SIDECAR_SUFFIX
from s4mil_monai.slides.site_table import read_rows, read_text


def _as_uid(value: str) -> str:
    if value and not (len(value) <= 64 and re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))+", value)):
        raise ValueError("is not a DICOM UID")
    return value


def _as_date(value: str) -> str:
    """As DICOM writes it; a day that no calendar has is an error, and so are its parts in another order."""
    if not value:
        return value
    if not re.fullmatch(r"[0-9]{4}(-[0-9]{2}-[0-9]{2}|[0-9]{4})", value):
        raise ValueError("wants a date as YYYY-MM-DD or YYYYMMDD")
    digits = value.replace("-", "")
    try:
        datetime.strptime(digits, "%Y%m%d")
    except ValueError:
        raise ValueError("is no day of the calendar; wants YYYY-MM-DD or YYYYMMDD") from None
    return digits


def _as_time(value: str) -> str:
    """As DICOM writes it: hours, or hours and minutes, or seconds as well."""
    if not value:
        return value
    if not re.fullmatch(r"([0-9]{2}){1,3}", value):
        raise ValueError("wants a time as HH, HHMM or HHMMSS")
    try:
        datetime.strptime(value, "%H%M%S"[: len(value)])
    except ValueError:
        raise ValueError("is no time of the day; wants HH, HHMM or HHMMSS") from None
    return value


Uid = Annotated[str, AfterValidator(_as_uid)]
Date = Annotated[str, AfterValidator(_as_date)]
Time = Annotated[str, AfterValidator(_as_time)]
ShortText = Annotated[str, Field(max_length=16, pattern=r"^[^\\\x00-\x1f]*$")]
LongText = Annotated[str, Field(max_length=64, pattern=r"^[^\\\x00-\x1f]*$")]


class StudyAttributes(BaseModel):
    """What a slide file does not carry: its patient and its study. Empty is unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study_instance_uid: Uid = ""
    """Of the study that the results join; made from the accession number and the patient where it is not known."""
    patient_id: LongText = ""
    patient_name: LongText = ""
    """As DICOM writes it: ``Family^Given``."""
    patient_birth_date: Date = ""
    """``YYYY-MM-DD`` or ``YYYYMMDD``."""
    patient_sex: Annotated[str, Field(pattern="^[MFO]?$")] = ""
    accession_number: ShortText = ""
    study_id: ShortText = ""
    study_date: Date = ""
    study_time: Time = ""
    """``HH``, ``HHMM`` or ``HHMMSS``."""
    container_id: LongText = ""
    """Of the glass slide."""
    specimen_id: LongText = ""

    @property
    def names_study(self) -> bool:
        """Whether this is enough to say where results belong."""
        return bool(self.study_instance_uid or self.patient_id)


@dataclass(frozen=True)
class StudyRow:
    """One slide of a table."""

    line: int
    study: StudyAttributes


@dataclass(frozen=True)
class StudyTable:
    """Patients and studies by slide, as a site keeps them."""

    path: str
    rows: dict[str, StudyRow]
    """By the end of the slide's path, parts joined by ``/``: ``1.svs`` is every slide of that name, ``A/1.svs``
    only one in a folder A."""

    def find(self, slide: Path) -> StudyAttributes | None:
        """The attributes of a slide; None where no row is its own.

        Raises:
            TableError: Several rows are, and may be of several patients.
        """
        parts = slide.absolute().parts
        ends = ("/".join(parts[start:]) for start in range(1, len(parts)))
        found = [self.rows[end] for end in ends if end in self.rows]
        if len(found) > 1:
            lines = " and ".join(str(line) for line in sorted(row.line for row in found))
            raise TableError(self.path, f"lines {lines} are the same slide; leave one of them")
        return found[0].study if found else None


def find_study(slide: Path, table: StudyTable | None = None) -> StudyAttributes | None:
    """The attributes of a slide: of the table, else of the JSON beside it, else None.

    Raises:
        TableError: The JSON cannot be understood, or several rows are this slide.
    """
    study = table.find(slide) if table is not None else None
    if study is not None:
        return study
    sidecar = slide.with_suffix(SIDECAR_SUFFIX)
    if not sidecar.is_file():
        return None
    try:
        return StudyAttributes.model_validate_json(read_text(sidecar))
    except ValidationError as error:
        raise TableError(str(sidecar), _first_problem(error)) from error


def read_study_table(path: Path) -> StudyTable:
    """Read a CSV with the column ``slide`` and columns named as the fields of :class:`StudyAttributes`.

    A file name in ``slide`` is every slide of that name. Where folders have slides of the same name, write as much
    of their paths as tells them apart: ``A/1.svs``.

    Raises:
        TableError: It cannot be read, or a row cannot be meant; the text names the line, never its values.
    """
    table: dict[str, StudyRow] = {}
    for line, cells in read_rows(path, _find_header_problem):
        name = _end_of_path(cells.pop("slide", ""))
        if not name:
            raise TableError(str(path), f"line {line}: wants a file name in slide")
        if name in table:
            raise TableError(str(path), f"line {line}: the slide is in the table already")
        try:
            table[name] = StudyRow(line, StudyAttributes.model_validate(cells))
        except ValidationError as error:
            raise TableError(str(path), f"line {line}: {_first_problem(error)}") from error
    return StudyTable(str(path), table)


def _end_of_path(cell: str) -> str:
    """As the table keeps it; empty where there is none."""
    return "/".join(part for part in PurePosixPath(cell).parts if part != "/")


def _find_header_problem(header: Sequence[str]) -> str | None:
    """What is wrong, without quoting: where the header is missing, this is a patient."""
    if "slide" not in header:
        return "no column 'slide'; is this the header?"
    return "a column is there twice" if len(set(header)) < len(header) else None


def _first_problem(error: ValidationError) -> str:
    """What is wrong, without the value: it may be a name."""
    first = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'content'}: {first['msg']}"
