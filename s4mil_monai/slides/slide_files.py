"""files_of(): which files make up a slide, and what they look like from outside."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST_INI_BYTES = 1 << 20
"""Read of a VMS or VMU file; they have a few hundred, and OpenSlide refuses them long before this."""


def files_of(path: Path) -> list[Path]:
    """All files of a slide, sorted: of a DICOM folder, or the file with those that belong to it (MRXS, VMS, VMU).

    Raises:
        OSError: A folder cannot be looked into, or a VMS or VMU file not be read.
    """
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    find = {".mrxs": _files_below_name, ".vms": _files_named_in, ".vmu": _files_named_in}.get(path.suffix.lower())
    return sorted({path, *find(path)}) if find else [path]


def _files_below_name(path: Path) -> list[Path]:
    """Of an MRXS slide: all that lies in the folder called as the file without its ending."""
    return [file for file in path.with_suffix("").rglob("*") if file.is_file()]


def _files_named_in(path: Path) -> list[Path]:
    """Of a VMS or VMU slide: the files it names as values (``ImageFile(1,0)=…``), less those that are not there.

    Not those whose names begin alike: ``1.vms`` would get the pictures of ``10.vms``.
    """
    if not path.is_file():  # a pipe would be waited for
        return []
    with path.open("rb") as file:
        text = file.read(MOST_INI_BYTES).decode("utf-8", "surrogateescape")
    values = [value.strip().lstrip("/") for _, _, value in (line.partition("=") for line in text.splitlines())]
    beside = [path.parent / value for value in values if value]
    return [file for file in beside if os.path.isfile(file)]


def take_snapshot(path: Path) -> str:
    """Names, sizes and times of a slide's files: another text means that something has changed.

    Raises:
        OSError: It is gone, cannot be looked at, or is a pipe, which would be waited for.
    """
    lines = []
    for file in files_of(path):
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(file))
        lines.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(lines)
