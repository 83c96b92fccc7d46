"""A result folder that appears whole or not at all, and never in place of another slide's.

Beside it, and hidden, lie ``.NAME.PROCESS.part`` while it is written, and ``.NAME.PROCESS.old``, the earlier
result, for the moment in which it is replaced. What a killed process leaves of them is put right by the next one.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from s4mil_monai.errors import OutputError, UnreadableSlideError
from s4mil_monai.processes import has_ended, name_machine, started_at
from s4mil_monai.result import read_result
from s4mil_monai.slides.fingerprint import fingerprint_slide

DAY_S = 24 * 3600.0
"""After this long what another machine's process has left is nobody's; it cannot be seen from here."""

_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-(?P<started>\d*)@(?P<machine>.+)\.(?P<kind>part|old)", re.DOTALL)


def check_target(out: Path, slide: Path) -> Path:
    """The folder a slide's result goes to: ``out`` and the slide's name without its ending.

    Where there is one already, the slide is read once to know whether it is the same.

    Raises:
        OutputError: It is there already and is not an earlier result of this slide.
        UnreadableSlideError: The slide cannot be read.
    """
    clear_leftovers(out)
    target = out / (slide.name if slide.is_dir() else slide.stem)
    if target.exists() or target.is_symlink():
        result = target / "result.json"
        if not result.is_file():
            raise OutputError(str(target), "is there and is not a result; move it away or choose another --out")
        other = read_result(result).slide
        if other.name != slide.name:
            raise OutputError(
                str(target), f"holds the result of {other.name}; choose another --out for {slide.name}"
            )
        if slide.is_file() or slide.is_dir():  # else opening it says what it is
            _check_content(target, other.sha256, slide.name, _read_sha256(slide))
    return target


def _read_sha256(slide: Path) -> str:
    try:
        return fingerprint_slide(slide)
    except OSError as error:
        raise UnreadableSlideError(slide.name, f"cannot be read ({error.strerror or error})") from error


def _check_content(target: Path, there_sha256: str, name: str, new_sha256: str) -> None:
    if there_sha256 != new_sha256:
        raise OutputError(
            str(target),
            f"holds the result of another slide called {name} (SHA-256 {there_sha256[:12]}…, this one has "
            f"{new_sha256[:12]}…); move it away or choose another --out",
        )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write into; it becomes ``target`` if nothing is raised, and is removed otherwise.

    Raises:
        OutputError: The folder cannot be made or renamed, or another slide's result has come there meanwhile.
    """
    part = _beside(target, "part")
    try:
        _make(part)
        yield part
        _check_meanwhile(target, part)
        _replace(target, part)
    except OSError as error:
        raise OutputError(str(target), f"cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _beside(target: Path, kind: str) -> Path:
    pid = os.getpid()
    return target.with_name(f".{target.name}.{pid}-{started_at(pid) or ''}@{name_machine()}.{kind}")


def _make(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _check_meanwhile(target: Path, part: Path) -> None:
    results = [folder / "result.json" for folder in (target, part)]
    if all(result.is_file() for result in results):
        there, new = (read_result(result).slide for result in results)
        _check_content(target, there.sha256, new.name, new.sha256)


def _replace(target: Path, part: Path) -> None:
    """Rename ``part`` into place; an earlier result is set aside first and removed after."""
    aside = _beside(target, "old")
    if target.exists():
        target.rename(aside)
    try:
        part.rename(target)
    except OSError:
        if aside.exists() and not target.exists():
            _put_back(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


# Leftovers ----------------------------------------------------------------------------------------------------


def clear_leftovers(out: Path) -> None:
    """Put right what killed processes have left in a folder of results.

    A result that was set aside gets its name back, or is removed where a newer one of the same slide has it; what
    was half-written is removed. What may be a living process's stays.
    """
    with suppress(OSError):
        for path in list(out.iterdir()) if out.is_dir() else ():
            match = _LEFT.fullmatch(path.name)
            if match is None or not path.is_dir() or not _is_dead(path, match):
                continue
            target = out / match["name"]
            if match["kind"] == "old" and not target.exists():
                _put_back(path, target)
            elif match["kind"] == "part" or _are_of_one_slide(path, target):
                shutil.rmtree(path, ignore_errors=True)


def _is_dead(path: Path, match: re.Match[str]) -> bool:
    """Whether the process that a folder is named after has ended, as far as that can be known."""
    if match["machine"] == name_machine():
        return has_ended({"pid": int(match["pid"]), "started": match["started"]})
    status = path.stat()
    return time.time() - max(status.st_mtime, status.st_ctime) > DAY_S


def _put_back(aside: Path, target: Path) -> None:
    with suppress(OSError):  # another process was faster
        aside.rename(target)


def _are_of_one_slide(folder: Path, other: Path) -> bool:
    results = [place / "result.json" for place in (folder, other)]
    with suppress(OutputError):
        return len({read_result(result).slide.sha256 for result in results}) == 1
    return False
