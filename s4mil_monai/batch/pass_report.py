"""report_pass(): what happened in one pass, as the run report tells it."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from s4mil_monai import __version__
from s4mil_monai.batch.ledger import Job, Ledger
from s4mil_monai.batch.run_report import ReportedSlide, RunReport, SlideFailure, relative_link
from s4mil_monai.batch.scheduler import Ending, Outcome, Pass
from s4mil_monai.batch.settings import SiteSettings
from s4mil_monai.batch.site import Site
from s4mil_monai.batch.states import CLAIMABLE, JobState

RUNS = "runs"
"""Below ``out``: a folder for each run that had something to tell."""


def report_pass(
    done: Pass, site: Site, ledger: Ledger, *, run: str, started: float, drift: str | None = None
) -> RunReport:
    """The report of a pass.

    Args:
        done: The pass.
        site: Whose it was.
        ledger: Still open.
        run: Its name.
        started: When it began, in seconds since 1970.
        drift: The line on drift, if it was looked at.
    """
    counts, settings = ledger.counts(site.kind), site.settings
    folder = settings.out / RUNS / run
    slides = [_report(outcome, settings, ledger, folder) for outcome in done.last_outcomes()]
    slides += [ReportedSlide(pseudonym=None, name=name, outcome="still_changing") for name in done.changing]
    slides += [_report_problem(name, reason, settings) for name, reason in done.problems.items()]
    return RunReport(
        run=run,
        started=datetime.fromtimestamp(started, timezone.utc),
        ended=datetime.now(timezone.utc),
        version=__version__,
        slides=tuple(slides),
        waiting=sum(counts[state] for state in CLAIMABLE),
        quarantined=counts[JobState.QUARANTINED],
        drift=drift,
        provenance_head=ledger.head()[1],
    )


def _report(outcome: Outcome, site: SiteSettings, ledger: Ledger, folder: Path) -> ReportedSlide:
    job, summary = outcome.job, outcome.summary or {}
    known: dict[str, Any] = {"pseudonym": job.pseudonym, "name": job.name, "outcome": outcome.ending.value}
    if outcome.ending in (Ending.FAILED, Ending.QUARANTINED):
        return ReportedSlide(**known, failure=_describe_failure(outcome, site, ledger.find(job.key)))
    if outcome.folder is None:
        return ReportedSlide(**known)
    result = site.out / outcome.folder
    shown = ("status", "predicted", "probability", "positive", "calibrated", "decision")
    known |= {name: summary.get(name) for name in shown}
    return ReportedSlide(
        **known,
        notes=tuple(summary.get("notes", ())) + ((summary["reason"],) if summary.get("reason") else ()),
        seconds=summary.get("seconds", {}).get("total"),
        report=relative_link(result / "report.html", folder),
        picture=relative_link(result / "heatmap.png", folder),
    )


def _describe_failure(outcome: Outcome, site: SiteSettings, now: Job) -> SlideFailure:
    assert outcome.failure is not None
    if outcome.ending is Ending.QUARANTINED:
        follows = f"set aside; `s4mil batch retry --slide {now.pseudonym}` tries it again"
    else:
        when = datetime.fromtimestamp(now.not_before, timezone.utc)
        follows = f"tried again after {when:%Y-%m-%d %H:%M} UTC"
    return SlideFailure(
        kind=outcome.failure.error,
        reason=outcome.failure.reason,
        attempt=max(1, outcome.job.attempts),
        attempts=max(site.tries, outcome.job.attempts),
        next=follows,
    )


def _report_problem(name: str, reason: str, site: SiteSettings) -> ReportedSlide:
    failure = SlideFailure(
        kind="IntakeError", reason=reason, attempt=1, attempts=site.tries, next="the next run looks again"
    )
    return ReportedSlide(pseudonym=None, name=name, outcome="failed", failure=failure)
