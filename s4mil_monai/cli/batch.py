"""``s4mil batch``: new slides scored on a schedule, and what has become of them."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from s4mil_monai.cli.console import EXIT_ERROR, complain, say
from s4mil_monai.cli.options import shipped_bundle
from s4mil_monai.cli.usage import UsageError, require_positive

if TYPE_CHECKING:
    from s4mil_monai.batch.ledger import Job, JobKind, Ledger
    from s4mil_monai.batch.states import JobState

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def batch_run(*, config: str, every: str | None = None) -> int:
    """Score what is new in the site's sources, and end; leave with 1 if anything failed, 0 if asked to stop.

    Args:
        config: YAML of the site, as in configs/scoring.
        every: Stay, and look again this long after each pass: 30s, 10m, 2h.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    pause_s = None if every is None else parse_duration("every", every)
    from s4mil_monai.batch.logs import set_up_logs
    from s4mil_monai.batch.passes import run_passes

    set_up_logs()
    code = 0
    for done in run_passes(Path(config), stop=stop, every_s=pause_s, default_bundle=shipped_bundle):
        code = done.exit_code
        say(done.line)
    return 0 if every is not None and stop.is_set() else code


def batch_status(*, config: str, state: str | None = None, slide: str | None = None) -> int:
    """Say how many jobs are in which state, and which are in trouble.

    Args:
        config: YAML of the site.
        state: Name every job in this state.
        slide: Tell the history of a slide: the beginning of its fingerprint, or its file name.
    """
    ledger = _open(config)
    if slide is not None:
        return _tell_history(ledger, slide)
    wanted = None if state is None else _as_state(state)
    kind = _find_kind(config)
    for found, count in ledger.counts(kind).items():
        say(f"{found.value:12} {count:7}  {found.sentence}")
    if kind is not None:
        _tell_earlier(ledger, kind)
    for job in ledger.jobs(*_in_states(wanted)) if wanted else _troubled(ledger, kind):
        _say_printable(_describe(job))
    last = ledger.last_run()
    if last is not None:
        said = f": {last[3]}" if last[3] else ""
        say(f"last run: began {_as_time(last[0])}, {_describe_end(last[1], last[2])}{said}")
    return 0


def batch_retry(*, config: str, slide: str | None = None, all: bool = False) -> int:
    """Let slides that failed or are in quarantine be tried again by the next run.

    Args:
        config: YAML of the site.
        slide: The beginning of its fingerprint, or its file name.
        all: Every one of them.
    """
    from s4mil_monai.batch.states import JobState

    ledger = _open(config)
    found = _find_jobs(ledger, slide, all, JobState.QUARANTINED, JobState.RETRY)
    moved = ledger.retry([job.key for job in found])
    for job in moved:
        _say_printable(f"{job.name} ({job.pseudonym}): the next run tries it again")
    return _tell_none(moved, "no slide that failed or is in quarantine", "`s4mil batch status` lists them")


def batch_quarantine(*, config: str, slide: str | None = None, reason: str = "set aside by hand") -> int:
    """List what is in quarantine and why, or put a slide there.

    Args:
        config: YAML of the site.
        slide: The beginning of its fingerprint, or its file name; without it, the quarantine is listed.
        reason: Why nobody should try it.
    """
    from s4mil_monai.batch.states import JobState

    ledger = _open(config)
    if slide is None:
        for job in ledger.jobs(*_in_states(JobState.QUARANTINED)):
            _say_printable(_describe(job))
        return 0
    found = _find_jobs(ledger, slide, False, JobState.WAITING, JobState.RETRY)
    moved = ledger.quarantine([job.key for job in found], reason)
    for job in moved:
        _say_printable(f"{job.name} ({job.pseudonym}): in quarantine, {reason}")
    waiting = "`s4mil batch status --state waiting` lists them"
    return _tell_none(moved, "no slide that waits", waiting)


def batch_export(*, config: str, out: str) -> int:
    """Write all jobs with their results as a table.

    Args:
        config: YAML of the site.
        out: File to write; .csv or .parquet.
    """
    from s4mil_monai.batch.export import FORMATS, export_jobs

    if Path(out).suffix not in FORMATS:
        raise UsageError(f"--out ends with {' or '.join(FORMATS)}, got {out}")
    say(f"{export_jobs(_open(config), Path(out))} jobs in {out}")
    return 0


def batch_metrics(*, config: str) -> int:
    """Print the state of jobs, runs and drift as Prometheus text; the exit code does not depend on it.

    Args:
        config: YAML of the site.
    """
    from s4mil_monai.batch.drift import compare_recent
    from s4mil_monai.batch.prometheus import metrics_text
    from s4mil_monai.batch.site import read_site_as_told
    from s4mil_monai.batch.snapshot import take_batch_snapshot

    ledger = _open(config)
    site = read_site_as_told(Path(config), default_bundle=shipped_bundle)
    say(metrics_text(take_batch_snapshot(ledger, site.kind, compare_recent(site, ledger))).rstrip())
    return 0


def batch_reference(*, config: str, slides: int = 300) -> int:
    """Make the slides that were published last the reference that drift is measured against, in the bundle.

    Args:
        config: YAML of the site, with a bundle of its own.
        slides: At most so many; at least 30 are needed.
    """
    from s4mil_monai.batch.drift import make_reference
    from s4mil_monai.batch.site import read_checked_site
    from s4mil_monai.errors import SettingsError

    require_positive("slides", slides)

    def refuse() -> Path:
        raise SettingsError(
            config, "bundle: names none; the reference is not written into the one that is shipped"
        )

    site = read_checked_site(Path(config), default_bundle=refuse)
    say(f"the reference is in {make_reference(site, _open(config), slides=slides)}")
    return 0


def verify(*, config: str, head: str | None = None) -> int:
    """Check the chain of provenance records and every file of every result; leave with 1 if anything is amiss.

    Args:
        config: YAML of the site.
        head: A hash that the chain has to contain: provenance_head of a run.json that you have kept.
    """
    from s4mil_monai.batch.printable import printable
    from s4mil_monai.batch.settings import read_site
    from s4mil_monai.batch.site import open_ledger
    from s4mil_monai.batch.verify import verify_results

    site = read_site(Path(config))
    ledger = open_ledger(site, must_exist=True)
    problems, end = 0, ledger.head()
    for problem in verify_results(ledger, site.out, end=end, head=head):
        problems += 1
        complain(printable(str(problem)))
    if problems == 0:
        say(f"{end[0]} results are as they were recorded; the chain ends with {end[1]}")
    return EXIT_ERROR if problems else 0


def parse_duration(name: str, text: str) -> float:
    """Seconds of ``90s``, ``10m``, ``2h`` or ``1d``.

    Raises:
        UsageError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--{name} is a time such as 30s, 10m or 2h, got {text!r}")
    return float(found[1]) * UNITS_S[found[2]]


def _open(config: str) -> Ledger:
    from s4mil_monai.batch.settings import read_site
    from s4mil_monai.batch.site import open_ledger

    return open_ledger(read_site(Path(config)), must_exist=True)


def _find_kind(config: str) -> JobKind | None:
    """The kind of the jobs that a run would score now; None, with a complaint, where the bundle cannot be read."""
    from s4mil_monai.batch.site import read_site_as_told
    from s4mil_monai.errors import BundleError

    try:
        return read_site_as_told(Path(config), default_bundle=shipped_bundle).kind
    except BundleError as error:
        complain(f"{error}; jobs of all models are counted")
        return None


def _tell_earlier(ledger: Ledger, kind: JobKind) -> None:
    from s4mil_monai.batch.snapshot import count_earlier

    found = [f"{count} {state.value}" for state, count in count_earlier(ledger, kind).items() if count]
    if found:
        say(f"of earlier models or settings, which no run scores: {', '.join(found)}")


def _say_printable(text: str) -> None:
    """Say what has names of files in it, which may hold anything."""
    from s4mil_monai.batch.printable import printable

    say(printable(text))


def _as_state(name: str) -> JobState:
    from s4mil_monai.batch.states import JobState
    from s4mil_monai.errors import UnknownNameError

    try:
        return JobState(name)
    except ValueError as error:
        raise UnknownNameError("state", name, tuple(state.value for state in JobState)) from error


def _in_states(*states: JobState) -> tuple:
    from s4mil_monai.batch.schema import JOBS

    return (JOBS.c.state.in_([state.value for state in states]),)


def _troubled(ledger: Ledger, kind: JobKind | None) -> list[Job]:
    from s4mil_monai.batch.schema import JOBS
    from s4mil_monai.batch.states import JobState

    of_now = () if kind is None else (JOBS.c.model == kind.model, JOBS.c.settings == kind.settings)
    return ledger.jobs(*_in_states(JobState.RETRY, JobState.QUARANTINED), *of_now)


def _find_jobs(ledger: Ledger, slide: str | None, all_of_them: bool, *states: JobState) -> list[Job]:
    if (slide is None) != all_of_them:
        raise UsageError("name one --slide, or say --all")
    found = ledger.jobs(*_in_states(*states))
    return [job for job in found if all_of_them or _is_called(job, slide or "")]


def _is_called(job: Job, slide: str) -> bool:
    by_fingerprint = len(slide) >= 4 and job.slide.startswith(slide.lower())
    return by_fingerprint or slide in (job.name, Path(job.name).name)


def _tell_none(moved: list[Job], what: str, lists: str) -> int:
    if not moved:
        complain(f"{what} is called so; {lists}")
    return 0 if moved else EXIT_ERROR


def _tell_history(ledger: Ledger, slide: str) -> int:
    found = [job for job in ledger.jobs() if _is_called(job, slide)]
    for job in found:
        _say_printable(_describe(job))
        for line in ledger.history(job.key):
            before = line.before.value if line.before else "new"
            note = f"  {line.note}" if line.note else ""
            _say_printable(f"  {_as_time(line.at)}  {before} → {line.after.value}{note}")
    return _tell_none(found, "no slide", "`s4mil batch export` lists all")


def _describe(job: Job) -> str:
    said = f"{job.state.value:12} {job.name} ({job.pseudonym}), model {job.model[:8]}"
    if job.reason is not None and job.summary is None:
        said += f", try {job.attempts}: {job.error}: {job.reason}"
    if job.summary is not None:
        said += f", {job.summary.get('decision') or job.summary.get('predicted') or job.summary.get('status')}"
    return f"{said}, in {job.folder}" if job.folder and job.summary else said


def _describe_end(ended: float | None, code: int | None) -> str:
    return "has not ended" if ended is None else f"ended {_as_time(ended)} with exit code {code}"


def _as_time(seconds: float) -> str:
    from datetime import datetime, timezone

    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
