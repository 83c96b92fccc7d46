"""Publisher: a result gets its name, once, and is recorded after, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from s4mil_monai.batch.ledger import Job, JobKind, Ledger
from s4mil_monai.batch.printable import as_folder_name
from s4mil_monai.batch.provenance import PROVENANCE_FILE, PROVENANCE_FORMAT, list_sums, write_record
from s4mil_monai.batch.work import Scored
from s4mil_monai.checksum import sha256_of
from s4mil_monai.errors import OutputError
from s4mil_monai.models.manifest import MANIFEST
from s4mil_monai.whole_file import sync_file, sync_folder

RESULTS, WORK = "results", ".work"


@dataclass(frozen=True)
class Places:
    """Where results are written, and where they go."""

    out: Path

    def part(self, job: Job) -> Path:
        """Where the result of a try is written."""
        return self.out / WORK / f"{job.key[:16]}-{job.lease}"

    def parts(self, job: Job) -> list[Path]:
        """Where results of all tries of a job were written, as far as they are left."""
        return sorted((self.out / WORK).glob(f"{job.key[:16]}-*"))

    def folder(self, job: Job, kind: JobKind) -> str:
        """Where a result goes, relative to ``out``: a folder a slide, in it one for each model and settings."""
        stem = as_folder_name(Path(job.name).stem)
        return f"{RESULTS}/{stem}-{job.slide[:8]}/{as_folder_name(kind.model_name)}-{job.key[:8]}"

    def sweep(self, find_held: Callable[[], Iterable[Job]]) -> None:
        """Remove what tries of jobs have left that nobody works on.

        Args:
            find_held: Gives the jobs in work. It is asked after the folders were listed: whoever makes one has its
                job before.
        """
        there = list((self.out / WORK).glob("*"))
        kept = {job.key[:16] for job in find_held()} if there else set()
        for left in there:
            if left.name.split("-")[0] not in kept:
                shutil.rmtree(left, ignore_errors=True)


class Publisher:
    """Brings results from where they were written to where they are read."""

    def __init__(self, ledger: Ledger, places: Places, *, kind: JobKind, origin: dict[str, Any], run: str):
        """Prepare to publish.

        Args:
            ledger: Records what was published.
            places: Folders.
            kind: Of the jobs.
            origin: What every record says of settings, model and machine.
            run: Names this run.
        """
        self._ledger, self._places, self._kind = ledger, places, kind
        self._origin, self._run = origin, run

    def publish(self, job: Job, scored: Scored) -> str | None:
        """Give a result its name and record it; gives its folder, None where another scheduler has the job.

        Raises:
            OutputError: The folder cannot be written or renamed. It is told by ``out`` and the slide's pseudonym:
                its own name is made of the slide's, and errors get into logs.
        """
        part, folder = self._places.part(job), self._places.folder(job, self._kind)
        record = self._record(job, scored, folder)
        try:
            for name, text in ((PROVENANCE_FILE, record), (MANIFEST, list_sums(record))):
                (part / name).write_text(text, encoding="utf-8")
                sync_file(part / name)  # the others are on the disk already
            sync_folder(part)
            return self._rename_and_record(job, part, folder)
        except OSError as error:
            reason = f"the result of {job.pseudonym} cannot be written ({error.strerror or type(error).__name__})"
            raise OutputError(str(self._places.out), reason) from error

    def finish(self, job: Job) -> str | None:
        """Go on where a scheduler was killed while it published.

        Args:
            job: In the state ``publishing``, under a lease of ours.

        Returns:
            The folder; None where nothing is left of the result, and the slide has to be scored again.
        """
        assert job.folder is not None
        target = self._places.out / job.folder
        for part in self._places.parts(job):
            if _sums_of(part) == job.sums and not target.exists():
                _rename(part, target)
        return self._record_it(job, job.folder) if _sums_of(target) == job.sums else None

    def adopt(self, job: Job) -> str | None:
        """Record a result that is there already, as after the ledger was lost; None where there is none.

        One that is not whole is set aside.
        """
        folder = self._places.folder(job, self._kind)
        target = self._places.out / folder
        if not target.is_dir():
            return None
        if not _is_whole(target, job.key):
            target.rename(target.with_name(f"{target.name}.set-aside-{job.lease}"))
            return None
        sums = _sums_of(target)
        assert sums is not None
        return (
            self._record_it(job, folder) if self._ledger.begin_publishing(job, folder=folder, sums=sums) else None
        )

    def _rename_and_record(self, job: Job, part: Path, folder: str) -> str | None:
        sums = _sums_of(part)
        assert sums is not None
        if not self._ledger.begin_publishing(job, folder=folder, sums=sums):
            return None
        _rename(part, self._places.out / folder)
        return self._record_it(job, folder)

    def _record_it(self, job: Job, folder: str) -> str | None:
        record = (self._places.out / folder / PROVENANCE_FILE).read_text(encoding="utf-8")
        facts = json.loads(record)
        known = {"summary": facts["summary"], "measures": facts["measures"]}
        return folder if self._ledger.publish(job, **known, record=record) else None

    def _record(self, job: Job, scored: Scored, folder: str) -> str:
        return write_record(
            {
                "format": PROVENANCE_FORMAT,
                "job": job.key,
                "folder": folder,
                "outputs": scored.outputs,
                **self._origin,
                "run": self._run,
                "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "summary": scored.summary,
                "measures": scored.measures,
                **scored.facts,
            }
        )


def _rename(part: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(part, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not target.is_dir():
            raise
        # whoever took the job over meanwhile has renamed it
    sync_folder(target.parent)
    sync_folder(target.parent.parent)


def _sums_of(folder: Path) -> str | None:
    """SHA-256 of a folder's list of checksums; None where there is none."""
    try:
        return sha256_of(folder / MANIFEST)
    except OSError:
        return None


def _is_whole(folder: Path, key: str) -> bool:
    """Whether a folder is the result of a job, with all its files as they were written."""
    try:
        record = (folder / PROVENANCE_FILE).read_text(encoding="utf-8")
        facts: dict[str, Any] = json.loads(record)
        sums = (folder / MANIFEST).read_text(encoding="utf-8")
        files = all(sha256_of(folder / name) == sha256 for name, sha256 in facts["outputs"].items())
        return facts["job"] == key and sums == list_sums(record) and files
    except (OSError, ValueError, KeyError, TypeError):
        return False
