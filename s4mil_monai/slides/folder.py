"""find_slides(): the slides below a folder, as a scanner's share has them."""

from __future__ import annotations

import os
from pathlib import Path

from s4mil_monai.errors import PathError

SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".qptiff", ".btf"),
    *(".mrxs", ".vms", ".vmu", ".svslide", ".czi", ".dcm"),
)
"""Of files that are taken for slides. What is in them is found out when they are opened."""


class NoSlidesError(PathError):
    """A folder was named in which there is no slide."""


def find_slides(path: Path) -> list[Path]:
    """Every slide a path stands for, sorted.

    A file is itself, whatever its name. A folder that holds DICOM instances and no other slides is one slide;
    any other folder stands for all slides in it and below it, less hidden ones. A folder below it that cannot be
    looked into stands for itself: opening it fails, and says why, where its slides would go missing unnoticed.

    Raises:
        NoSlidesError: There is none, or the path itself cannot be looked into.
    """
    try:
        is_there = path.exists()
        if is_there and path.is_dir():
            os.listdir(path)
    except OSError as error:
        raise NoSlidesError(str(path), f"cannot be read ({error.strerror or error})") from error
    if not is_there:
        raise NoSlidesError(str(path), "there is no such slide or folder")
    if not path.is_dir():
        return [path]
    found = _slides_below(path, seen=set())
    if not found:
        raise NoSlidesError(str(path), f"no slides in this folder; looked for {', '.join(SUFFIXES)}")
    return found


def _slides_below(folder: Path, *, seen: set[Path]) -> list[Path]:
    """As :func:`find_slides`; folders in ``seen``, which links lead to once more, have none."""
    if folder.resolve() in seen:
        return []
    seen.add(folder.resolve())
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        folders = [entry for entry in entries if entry.is_dir()]
    except OSError:
        return [folder]
    slides = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and entry not in folders]
    below = [slide for entry in folders for slide in _slides_below(entry, seen=seen)]
    if slides and not below and all(slide.suffix.lower() == ".dcm" for slide in slides):
        return [folder]
    return sorted(slides + below)


def name_outputs(slides: list[Path], path: Path) -> dict[Path, Path]:
    """For each slide of a path, the name its output has without a suffix: its own, in the folders below the path.

    Slides of one folder that differ only in their suffix keep it.
    """
    below = path.parent if slides == [path] else path
    stems = [slide.with_suffix("") if slide.is_file() else slide for slide in slides]
    return {
        slide: (slide if stems.count(stem) > 1 else stem).relative_to(below)
        for slide, stem in zip(slides, stems, strict=True)
    }
