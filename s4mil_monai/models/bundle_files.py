"""find_bundle_files(): which files of a folder are the bundle."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

from s4mil_monai.errors import BundleError

LEFT_BY_RUNS = ("output", "eval", "mlruns*")
"""What training and evaluation leave in a bundle's folder when they are started there; no part of the bundle."""

_CODE = frozenset({".py", ".pyc", ".pyo", ".pyw", ".pyd", ".so", ".dll", ".dylib"})
"""What Python imports. A bundle holds none: started in its folder, ``json.py`` there would stand in for json."""


def find_bundle_files(folder: Path) -> list[str]:
    """Paths of the bundle's files, relative to its folder, sorted.

    Left out are hidden files, ``__pycache__`` (Python reads nothing there without the source beside it) and, at
    the top, :data:`LEFT_BY_RUNS`.

    Raises:
        BundleError: One is code, or is no plain file; a folder is a link.
    """
    found: list[str] = []
    for here, folders, files in os.walk(folder):
        inside = Path(here).relative_to(folder)
        folders[:] = [name for name in folders if not _is_left_out(inside / name)]
        kept = [inside / name for name in files if not _is_left_out(inside / name)]
        linked = [inside / name for name in folders if (folder / inside / name).is_symlink()]
        _refuse(folder, kept, linked)
        found += [path.as_posix() for path in kept]
    return sorted(found)


def _is_left_out(path: Path) -> bool:
    if path.name.startswith(".") or path.name == "__pycache__":
        return True
    return len(path.parts) == 1 and any(fnmatch.fnmatchcase(path.name, name) for name in LEFT_BY_RUNS)


def _refuse(folder: Path, files: list[Path], linked: list[Path]) -> None:
    for path in linked:
        raise BundleError(str(folder), f"{path.as_posix()} is a link to a folder; a bundle holds its files itself")
    for path in files:
        if path.suffix.lower() in _CODE or ".so." in path.name.lower():
            raise BundleError(str(folder), f"{path.as_posix()} is code, which a bundle does not hold; remove it")
        if not (folder / path).is_file():
            raise BundleError(str(folder), f"{path.as_posix()} is not a plain file; remove it")
