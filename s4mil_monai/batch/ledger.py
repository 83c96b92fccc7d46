"""Ledger: which slides there are, what has become of each, and who works on it now."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from s4mil_monai.batch.database import Database
from s4mil_monai.batch.provenance import Link, link
from s4mil_monai.batch.schema import CHAIN, HISTORY, JOBS, PROVENANCE, RUNS
from s4mil_monai.batch.states import CLAIMABLE, FAILED, FROM, HELD, JobState
from s4mil_monai.processes import describe_me, has_ended, name_machine

DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class JobKind:
    """What a scheduler scores with; its jobs are those of the same model and settings."""

    model: str
    """Fingerprint of slide model, encoder, patch settings and calibration."""
    settings: str
    """Fingerprint of the site's settings that change a result."""
    model_name: str = ""
    """Bundle and version, for people."""


@dataclass(frozen=True)
class Job:
    """One slide to be scored by one model with one set of settings."""

    key: str
    slide: str
    model: str
    settings: str
    path: str
    name: str
    state: JobState
    attempts: int
    losses: int
    found_at: float
    changed_at: float
    not_before: float
    lease: str | None
    owner: str | None
    leased_at: float | None
    expires_at: float | None
    error: str | None
    reason: str | None
    folder: str | None
    sums: str | None
    summary: dict[str, Any] | None
    measures: dict[str, Any] | None

    @property
    def pseudonym(self) -> str:
        """What the slide is called where its name must not be told."""
        return self.slide[:12]


@dataclass(frozen=True)
class Transition:
    """One line of a job's history."""

    job: str
    at: float
    before: JobState | None
    after: JobState
    owner: str | None
    note: str | None


@dataclass(frozen=True)
class Failure:
    """Why a try gave no result."""

    error: str
    """Kind, a class name."""
    reason: str
    permanent: bool = False
    """No other try can help."""


class Ledger:
    """All jobs of one or several schedulers; each of its methods is one transaction."""

    def __init__(self, database: Database, *, lease_s: float, tries: int, losses: int, backoff_s: float):
        """See :class:`SiteSettings` for the numbers."""
        self._database = database
        self._lease_s, self._tries, self._losses, self._backoff_s = lease_s, tries, losses, backoff_s
        self._me = describe_me()

    @property
    def database(self) -> Database:
        """Where it lies."""
        return self._database

    def add(self, key: str, slide: str, kind: JobKind, *, path: str, name: str) -> bool:
        """Add a job unless it is known; a known one learns where its slide lies now. Gives whether it is new."""

        def work(connection: Connection) -> bool:
            now = self._database.now(connection)
            known = connection.execute(sa.select(JOBS.c.path).where(JOBS.c.key == key)).scalar()
            if known is not None:
                if known != path and not os.path.exists(known):
                    connection.execute(sa.update(JOBS).where(JOBS.c.key == key).values(path=path, name=name))
                return False
            row = {"key": key, "slide": slide, "model": kind.model, "settings": kind.settings, "path": path}
            row |= {"name": name, "state": JobState.WAITING.value, "attempts": 0, "losses": 0}
            row |= {"found_at": now, "changed_at": now, "not_before": 0.0}
            try:
                with connection.begin_nested():
                    connection.execute(sa.insert(JOBS).values(**row))
            except IntegrityError:  # another scheduler was faster
                return False
            self._note(connection, key, now, None, JobState.WAITING, None)
            return True

        return self._database.transact(work)

    def claim(self, kind: JobKind, token: str) -> Job | None:
        """Take the job that has waited longest under a lease named ``token``; None where nothing is to be done.

        A try counts from here on, so that a slide that kills whoever touches it ends in quarantine.
        """

        def work(connection: Connection) -> Job | None:
            taken = connection.execute(sa.select(JOBS).where(JOBS.c.lease == token)).one_or_none()
            if taken is not None:  # of the try whose answer was lost
                return _as_job(taken)
            now = self._database.now(connection)
            job = self._find_claimable(connection, kind, now)
            if job is None:
                return None
            values = self._lease(token, now) | {"attempts": job.attempts + 1}
            self._move(connection, job, JobState.RUNNING, now, note=f"try {job.attempts + 1}", **values)
            return _as_job(connection.execute(sa.select(JOBS).where(JOBS.c.key == job.key)).one())

        return self._database.transact(work)

    def renew(self, tokens: Sequence[str]) -> set[str]:
        """Prolong leases; gives those that still hold."""

        def work(connection: Connection) -> set[str]:
            now = self._database.now(connection)
            values = {"leased_at": now, "expires_at": now + self._lease_s}
            held = sa.and_(JOBS.c.lease.in_(tokens), JOBS.c.state.in_(HELD))
            return set(
                connection.execute(sa.update(JOBS).where(held).values(**values).returning(JOBS.c.lease)).scalars()
            )

        return self._database.transact(work) if tokens else set()

    def begin_publishing(self, job: Job, *, folder: str, sums: str) -> bool:
        """Record what the result will be; gives whether the lease still holds."""

        def work(connection: Connection) -> bool:
            now = self._database.now(connection)
            found = self._held(connection, job, JobState.RUNNING, JobState.PUBLISHING)
            if found is None:
                return False
            if found.state is JobState.RUNNING:
                self._move(connection, found, JobState.PUBLISHING, now, folder=folder, sums=sums)
            return True

        return self._database.transact(work)

    def publish(self, job: Job, *, summary: dict[str, Any], measures: dict[str, Any] | None, record: str) -> bool:
        """Record that the result has its name, and append its record to the chain, at once.

        Gives False where the lease was lost meanwhile: another scheduler has the job.
        """

        def work(connection: Connection) -> bool:
            now = self._database.now(connection)
            found = self._held(connection, job, JobState.PUBLISHING, JobState.PUBLISHED)
            if found is None:
                return False
            if found.state is JobState.PUBLISHING:
                known = {"summary": summary, "measures": measures, "error": None, "reason": None}
                self._move(connection, found, JobState.PUBLISHED, now, **_let_go(keep_token=True), **known)
                _append(connection, found.key, record)
            return True

        return self._database.transact(work)

    def fail(self, job: Job, failure: Failure) -> JobState | None:
        """Record a failed try; gives what the job is now, None where the lease was lost meanwhile."""

        def work(connection: Connection) -> JobState | None:
            now = self._database.now(connection)
            found = self._held(connection, job, *HELD)
            if found is None:
                now_is = self.find(job.key, connection)
                return now_is.state if now_is.attempts == job.attempts and now_is.lease is None else None
            return self._give_up_try(connection, found, failure, now)

        return self._database.transact(work)

    def hand_back(self, job: Job, note: str, *, pause_s: float = 0) -> None:
        """Give a job back as if it had not been begun: nothing was wrong with its slide.

        Args:
            job: Under a lease of ours.
            note: Why, for its history.
            pause_s: For so long nobody takes it again.
        """

        def work(connection: Connection) -> None:
            found = self._held(connection, job, *HELD)
            if found is not None:
                now = self._database.now(connection)
                values = {"attempts": max(0, found.attempts - 1), "not_before": now + pause_s if pause_s else 0.0}
                self._move(connection, found, JobState.WAITING, now, note=note, **values, **_let_go())

        self._database.transact(work)

    def lose(self, job: Job, reason: str, *, error: str = "LostSchedulerError") -> JobState:
        """Record that the process that had a job was killed, with others it had; gives what the job is now.

        It is no try: whatever killed the process, it was probably not this slide. Many times over, it was.

        Args:
            job: Under a lease of ours.
            reason: For its history.
            error: Kind of the failure: a scheduler was lost, or a process that scored several.
        """

        def work(connection: Connection) -> JobState:
            now = self._database.now(connection)
            found = self._held(connection, job, *HELD)
            if found is None:
                return self.find(job.key, connection).state
            losses = found.losses + 1
            after = JobState.QUARANTINED if losses >= self._losses else JobState.WAITING
            values = {"losses": losses, "attempts": max(0, found.attempts - 1), "not_before": 0.0}
            known = {"error": error, "reason": reason}
            self._move(connection, found, after, now, note=reason, **values, **known, **_let_go())
            return after

        return self._database.transact(work)

    def find(self, key: str, connection: Connection | None = None) -> Job:
        """One job as it is now."""

        def work(connection: Connection) -> Job:
            return _as_job(connection.execute(sa.select(JOBS).where(JOBS.c.key == key)).one())

        return work(connection) if connection is not None else self._database.transact(work)

    def held(self) -> list[Job]:
        """Jobs under any scheduler's lease."""
        return self.jobs(JOBS.c.state.in_(HELD))

    def find_abandoned(self, *, holding: Collection[str] = ()) -> list[Job]:
        """Jobs under leases of schedulers that have ended, or have not been heard of for too long.

        Args:
            holding: Leases that this process has in work; others of its own are of a pass that broke off.
        """

        def work(connection: Connection) -> list[Job]:
            now = self._database.now(connection)
            held = connection.execute(sa.select(JOBS).where(JOBS.c.state.in_(HELD))).all()
            return [job for job in map(_as_job, held) if _is_abandoned(job, now, self._me, holding)]

        return self._database.transact(work)

    def take_over(self, job: Job, token: str) -> Job | None:
        """Put an abandoned job under an own lease, as it is; None where another was faster."""

        def work(connection: Connection) -> Job | None:
            now = self._database.now(connection)
            mine = sa.and_(JOBS.c.key == job.key, JOBS.c.lease.in_((job.lease, token)), JOBS.c.state.in_(HELD))
            row = connection.execute(
                sa.update(JOBS).where(mine).values(**self._lease(token, now)).returning(*JOBS.c)
            ).one_or_none()
            return None if row is None else _as_job(row)

        return self._database.transact(work)

    def retry(self, keys: Sequence[str]) -> list[Job]:
        """Let jobs in quarantine, or that wait for another try, be tried at once, with all tries before them."""
        return self._move_all(
            keys, JobState.WAITING, "by hand", attempts=0, losses=0, not_before=0.0, error=None, reason=None
        )

    def quarantine(self, keys: Sequence[str], reason: str) -> list[Job]:
        """Let nobody try these jobs until they are retried; those in work or done are left alone."""
        return self._move_all(keys, JobState.QUARANTINED, "by hand", error="ByHand", reason=reason)

    def jobs(self, *conditions: Any, limit: int | None = None) -> list[Job]:
        """Jobs that fulfil conditions on :data:`JOBS`, by when they were found."""

        def work(connection: Connection) -> list[Job]:
            query = sa.select(JOBS).where(*conditions).order_by(JOBS.c.found_at, JOBS.c.key).limit(limit)
            return [_as_job(row) for row in connection.execute(query)]

        return self._database.transact(work)

    def counts(self, kind: JobKind | None = None) -> dict[JobState, int]:
        """Jobs by state, of one kind or of all."""

        def work(connection: Connection) -> dict[JobState, int]:
            query = sa.select(JOBS.c.state, sa.func.count()).group_by(JOBS.c.state)
            if kind is not None:
                query = query.where(_of_kind(kind))
            found = {JobState(state): count for state, count in connection.execute(query)}
            return {state: found.get(state, 0) for state in JobState}

        return self._database.transact(work)

    def recent_measures(self, kind: JobKind, *, limit: int) -> list[dict[str, Any]]:
        """Measures of the slides of a kind that were published last."""

        def work(connection: Connection) -> list[dict[str, Any]]:
            measured = sa.and_(_of_kind(kind), JOBS.c.state == JobState.PUBLISHED)
            query = sa.select(JOBS.c.measures).where(measured).order_by(JOBS.c.changed_at.desc()).limit(limit)
            return [found for found in connection.execute(query).scalars() if found is not None]

        return self._database.transact(work)

    def next_try_s(self, kind: JobKind) -> float | None:
        """Seconds until the next job can be claimed; None where none waits."""

        def work(connection: Connection) -> float | None:
            now = self._database.now(connection)
            if any(connection.execute(_next_of(kind, state, now)).first() for state in CLAIMABLE):
                return 0.0
            claimable = sa.and_(_of_kind(kind), JOBS.c.state.in_(CLAIMABLE))
            first = connection.execute(sa.select(sa.func.min(JOBS.c.not_before)).where(claimable)).scalar()
            return None if first is None else max(0.0, first - now)

        return self._database.transact(work)

    def history(self, key: str | None = None) -> list[Transition]:
        """Every transition, of one job or of all, oldest first."""

        def work(connection: Connection) -> list[Transition]:
            query = sa.select(HISTORY).order_by(HISTORY.c.id)
            if key is not None:
                query = query.where(HISTORY.c.job == key)
            return [
                Transition(
                    row.job, row.at, row.before and JobState(row.before), JobState(row.after), row.owner, row.note
                )
                for row in connection.execute(query)
            ]

        return self._database.transact(work)

    def chain(self) -> Iterator[Link]:
        """The provenance records, in order; read a thousand at a time."""
        last = 0
        while True:

            def work(connection: Connection, after: int = last) -> list[Link]:
                query = sa.select(PROVENANCE).where(PROVENANCE.c.number > after)
                rows = connection.execute(query.order_by(PROVENANCE.c.number).limit(1000))
                return [Link(row.number, row.previous, row.record, row.hash) for row in rows]

            page = self._database.transact(work)
            if not page:
                return
            yield from page
            last = page[-1].number

    def head(self) -> tuple[int, str]:
        """Number and hash of the last provenance record; 0 and zeros before the first."""

        def work(connection: Connection) -> tuple[int, str]:
            row = connection.execute(sa.select(CHAIN)).one()
            return row.number, row.hash

        return self._database.transact(work)

    def begin_run(self, run: str) -> float:
        """Note that a run has begun; gives when."""

        def work(connection: Connection) -> float:
            now = self._database.now(connection)
            known = connection.execute(sa.select(RUNS.c.started_at).where(RUNS.c.id == run)).scalar()
            if known is None:
                connection.execute(sa.insert(RUNS).values(id=run, started_at=now))
            return known or now

        return self._database.transact(work)

    def end_run(self, run: str, *, exit_code: int, report: dict[str, Any]) -> None:
        """Note that a run has ended, and what it reported."""

        def work(connection: Connection) -> None:
            values = {"ended_at": self._database.now(connection), "exit_code": exit_code, "report": report}
            connection.execute(sa.update(RUNS).where(RUNS.c.id == run).values(**values))

        self._database.transact(work)

    def last_run(self) -> tuple[float, float | None, int | None, str | None] | None:
        """Start, end, exit code and line of the run that began last."""

        def work(connection: Connection) -> tuple[float, float | None, int | None, str | None] | None:
            row = connection.execute(sa.select(RUNS).order_by(RUNS.c.started_at.desc()).limit(1)).one_or_none()
            return (
                None
                if row is None
                else (row.started_at, row.ended_at, row.exit_code, (row.report or {}).get("line"))
            )

        return self._database.transact(work)

    # Inside a transaction ---------------------------------------------------------------------------------------

    def _find_claimable(self, connection: Connection, kind: JobKind, now: float) -> Job | None:
        for state in CLAIMABLE:  # each is one walk along ix_jobs_claim, to the first that is due
            row = connection.execute(_next_of(kind, state, now).with_for_update(skip_locked=True)).one_or_none()
            if row is not None:
                return _as_job(row)
        return None

    def _lease(self, token: str, now: float) -> dict[str, Any]:
        return {"lease": token, "owner": self._me, "leased_at": now, "expires_at": now + self._lease_s}

    def _held(self, connection: Connection, job: Job, *states: JobState) -> Job | None:
        """The job as it is now, if it is still under the same lease and in one of the states."""
        held = sa.and_(JOBS.c.key == job.key, JOBS.c.lease == job.lease, JOBS.c.state.in_(states))
        row = connection.execute(sa.select(JOBS).where(held).with_for_update()).one_or_none()
        return None if row is None else _as_job(row)

    def _give_up_try(self, connection: Connection, job: Job, failure: Failure, now: float) -> JobState:
        over = failure.permanent or job.attempts >= self._tries
        after = JobState.QUARANTINED if over else JobState.RETRY
        pause_s = min(DAY_S, self._backoff_s * 2 ** (job.attempts - 1))
        values = {"error": failure.error, "reason": failure.reason, "not_before": 0.0 if over else now + pause_s}
        self._move(connection, job, after, now, note=f"{failure.error}: {failure.reason}", **_let_go(), **values)
        return after

    def _move_all(self, keys: Sequence[str], after: JobState, note: str, **values: Any) -> list[Job]:
        def work(connection: Connection) -> list[Job]:
            now = self._database.now(connection)
            movable = [state for state in FROM[after] if state not in HELD]
            query = sa.select(JOBS).where(JOBS.c.key.in_(keys), JOBS.c.state.in_(movable)).with_for_update()
            found = [_as_job(row) for row in connection.execute(query)]
            for job in found:
                self._move(connection, job, after, now, note=note, **values)
            return found

        return self._database.transact(work)

    def _move(
        self,
        connection: Connection,
        job: Job,
        after: JobState,
        now: float,
        *,
        note: str | None = None,
        **values: Any,
    ) -> None:
        if job.state not in FROM[after]:
            raise ValueError(f"job {job.key} cannot become {after.value}, it is {job.state.value}")
        connection.execute(
            sa.update(JOBS).where(JOBS.c.key == job.key).values(state=after.value, changed_at=now, **values)
        )
        error = values.get("error") if after in FAILED else None
        self._note(connection, job.key, now, job.state, after, note, error=error)

    def _note(
        self,
        connection: Connection,
        key: str,
        at: float,
        before: JobState | None,
        after: JobState,
        note: str | None,
        *,
        error: str | None = None,
    ) -> None:
        row = {"job": key, "at": at, "before": before and before.value, "after": after.value, "error": error}
        connection.execute(sa.insert(HISTORY).values(**row, owner=self._me, note=note))


def _append(connection: Connection, key: str, record: str) -> None:
    """Append to the chain; its one row of state makes writers wait for each other."""
    head = connection.execute(sa.select(CHAIN).with_for_update()).one()
    new = link(head.number + 1, head.hash, record)
    row = {"number": new.number, "previous": new.previous, "record": record, "hash": new.hash}
    connection.execute(sa.insert(PROVENANCE).values(job=key, **row))
    connection.execute(sa.update(CHAIN).values(number=new.number, hash=new.hash))


def _next_of(kind: JobKind, state: JobState, now: float) -> sa.Select[Any]:
    """The job of a state to be taken next: a poisoned slide holds nobody up."""
    order = (JOBS.c.attempts, JOBS.c.losses, JOBS.c.found_at, JOBS.c.key)
    due = sa.and_(_of_kind(kind), JOBS.c.state == state, _is_due(now))
    return sa.select(JOBS).where(due).order_by(*order).limit(1)


def _of_kind(kind: JobKind) -> Any:
    return sa.and_(JOBS.c.model == kind.model, JOBS.c.settings == kind.settings)


def _is_due(now: float) -> Any:
    """A pause that began in the future is of before the clock was set back, and over."""
    return sa.or_(JOBS.c.not_before <= now, JOBS.c.changed_at > now)


def _let_go(*, keep_token: bool = False) -> dict[str, Any]:
    kept = {} if keep_token else {"lease": None}
    return {**kept, "owner": None, "leased_at": None, "expires_at": None}


def _as_job(row: Any) -> Job:
    return Job(**{**row._mapping, "state": JobState(row.state)})


def _is_abandoned(job: Job, now: float, me: str, holding: Collection[str]) -> bool:
    """Whether nobody works on a job under a lease.

    A process of this machine can be looked for. Of others it is known only when they were heard of last; a lease
    that begins in the future is of before the clock was set back, and says nothing.
    """
    assert job.leased_at is not None
    assert job.expires_at is not None
    if job.owner == me:
        return job.lease not in holding
    owner = json.loads(job.owner or "{}")
    if owner.get("machine") == name_machine():
        return has_ended(owner) or job.expires_at < now
    return job.expires_at < now or job.leased_at > now + (job.expires_at - job.leased_at)
