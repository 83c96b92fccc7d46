"""A result folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s4mil_monai.errors import OutputError
from s4mil_monai.result import read_result


def check_target(out: Path, slide: Path) -> Path:
    """The folder a slide's result goes to: ``out`` and the slide's name without its ending.

    Raises:
        OutputError: It is there already and is not an earlier result of this slide.
    """
    target = out / (slide.name if slide.is_dir() else slide.stem)
    if target.exists() or target.is_symlink():
        result = target / "result.json"
        if not result.is_file():
            raise OutputError(str(target), "is there and is not a result; move it away or choose another --out")
        other = read_result(result).slide.name
        if other != slide.name:
            raise OutputError(str(target), f"holds the result of {other}; choose another --out for {slide.name}")
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write into; it becomes ``target`` if nothing is raised, and is removed otherwise.

    Raises:
        OutputError: The folder cannot be made or renamed.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _make(part)
        yield part
        _replace(target, part)
    except OSError as error:
        raise OutputError(str(target), f"cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _make(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _replace(target: Path, part: Path) -> None:
    """Rename ``part`` into place; an earlier result is set aside first and removed after."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(aside)
    part.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
