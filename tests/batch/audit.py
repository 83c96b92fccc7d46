"""What must hold after any fault: every slide published exactly once, every file whole, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from s4mil_monai.batch.ledger import Ledger
from s4mil_monai.batch.provenance import check_chain, check_outputs
from s4mil_monai.batch.states import JobState
from s4mil_monai.models.manifest import MANIFEST


@dataclass
class Audit:
    """What is wrong, each with a sentence; all lists are empty where all is well."""

    published: int = 0
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    half_written: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Ledger and chain."""

    @property
    def problems(self) -> list[str]:
        """All of them."""
        return [*self.lost, *self.twice, *self.half_written, *self.broken]


def audit(ledger: Ledger, share: Path, out: Path) -> Audit:
    """Compare slides, ledger, chain and results.

    Args:
        ledger: Opened anew.
        share: Every file in it is a slide that should be published.
        out: Folder of results.
    """
    found = Audit()
    _audit_jobs(ledger, share, found)
    _audit_chain(ledger, out, found)
    _audit_folders(ledger, out, found)
    return found


def _audit_jobs(ledger: Ledger, share: Path, found: Audit) -> None:
    jobs = ledger.jobs()
    states = {job.slide: job.state for job in jobs}
    for slide in (path for path in share.rglob("*") if path.is_file()):
        if states.get(hashlib.sha256(slide.read_bytes()).hexdigest()) is not JobState.PUBLISHED:
            found.lost.append(f"{slide.name} is not published")
    found.published = sum(job.state is JobState.PUBLISHED for job in jobs)
    found.twice += [
        f"slide {slide} has {n} jobs" for slide, n in Counter(job.slide for job in jobs).items() if n > 1
    ]
    ended = Counter(step.job for step in ledger.history() if step.after is JobState.PUBLISHED)
    found.twice += [f"job {job.key} was published {ended[job.key]} times" for job in jobs if ended[job.key] > 1]


def _audit_chain(ledger: Ledger, out: Path, found: Audit) -> None:
    links = list(ledger.chain())
    found.broken += map(str, check_chain(links, head=ledger.head()))
    records = Counter(json.loads(link.record)["job"] for link in links)
    found.twice += [f"job {job} has {n} records" for job, n in records.items() if n > 1]
    for job in ledger.jobs():
        if job.state is JobState.PUBLISHED and not records[job.key]:
            found.lost.append(f"job {job.key} has no record")
    found.half_written += [str(problem) for link in links for problem in check_outputs(link.record, out)]


def _audit_folders(ledger: Ledger, out: Path, found: Audit) -> None:
    folders = sorted(str(path.relative_to(out)) for path in out.glob("results/*/*"))
    wanted = sorted(job.folder for job in ledger.jobs() if job.folder is not None)
    if folders != wanted:
        found.twice += [f"nobody knows {folder}" for folder in sorted(set(folders) - set(wanted))]
    for job in ledger.jobs():
        if job.folder and hashlib.sha256((out / job.folder / MANIFEST).read_bytes()).hexdigest() != job.sums:
            found.half_written.append(f"{job.folder} is not what the ledger says")
    left = [*out.glob(".work/*"), *out.rglob("*.part")]
    found.half_written += [f"{path.relative_to(out)} was left behind" for path in left]
    for report in out.glob("runs/*/run.json"):
        json.loads(report.read_text())


def check_integrity(file: Path) -> str:
    """What SQLite says of the file: ``ok``."""
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]
