"""write_whole(): a file has its name when all of it is written, and not before."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a temporary file beside ``path`` and rename it when it is whole; what was there stays until then.

    Args:
        path: The file; its folder is made if need be.
        content: Text, bytes, or what writes into the temporary file it is given.

    Raises:
        OSError: It cannot be written. Nothing is left behind, unless it is killed: a hidden ``.part``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder outlast a power failure, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make a folder with all files in it and below it outlast a power failure."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    sync_folder(folder)


def sync_file(path: Path) -> None:
    """Make what a file holds outlast a power failure."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
