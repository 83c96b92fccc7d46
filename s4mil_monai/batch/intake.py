"""Intake: slides that are new and whole, from folders that a scanner writes into all day."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from s4mil_monai.batch.kind import make_key
from s4mil_monai.batch.ledger import JobKind, Ledger
from s4mil_monai.batch.settings import SiteSettings, SourceSettings
from s4mil_monai.batch.sightings import Sightings
from s4mil_monai.errors import TableError
from s4mil_monai.slides.mixed_folder import survey_folder
from s4mil_monai.slides.site_table import read_rows
from s4mil_monai.slides.slide_files import take_snapshot

STAGING = ".staging"
"""Below ``out``: links to DICOM series that share their folder with something else."""


@dataclass(frozen=True)
class Candidate:
    """A slide that is whole."""

    path: Path
    name: str
    """Its file, relative to its source."""
    snapshot: str
    slide: str | None
    """Its fingerprint, if it is known from an earlier look."""


@dataclass
class Look:
    """What one look at the sources has found."""

    new: list[Candidate] = field(default_factory=list)
    changing: list[str] = field(default_factory=list)
    """Names of slides that are still being written, or have been seen too shortly to tell."""
    resting: list[str] = field(default_factory=list)
    """Names of slides that could not be read through, until they change or may be tried again, in a day at most.
    They are no problem meanwhile; each try is."""
    problems: dict[str, str] = field(default_factory=dict)
    """Reasons by name or source of what cannot be looked at."""


class Intake:
    """Looks at the sources of a site, and adds jobs to the ledger."""

    def __init__(self, site: SiteSettings, ledger: Ledger, kind: JobKind):
        self._site, self._ledger, self._kind = site, ledger, kind
        self._sightings = Sightings(ledger.database)

    def look(self) -> Look:
        """Find slides that are whole and have no job yet."""
        found = Look()
        names: dict[Path, str] = {}
        for source in self._site.sources:
            names |= self._name_slides(source, found)
        snapshots = self._take_snapshots(names, found)
        seen = self._sightings.note({str(path): snapshot for path, snapshot in snapshots.items()})
        known = {sighting.slide for sighting in seen.values() if sighting.slide is not None}
        done = self._sightings.slides_with_jobs(known, self._kind.model, self._kind.settings)
        for path, snapshot in snapshots.items():
            sighting = seen[str(path)]
            if sighting.unchanged_s < self._site.settle_s:
                found.changing.append(names[path])
            elif sighting.pause_s > 0:
                found.resting.append(names[path])
            elif sighting.slide not in done:
                found.new.append(Candidate(path, names[path], snapshot, sighting.slide))
        return found

    def add(self, candidate: Candidate, slide: str) -> bool:
        """Add the job of a slide that was read through; False where it has one, or has changed meanwhile."""
        if not _looks_like(candidate.path, candidate.snapshot):
            return False
        path = str(candidate.path)
        self._sightings.keep(path, candidate.snapshot, slide)
        key = make_key(slide, self._kind)
        return self._ledger.add(key, slide, self._kind, path=path, name=candidate.name)

    def fail(self, candidate: Candidate) -> None:
        """Remember that a slide could not be read through, so that not every pass tries that again."""
        path, site = str(candidate.path), self._site
        self._sightings.fail(path, candidate.snapshot, tries=site.tries, backoff_s=site.backoff_s)

    def find_place(self, slide: str, path: str) -> Path | None:
        """Where a slide lies now: at ``path``, or where a copy of it was seen; None where it is gone.

        What lies there must look as when it was read through: scanners use names again.
        """
        places = self._sightings.places(slide)
        ordered = sorted(places, key=lambda place: place != path)
        return next((Path(place) for place in ordered if _looks_like(Path(place), places[place])), None)

    def _name_slides(self, source: SourceSettings, found: Look) -> dict[Path, str]:
        if source.worklist is not None:
            return _read_worklist(source.worklist, found)
        assert source.folder is not None
        if not os.path.isdir(source.folder):
            found.problems[str(source.folder)] = "the folder is gone; is the share mounted?"
            return {}
        try:
            survey = survey_folder(source.folder.absolute(), self._site.out.absolute() / STAGING)
            self._look_at_device(source.folder, found, is_empty=not survey.slides)
        except OSError as error:
            found.problems[str(source.folder)] = f"cannot be looked through ({error.strerror or error})"
            return {}
        return {slide.path: slide.file for slide in survey.slides}

    def _look_at_device(self, folder: Path, found: Look, *, is_empty: bool) -> None:
        """An inbox may be emptied; a mount point that is empty lies on another device than the share did."""
        path, device = str(folder.absolute()), str(folder.stat().st_dev)
        if not is_empty:
            self._sightings.note_device(path, device)
        elif self._sightings.device_of(path) not in (None, device):
            found.problems[str(folder)] = "there is no slide left in it; is the share mounted?"

    @staticmethod
    def _take_snapshots(names: dict[Path, str], found: Look) -> dict[Path, str]:
        snapshots = {}
        for path, name in names.items():
            try:
                snapshots[path] = take_snapshot(path)
            except OSError as error:
                found.problems[name] = f"cannot be looked at ({error.strerror or error})"
        return snapshots


def _looks_like(path: Path, snapshot: str) -> bool:
    try:
        return take_snapshot(path) == snapshot
    except OSError:
        return False


def _read_worklist(worklist: Path, found: Look) -> dict[Path, str]:
    """Slides of a worklist; a row without a file is a problem of that row alone."""
    names: dict[Path, str] = {}
    try:
        rows = read_rows(worklist, lambda header: None if "slide" in header else "there is no column slide")
    except TableError as error:
        found.problems[str(worklist)] = error.reason
        return {}
    for line, cells in rows:
        name = cells.get("slide", "")  # a row may end before its column
        path = worklist.parent / name
        if not name or not os.path.exists(path):  # says False of a name that no file can have, Path's raises
            found.problems[f"{worklist.name} line {line}"] = f"there is no slide {name or '(empty)'}"
        else:
            names[path.absolute()] = name
    return names
