"""run_passes(): one pass over a site, or one every so often, each with its report."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from s4mil_monai.batch.drift import compare_recent
from s4mil_monai.batch.ledger import Ledger
from s4mil_monai.batch.pass_report import RUNS, report_pass
from s4mil_monai.batch.run_report import RUN_HTML, RunReport, write_run_report
from s4mil_monai.batch.scheduler import POLL_S, Ending, Pass
from s4mil_monai.batch.settings import SiteSettings
from s4mil_monai.batch.site import Site, new_run, open_ledger, read_checked_site
from s4mil_monai.batch.states import JobState
from s4mil_monai.batch.work import Executor
from s4mil_monai.errors import BundleError, LedgerError, S4MilError
from s4mil_monai.statistics.drift import describe_drift

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DonePass:
    """What a pass comes to."""

    exit_code: int
    line: str
    """For a person."""


def run_passes(
    file: Path,
    *,
    stop: threading.Event,
    every_s: float | None,
    default_bundle: Callable[[], Path],
    make_executor: Callable[[Site], Executor] = Site.make_executor,
) -> Iterator[DonePass]:
    """Bring all that is new to its end; with ``every_s``, again and again until ``stop`` is set.

    Args:
        file: YAML of the site, read anew for every pass.
        stop: What is in work is finished within seconds or handed back.
        every_s: Seconds from the end of a pass to the next.
        default_bundle: Gives the bundle where the settings name none.
        make_executor: Gives what scores.

    Raises:
        S4MilError: The site is not in order, or its ledger or model cannot be used. After the first pass it is the
            outcome of a pass instead: a share that is away for an hour ends nothing.
    """
    held = _HeldExecutor(make_executor)
    try:
        yield _run_pass(file, held, stop, default_bundle)
        while every_s is not None and _pause(stop, every_s):
            try:
                yield _run_pass(file, held, stop, default_bundle)
            except S4MilError as error:
                held.stop()  # with all it had in work
                yield DonePass(1, f"{error}; the next pass tries again")
    finally:
        held.stop()


def _pause(stop: threading.Event, seconds: float) -> bool:
    """Wait; gives False if asked to stop.

    Not by ``stop.wait``: a signal's handler that sets the event while this thread holds its lock waits for ever.
    """
    end = time.monotonic() + seconds
    while not stop.is_set() and (left := end - time.monotonic()) > 0:
        time.sleep(min(POLL_S, left))
    return not stop.is_set()


class _HeldExecutor:
    """Keeps the model loaded between passes, until the settings ask for another."""

    def __init__(self, make_executor: Callable[[Site], Executor]) -> None:
        self._make_executor = make_executor
        self._executor: Executor | None = None
        self._site: Site | None = None

    def of(self, site: Site) -> Executor:
        if self._executor is None or site != self._site:
            self.stop()
            self._executor, self._site = self._make_executor(site), site
        return self._executor

    def stop(self) -> None:
        if self._executor is not None:
            self._executor.stop()
        self._executor = None


def _run_pass(
    file: Path, held: _HeldExecutor, stop: threading.Event, default_bundle: Callable[[], Path]
) -> DonePass:
    site = read_checked_site(file, default_bundle=default_bundle)
    ledger = open_ledger(site.settings)
    try:
        return _score_and_report(site, ledger, held.of(site), stop)
    finally:
        ledger.database.close()


def _score_and_report(site: Site, ledger: Ledger, executor: Executor, stop: threading.Event) -> DonePass:
    run = new_run()
    started = ledger.begin_run(run)
    ended = DonePass(1, "ended by an error")
    try:
        done = site.make_scheduler(ledger, executor, run=run).run(stop)
        line = describe_pass(done, site.settings, quarantined=_in_quarantine(site, ledger))
        ended = DonePass(done.exit_code, line)
        if done.outcomes or done.problems:
            report = report_pass(done, site, ledger, run=run, started=started, drift=_tell_drift(site, ledger))
            folder = site.settings.out / RUNS / run
            write_run_report(report, folder)
            ended = DonePass(done.exit_code, f"{ended.line}; open {folder / RUN_HTML}")
            _log_pass(report)
        return ended
    except S4MilError as error:
        ended = DonePass(1, str(error))
        raise
    finally:
        with suppress(LedgerError):
            ledger.end_run(run, exit_code=ended.exit_code, report={"line": ended.line})


def _in_quarantine(site: Site, ledger: Ledger) -> int:
    return ledger.counts(site.kind)[JobState.QUARANTINED]


def _tell_drift(site: Site, ledger: Ledger) -> str:
    try:
        return describe_drift(compare_recent(site, ledger))
    except BundleError as error:
        return f"drift: not compared, {error}"


def _log_pass(report: RunReport) -> None:
    counts = {name: report.counts.get(name, 0) for name in ("published", "failed", "quarantined", "handed_back")}
    logger.info("the pass %s has ended", report.run, extra={"event": "pass", **counts, "waiting": report.waiting})


def describe_pass(done: Pass, site: SiteSettings, *, quarantined: int = 0) -> str:
    """One line: how many slides ended how. It goes to the journal, and names sources but no slide.

    Args:
        done: The pass; of a slide that was tried several times, the last ending counts.
        site: Whose sources are named.
        quarantined: Slides in quarantine now, said where there is nothing new: they wait for somebody.
    """
    counts = Counter(outcome.ending for outcome in done.last_outcomes())
    said = [f"{counts[ending]} {ending.value.replace('_', ' ')}" for ending in Ending if counts[ending]]
    said += [f"{len(done.changing)} still changing"] if done.changing else []
    said += [f"{len(done.resting)} unreadable, asked for again later"] if done.resting else []
    sources = {str(source.path) for source in site.sources} | {"sources"}
    said += [f"{name}: {reason}" for name, reason in done.problems.items() if name in sources]
    others = len(done.problems.keys() - sources)
    said += [f"{others} could not be looked at"] if others else []
    said += [done.stopped] if done.stopped else []
    if said:
        return "; ".join(said)
    waiting = f"; {quarantined} in quarantine, see `s4mil batch quarantine`" if quarantined else ""
    return f"nothing new{waiting}"
