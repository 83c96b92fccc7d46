"""files_of(): which files make up a slide, and what they look like from outside."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

COMPANIONS = {".mrxs": "{stem}", ".vms": "{stem}*", ".vmu": "{stem}*"}
"""By suffix, what lies beside the named file and belongs to it: a folder, or files that begin with its name."""


def files_of(path: Path) -> list[Path]:
    """All files of a slide, sorted: those of a DICOM folder, those beside an MRXS, VMS or VMU file, or the file.

    Raises:
        OSError: A folder cannot be looked into.
    """
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    pattern = COMPANIONS.get(path.suffix.lower())
    found = {path}
    for beside in path.parent.glob(pattern.format(stem=path.stem)) if pattern else ():
        found |= {file for file in beside.rglob("*") if file.is_file()} if beside.is_dir() else {beside}
    return sorted(found)


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
