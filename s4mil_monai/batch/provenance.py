"""A chain of records: each holds the hash of the one before; none can be changed, removed or moved unseen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s4mil_monai.checksum import sha256_of
from s4mil_monai.models.manifest import MANIFEST

PROVENANCE_FORMAT = "s4mil.provenance/1"
PROVENANCE_FILE = "provenance.json"
"""In the folder of a result: its record."""
FIRST = "0" * 64
"""Stands for the hash before the first record."""


@dataclass(frozen=True)
class Link:
    """One record of the chain."""

    number: int
    """From 1."""
    previous: str
    record: str
    """JSON, the exact text that was hashed."""
    hash: str


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was recorded."""

    place: str
    """Record, or file of a result."""
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def write_record(facts: dict[str, Any]) -> str:
    """The text of a record: JSON with sorted keys and without spaces, the same for the same facts."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def link(number: int, previous: str, record: str) -> Link:
    """The record as part of the chain; SHA-256 over its number, the hash before it, and its text."""
    content = f"{number}\n{previous}\n{record}"
    return Link(number, previous, record, hashlib.sha256(content.encode()).hexdigest())


def check_chain(links: Iterable[Link], *, head: tuple[int, str]) -> Iterator[Problem]:
    """Recompute every hash.

    Args:
        links: In the order of their numbers.
        head: Number and hash of the last record, as kept elsewhere; what is missing at the end shows by it alone.

    Returns:
        What was changed, removed or moved.
    """
    last = (0, FIRST)
    for found in links:
        yield from check_link(found, last)
        last = found.number, found.hash
    yield from check_end(last, head)


def check_link(found: Link, last: tuple[int, str]) -> Iterator[Problem]:
    """Recompute the hash of one record.

    Args:
        found: The record.
        last: Number and hash of the one before it; 0 and :data:`FIRST` before the first.
    """
    place = f"record {found.number}"
    if found.number != last[0] + 1:
        yield Problem(place, f"comes after record {last[0]}; what was between is missing or was moved")
    if found.previous != last[1]:
        yield Problem(place, "does not hold the hash of the record before it")
    if link(found.number, found.previous, found.record).hash != found.hash:
        yield Problem(place, "was changed: its hash is another")


def check_end(last: tuple[int, str], head: tuple[int, str]) -> Iterator[Problem]:
    """Compare number and hash of the last record with those kept elsewhere."""
    if last != head:
        yield Problem(f"record {last[0]}", f"is the last there is, but the chain ended with record {head[0]}")


def parse_record(record: str) -> dict[str, Any] | None:
    """The facts of a record; None where it is none."""
    try:
        facts = json.loads(record)
        is_one = facts["format"] == PROVENANCE_FORMAT and isinstance(facts["outputs"], dict) and facts["folder"]
    except (ValueError, KeyError, TypeError):
        return None
    return facts if is_one else None


def list_sums(record: str) -> str:
    """What ``SHA256SUMS`` of a result holds: its outputs as the record names them, and the record itself."""
    outputs = json.loads(record)["outputs"] | {PROVENANCE_FILE: hashlib.sha256(record.encode()).hexdigest()}
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(outputs.items()))


def check_outputs(record: str, out: Path) -> Iterator[Problem]:
    """Compare the files of a result with what its record says of them.

    Args:
        record: As it is in the chain.
        out: Folder of results.
    """
    name = json.loads(record)["folder"]
    folder = out / name
    if not folder.is_dir():
        yield Problem(name, "the result is gone")
        return
    sums = list_sums(record)
    wanted = {line[66:]: line[:64] for line in sums.splitlines()}
    wanted[MANIFEST] = hashlib.sha256(sums.encode()).hexdigest()
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    for file, sha256 in wanted.items():
        if file not in there:
            yield Problem(f"{name}/{file}", "is missing")
        else:
            yield from _check_file(folder / file, f"{name}/{file}", sha256)
    for file in sorted(there - set(wanted)):
        yield Problem(f"{name}/{file}", "was not there when the result was recorded")


def _check_file(path: Path, place: str, sha256: str) -> Iterator[Problem]:
    try:
        found = sha256_of(path)
    except OSError as error:
        yield Problem(place, f"cannot be read ({error.strerror or error})")
        return
    if found != sha256:
        yield Problem(place, "was changed: its SHA-256 is another")
