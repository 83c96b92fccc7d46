"""Faults of a machine, made for real: full disks, shares that go away, too little memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


def can_mount(folder: Path) -> bool:
    """Whether this process may mount file systems."""
    try:
        with small_disk(folder, "64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of that size at a folder."""
    folder.mkdir(exist_ok=True)
    call("mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder)
    try:
        yield
    finally:
        call("umount", "-l", folder)


@contextmanager
def disk_in_a_file(image: Path, folder: Path, size: int) -> Iterator[None]:
    """An ext4 file system in a file, mounted at a folder."""
    with image.open("wb") as file:
        file.truncate(size)
    call("mkfs.ext4", "-q", image)
    folder.mkdir(exist_ok=True)
    call("mount", "-o", "loop", image, folder)
    try:
        yield
    finally:
        call("umount", "-l", folder)


def forget_pages(path: Path) -> None:
    """Have the kernel read a file from its disk again."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group whose processes have so many bytes together; the kernel kills one that wants more."""
    group = MEMORY_GROUPS / f"s4mil-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def call(*command: str | Path) -> None:
    """Run a command of the system."""
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def wait_until(condition: Callable[[], bool], *, at_most_s: float = 300) -> None:
    """Wait for something that has to come."""
    end = time.monotonic() + at_most_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
