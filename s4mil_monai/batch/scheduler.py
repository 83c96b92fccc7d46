"""Scheduler: one pass over what is new. It alone writes the ledger; what scores are other processes."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from s4mil_monai.batch.hashing import Hashing
from s4mil_monai.batch.intake import Candidate, Intake
from s4mil_monai.batch.ledger import Failure, Job, JobKind, Ledger
from s4mil_monai.batch.logs import going_by, names_to_hide
from s4mil_monai.batch.publish import Places, Publisher
from s4mil_monai.batch.settings import SiteSettings
from s4mil_monai.batch.states import JobState
from s4mil_monai.batch.work import Began, Event, Executor, Lost, Scored, Work
from s4mil_monai.errors import OutputError

logger = logging.getLogger(__name__)

POLL_S = 0.2
"""How soon a signal is noticed, and anything else that brings no event."""
MOST_MISSING = 20
"""After so many slides that are not where they were seen, a pass asks for no more: it is the share."""
AWAY_S = 60.0
"""For so long, at least, a slide is left alone whose share is away; else a pass would ask for it without end."""


class Ending(str, Enum):
    """What became of a slide in this pass."""

    PUBLISHED = "published"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    HANDED_BACK = "handed_back"


@dataclass(frozen=True)
class Outcome:
    """One slide of this pass."""

    job: Job
    ending: Ending
    failure: Failure | None = None
    folder: str | None = None
    """Of the result, relative to ``out``."""
    summary: dict | None = None


@dataclass
class Pass:
    """All that happened in one pass."""

    outcomes: list[Outcome] = field(default_factory=list)
    changing: list[str] = field(default_factory=list)
    """Names of slides that were still being written."""
    resting: list[str] = field(default_factory=list)
    """Names of slides that could not be read through before, and are asked for again later."""
    problems: dict[str, str] = field(default_factory=dict)
    """Reasons by name of what could not be looked at."""
    stopped: str | None = None
    """Why it ended before all was done."""

    def last_outcomes(self) -> list[Outcome]:
        """Of each slide the last: one that was tried several times is one slide."""
        return list({outcome.job.key: outcome for outcome in self.outcomes}.values())

    @property
    def exit_code(self) -> int:
        """1 where anything failed."""
        bad = any(outcome.ending in (Ending.FAILED, Ending.QUARANTINED) for outcome in self.outcomes)
        return int(bad or bool(self.problems) or self.stopped not in (None, STOPPED))


STOPPED = "stopped by a signal"
KILLED = "the scheduler was killed while it had the slide"


@dataclass
class _InWork:
    job: Job
    began: float | None = None
    """On the monotonic clock; None until a process has turned to it."""


class Scheduler:
    """Brings every new slide of a site to its end, or hands it back."""

    def __init__(
        self,
        site: SiteSettings,
        kind: JobKind,
        *,
        ledger: Ledger,
        intake: Intake,
        executor: Executor,
        publisher: Publisher,
        places: Places,
    ):
        """Prepare a pass.

        Args:
            site: Settings.
            kind: Of the jobs.
            ledger: Of all jobs.
            intake: Finds new slides.
            executor: Scores them; started when there is something to score.
            publisher: Gives results their names.
            places: Folders below ``out``.
        """
        self._site, self._kind, self._places = site, kind, places
        self._ledger, self._intake, self._executor, self._publisher = ledger, intake, executor, publisher
        self._in_work: dict[str, _InWork] = {}
        self._candidates: deque[Candidate] = deque()
        self._hashing: Hashing | None = None
        self._dropped: dict[str, Failure] = {}
        self._renewed = time.monotonic()
        self._is_dry = False
        self._missing = 0
        self._stop = threading.Event()
        self._pass = Pass()

    def run(self, stop: threading.Event) -> Pass:
        """Score all that is new, and all whose next try is due.

        Args:
            stop: Once it is set, what can be finished within seconds is, and the rest is handed back.

        Raises:
            LedgerError: The ledger does not answer; leases of this pass end by themselves.
            S4MilError: The model cannot be loaded.
        """
        self._stop = stop
        self._recover()
        self._look()
        look_again = time.monotonic() + self._site.settle_s if self._pass.changing else None
        while not self._is_stopping:
            self._add_candidates()
            self._fill()
            self._work_a_little()
            if look_again is not None and time.monotonic() >= look_again:
                look_again = None
                self._look()
            if self._is_done and look_again is None:
                break
        self._wind_down()
        return self._pass

    # Intake -----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        found = self._intake.look()
        queued = {candidate.path for candidate in self._candidates}
        if self._hashing is not None:
            queued.add(self._hashing.candidate.path)
        self._candidates.extend(candidate for candidate in found.new if candidate.path not in queued)
        self._pass.changing, self._pass.resting = found.changing, found.resting
        for name, reason in found.problems.items():
            self._tell_problem(name, reason)

    def _tell_problem(self, name: str, reason: str) -> None:
        if self._pass.problems.get(name) != reason:
            with going_by("one", *names_to_hide(name)):
                logger.warning("a source or slide cannot be looked at: %s", reason, extra={"event": "problem"})
        self._pass.problems[name] = reason

    def _add_candidates(self) -> None:
        """Add jobs for slides whose content is known; let the content of one other be read meanwhile."""
        if self._hashing is not None and (outcome := self._hashing.outcome) is not None:
            finished, self._hashing = self._hashing.candidate, None
            if isinstance(outcome, str):
                self._add(finished, outcome)
            else:
                self._intake.fail(finished)
                self._tell_problem(finished.name, f"cannot be read ({outcome.strerror or outcome})")
        end = time.monotonic() + POLL_S
        while self._candidates and self._hashing is None and time.monotonic() < end:
            candidate = self._candidates.popleft()
            if candidate.slide is not None:
                self._add(candidate, candidate.slide)
            else:
                self._hashing = Hashing(candidate, limit_s=self._site.slide_limit_s)

    def _add(self, candidate: Candidate, slide: str) -> None:
        is_new = self._intake.add(candidate, slide)
        self._is_dry = False  # one that is known may have been added just before the ledger went away
        if is_new:
            logger.info("found %s", slide[:12], extra={"event": "found", "slide": slide[:12]})

    # Work -------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Claim as many jobs as the executor has room for."""
        while not self._is_dry and not self._is_stopping:
            if not self._in_work and self._ledger.next_try_s(self._kind) != 0:
                self._is_dry = True
                return
            self._executor.start()
            if self._is_stopping or not self._executor.room():  # loading the model takes its time
                return
            job = self._ledger.claim(self._kind, uuid.uuid4().hex)
            if job is None:
                self._is_dry = True
            else:
                self._begin(job)
            self._renew()

    def _begin(self, job: Job) -> None:
        path = self._intake.find_place(job.slide, job.path)
        if path is None:
            self._miss(job)
            return
        assert job.lease is not None
        try:
            folder = self._publisher.adopt(job)
        except OSError as error:
            self._give_up_machine(job, f"{self._site.out} cannot be written ({error.strerror or error})")
            return
        if folder is not None:
            self._tell_published(job, folder)
            return
        self._in_work[job.lease] = _InWork(job)
        self._executor.submit(
            Work(
                job.lease,
                job.slide,
                path,
                self._places.part(job).absolute(),
                alone=job.attempts > 1 or job.losses > 0,
            )
        )

    def _miss(self, job: Job) -> None:
        """Leave a slide for later whose share is away; where many are, ask for no more of them.

        Where its folder is there with something in it, it is the slide that is gone.
        """
        if _holds_something(Path(job.path).parent):
            with going_by(job.pseudonym, *names_to_hide(job.name)):
                self._fail(job, Failure("MissingSlideError", "is gone, or another slide has its name now"))
            return
        self._ledger.hand_back(job, "the slide is not where it was seen", pause_s=self._later_s)
        self._missing += 1
        said = "slide is" if self._missing == 1 else "slides are"
        self._pass.problems["sources"] = f"{self._missing} {said} not where seen last; is the share mounted?"
        self._is_dry = self._is_dry or self._missing >= MOST_MISSING

    def _work_a_little(self) -> None:
        for event in self._executor.poll(POLL_S) if self._in_work else self._idle():
            self._handle_named(event)
        self._renew()
        self._drop_the_late()

    def _idle(self) -> list[Event]:
        if self._is_dry:
            time.sleep(POLL_S)
        return []

    def _handle_named(self, event: Event) -> None:
        """Handle an event; the slide's name, which may be a patient's, goes into no log."""
        held = self._in_work.get(event.lease)
        if held is not None:
            with going_by(held.job.pseudonym, held.job.path, *names_to_hide(held.job.name)):
                self._handle(event, held)

    def _handle(self, event: Event, held: _InWork) -> None:
        if isinstance(event, Began):
            held.began = time.monotonic()
            return
        del self._in_work[event.lease]
        dropped = self._dropped.pop(event.lease, None)
        self._is_dry = False  # its next try may be due at once
        if isinstance(event, Scored):
            self._publish(held.job, event)
        elif isinstance(event, Lost):
            self._lose(held, event, dropped)
        elif event.of_the_machine:
            self._give_up_machine(held.job, event.failure.reason)
        elif event.of_the_share:
            self._leave_for_later(held.job, event.failure.reason)
        else:
            self._fail(held.job, event.failure)

    def _publish(self, job: Job, scored: Scored) -> None:
        try:
            folder = self._publisher.publish(job, scored)
        except OutputError as error:
            self._give_up_machine(job, str(error))
            return
        if folder is None:
            logger.warning(
                "%s is another scheduler's now",
                job.pseudonym,
                extra={"event": "lease_lost", "slide": job.pseudonym},
            )
            return
        self._tell_published(job, folder, scored.summary)

    def _tell_published(self, job: Job, folder: str, summary: dict | None = None) -> None:
        summary = summary or self._ledger.find(job.key).summary or {}
        self._pass.outcomes.append(Outcome(job, Ending.PUBLISHED, folder=folder, summary=summary))
        seconds = summary.get("seconds", {}).get("total", 0.0)
        logger.info(
            "published %s: %s in %.1f s",
            job.pseudonym,
            summary.get("decision") or summary.get("predicted") or summary.get("status"),
            seconds,
            extra={"event": "published", "slide": job.pseudonym, "job": job.key[:16], "seconds": seconds},
        )

    def _fail(self, job: Job, failure: Failure) -> None:
        after = self._ledger.fail(job, failure)
        if after is None:
            return
        ending = Ending.QUARANTINED if after is JobState.QUARANTINED else Ending.FAILED
        self._pass.outcomes.append(Outcome(job, ending, failure))
        logger.error(
            "%s %s, try %d: %s",
            ending.value,
            job.pseudonym,
            job.attempts,
            failure.reason,
            extra={
                "event": ending.value,
                "slide": job.pseudonym,
                "job": job.key[:16],
                "error": failure.error,
                "attempt": job.attempts,
            },
        )

    def _lose(self, held: _InWork, lost: Lost, dropped: Failure | None) -> None:
        """Its process is gone: was that the slide's doing?"""
        if dropped is not None and not lost.shared:
            self._fail(held.job, dropped)
        elif self._is_stopping:
            self._hand_back(held.job, lost.reason)
        elif lost.of_the_machine:
            self._give_up_machine(held.job, lost.reason)
        elif held.began is None:
            self._hand_back(held.job, lost.reason)
        elif lost.shared:
            self._try_alone(held.job, lost.reason)
        else:
            self._fail(held.job, Failure("LostProcessError", lost.reason))

    def _try_alone(self, job: Job, reason: str) -> None:
        """One of several has brought their process down: it will do so again when it has one for itself."""
        if self._ledger.lose(job, reason, error="LostProcessError") is JobState.QUARANTINED:
            self._pass.outcomes.append(Outcome(job, Ending.QUARANTINED, Failure("LostProcessError", reason)))
        else:
            self._tell_handed_back(job, reason)

    def _drop_the_late(self) -> None:
        """Give up the slide that is late, with its process; of several in it each is tried again alone."""
        begun = [(held.began, lease) for lease, held in self._in_work.items() if held.began is not None]
        if self._dropped or not begun:
            return
        began, lease = min(begun)
        if time.monotonic() - began > self._site.slide_limit_s:
            limit = f"took longer than {self._site.slide_limit_s:g} s (slide_limit_s)"
            self._dropped[lease] = Failure("SlideLimitError", limit)
            self._executor.drop(lease)

    def _renew(self) -> None:
        if time.monotonic() - self._renewed > self._site.lease_s / 3:
            self._ledger.renew(list(self._in_work))
            self._renewed = time.monotonic()
            if not self._is_stopping:
                self._recover()  # a long pass does not leave those of a machine that died to the next one

    # Ends -------------------------------------------------------------------------------------------------------

    @property
    def _is_stopping(self) -> bool:
        return self._stop.is_set() or self._pass.stopped is not None

    @property
    def _is_done(self) -> bool:
        return self._is_dry and not self._in_work and not self._candidates and self._hashing is None

    def _wind_down(self) -> None:
        """After a request to stop: wait a little for what is in work, hand back the rest."""
        if not self._is_stopping:
            return
        self._pass.stopped = self._pass.stopped or STOPPED
        end = time.monotonic() + self._site.stop_within_s
        while self._in_work and time.monotonic() < end:
            self._work_a_little()
        for event in self._executor.stop():
            self._handle_named(event)
        for held in list(self._in_work.values()):
            self._hand_back(held.job, STOPPED)
        self._in_work.clear()

    def _give_up_machine(self, job: Job, reason: str) -> None:
        """The next slide would fail alike: end the pass, and count no try."""
        self._hand_back(job, reason)
        self._pass.stopped = self._pass.stopped or reason
        logger.error("the pass ends: %s", reason, extra={"event": "machine"})

    def _leave_for_later(self, job: Job, reason: str) -> None:
        """Its share is away or does not answer: count no try, and do not ask again at once."""
        self._ledger.hand_back(job, reason, pause_s=self._later_s)
        self._tell_problem(job.name, reason)

    @property
    def _later_s(self) -> float:
        return max(AWAY_S, self._site.backoff_s)

    def _hand_back(self, job: Job, note: str) -> None:
        self._ledger.hand_back(job, note)
        self._tell_handed_back(job, note)

    def _tell_handed_back(self, job: Job, note: str) -> None:
        self._pass.outcomes.append(Outcome(job, Ending.HANDED_BACK, Failure("", note)))
        logger.info(
            "handed back %s: %s", job.pseudonym, note, extra={"event": "handed_back", "slide": job.pseudonym}
        )

    def _recover(self) -> None:
        """See to jobs of schedulers that are gone; remove what they have left."""
        for job in self._ledger.find_abandoned(holding=self._in_work):
            mine = self._ledger.take_over(job, uuid.uuid4().hex)
            if mine is None:
                continue
            try:
                folder = self._publisher.finish(mine) if mine.state is JobState.PUBLISHING else None
            except OSError as error:
                self._give_up_machine(mine, f"{self._site.out} cannot be written ({error.strerror or error})")
                continue
            if folder is not None:
                self._tell_published(mine, folder)
            elif self._ledger.lose(mine, KILLED) is JobState.QUARANTINED:
                self._pass.outcomes.append(
                    Outcome(mine, Ending.QUARANTINED, Failure("LostSchedulerError", KILLED))
                )
        self._places.sweep(self._ledger.held)


def _holds_something(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False
