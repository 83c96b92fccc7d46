"""What is in a folder that anything may have been put into: its slides, and the rest with reasons."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s4mil_monai.slides.dicom_header import WHOLE_SLIDE, is_uid, read_header
from s4mil_monai.slides.folder import SUFFIXES

SIDECAR_SUFFIX = ".dicom.json"
"""``slide.svs`` has patient and study in ``slide.dicom.json``, which is neither a slide nor a stranger."""


@dataclass(frozen=True)
class FoundSlide:
    """A slide, and where it was found."""

    path: Path
    """A file, or a folder with one DICOM slide."""
    below: Path
    """The folder it lay in, relative to the one that was surveyed."""
    file: str
    """Its file, or the first of its files, relative to the folder that was surveyed."""


@dataclass
class Survey:
    """What a folder holds."""

    slides: list[FoundSlide] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)
    """Reasons by path, relative to the folder, of what is no slide."""


def survey_folder(folder: Path, staging: Path) -> Survey:
    """Find the slides of a folder: files by their suffix, DICOM by content whatever the files are called.

    Args:
        folder: Not written to.
        staging: Where series that share their folder with something else get one of their own, made of links; the
            same one whenever it is surveyed.

    Raises:
        MissingExtraError: There are DICOM files, and pydicom is not installed.
    """
    return _Surveyor(folder, staging).survey_place(folder)


class _Surveyor:
    """Goes through a folder and those below it."""

    def __init__(self, folder: Path, staging: Path):
        self._folder, self._staging = folder, staging
        self._found = Survey()
        self._seen: set[Path] = set()

    def survey_place(self, place: Path) -> Survey:
        """Survey a folder with what is below it, unless links have led to it before; gives all that was found."""
        if place.resolve() in self._seen:
            return self._found
        self._seen.add(place.resolve())
        below = place.relative_to(self._folder)
        try:
            entries = sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))
            folders = {entry for entry in entries if entry.is_dir()}
        except OSError:  # opening it fails, and says why, where its slides would go missing unnoticed
            self._found.slides.append(FoundSlide(place, below.parent, below.as_posix()))
            return self._found
        if not entries:
            self._found.passed_over[str(below)] = "the folder is empty"
        self._survey_files([entry for entry in entries if entry not in folders], below, whole=not folders)
        for entry in sorted(folders):
            if not _is_data_of_a_slide(entry):
                self.survey_place(entry)
        return self._found

    def _survey_files(self, files: list[Path], below: Path, *, whole: bool) -> None:
        """Survey the files of one folder; ``whole`` says that there is nothing else in it."""
        dicom = [file for file in files if _is_dicom(file)]
        series = self._whole_slide_series(dicom)
        alone = whole and below.parts != () and [len(found) for found in series.values()] == [len(files)]
        for uid, instances in series.items():
            path = instances[0].parent if alone else self._stage(uid, instances)
            first = instances[0].relative_to(self._folder).as_posix()
            self._found.slides.append(FoundSlide(path, below.parent if alone else below, first))
        for file in sorted(set(files) - set(dicom)):
            if file.suffix.lower() in SUFFIXES:
                self._found.slides.append(FoundSlide(file, below, file.relative_to(self._folder).as_posix()))
            elif not file.name.endswith(SIDECAR_SUFFIX):
                kind = file.suffix or "a file without a suffix"
                readable = os.access(file, os.R_OK)
                self._pass_over(file, f"{kind} is no slide format" if readable else "cannot be read")

    def _whole_slide_series(self, dicom: list[Path]) -> dict[str, list[Path]]:
        """Instances of whole slide images by series; other DICOM is passed over."""
        series: dict[str, list[Path]] = {}
        for file in dicom:
            header = read_header(file, keywords=["SeriesInstanceUID"])
            if header is None:
                self._pass_over(file, "damaged DICOM, not a whole slide image")
            elif header.SOPClassUID != WHOLE_SLIDE:
                self._pass_over(file, f"DICOM, {_kind_of(header)}, not a whole slide image")
            elif not is_uid(uid := str(header.get("SeriesInstanceUID"))):
                self._pass_over(file, "DICOM whose series is named by what is no UID")
            else:
                series.setdefault(uid, []).append(file)
        return series

    def _stage(self, uid: str, instances: list[Path]) -> Path:
        """A folder of links to instances, named as their series; another one for each place that has some."""
        place = hashlib.sha256(str(instances[0].parent.resolve()).encode()).hexdigest()[:16]
        target = self._staging / place / uid
        target.mkdir(parents=True, exist_ok=True)
        wanted = {instance.name: instance.resolve() for instance in instances}
        for link in target.iterdir():
            if link.name not in wanted:
                link.unlink(missing_ok=True)
        for name, instance in wanted.items():
            with suppress(FileExistsError):
                (target / name).symlink_to(instance)
        return target

    def _pass_over(self, file: Path, reason: str) -> None:
        self._found.passed_over[str(file.relative_to(self._folder))] = reason


def _kind_of(header: Any) -> str:
    name = getattr(header.get("SOPClassUID"), "name", "")
    return name.removesuffix(" Storage") or "of no class"


def _is_dicom(file: Path) -> bool:
    """By its first bytes; what cannot be read is not."""
    if not file.is_file():  # a pipe would be waited for
        return False
    try:
        with file.open("rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _is_data_of_a_slide(folder: Path) -> bool:
    """Whether a folder belongs to a slide file beside it, as those of MRXS do."""
    return folder.with_name(f"{folder.name}.mrxs").is_file()
