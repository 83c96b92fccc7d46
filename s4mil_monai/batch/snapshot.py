"""take_batch_snapshot(): the numbers of a ledger at one moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy import Connection

from s4mil_monai.batch.ledger import JobKind, Ledger
from s4mil_monai.batch.prometheus import BatchSnapshot, StageSeconds
from s4mil_monai.batch.schema import HISTORY, JOBS
from s4mil_monai.batch.states import CLAIMABLE, JobState
from s4mil_monai.statistics.drift import DriftFinding

STAGES = (
    *("opening", "tissue", "quality", "fingerprint", "reading", "preparing"),
    *("encoding", "aggregation", "total"),
)
"""Of :class:`SlideResult`'s seconds."""
QUANTILES = (0.5, 0.9, 0.99)
RECENT = 500
"""Slides of which the quantiles are taken."""

_PUBLISHED = JOBS.c.state == JobState.PUBLISHED


def take_batch_snapshot(ledger: Ledger, kind: JobKind, drift: Sequence[DriftFinding] = ()) -> BatchSnapshot:
    """Count jobs, results and failures, and sum up seconds.

    Args:
        ledger: Of the site.
        kind: Of the site's jobs now. Those of earlier models nobody scores any more, and they are counted apart.
        drift: As :func:`compare_recent` found it.
    """
    jobs = ledger.counts(kind)
    earlier = count_earlier(ledger, kind)
    last = ledger.last_run() or (None, None, None, None)

    def work(connection: Connection) -> BatchSnapshot:
        published = _count_published(connection)
        return BatchSnapshot(
            jobs={state.value: count for state, count in jobs.items()},
            earlier_jobs={state.value: count for state, count in earlier.items()},
            scored=sum(count for (status, _), count in published.items() if status in ("scored", "degraded")),
            published=_by_decision(published),
            failures=_count_failures(connection),
            stages=_sum_stages(connection),
            oldest_waiting_s=_find_oldest(connection, kind, ledger.database.now(connection)),
            run_started=last[0],
            run_ended=last[1],
            run_exit=last[2],
            drift=tuple(drift),
        )

    return ledger.database.transact(work)


def count_earlier(ledger: Ledger, kind: JobKind) -> dict[JobState, int]:
    """Jobs of other models or settings than the present ones, by state."""

    def work(connection: Connection) -> dict[JobState, int]:
        earlier = sa.or_(JOBS.c.model != kind.model, JOBS.c.settings != kind.settings)
        query = sa.select(JOBS.c.state, sa.func.count()).where(earlier).group_by(JOBS.c.state)
        found = {JobState(state): count for state, count in connection.execute(query)}
        return {state: found.get(state, 0) for state in JobState}

    return ledger.database.transact(work)


def _count_published(connection: Connection) -> dict[tuple[str, str], int]:
    """Results by status and decision."""
    status, decision = (JOBS.c.summary[name].as_string().label(name) for name in ("status", "decision"))
    query = sa.select(status, decision, sa.func.count()).where(_PUBLISHED)
    rows = connection.execute(query.group_by(sa.text("status"), sa.text("decision")))
    return {(status, decision or "none"): count for status, decision, count in rows}


def _by_decision(published: dict[tuple[str, str], int]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (_, decision), count in published.items():
        found[decision] += count
    return dict(found)


def _count_failures(connection: Connection) -> dict[str, int]:
    query = sa.select(HISTORY.c.error, sa.func.count()).where(HISTORY.c.error.is_not(None))
    return {row.error: row[1] for row in connection.execute(query.group_by(HISTORY.c.error))}


def _find_oldest(connection: Connection, kind: JobKind, now: float) -> float | None:
    claimable = (JOBS.c.model == kind.model, JOBS.c.settings == kind.settings, JOBS.c.state.in_(CLAIMABLE))
    found = connection.execute(sa.select(sa.func.min(JOBS.c.found_at)).where(*claimable)).scalar()
    return None if found is None else max(0.0, now - found)


def _sum_stages(connection: Connection) -> dict[str, StageSeconds]:
    """Seconds of each stage: summed up over all slides, quantiles of those published last."""
    recent = sa.select(JOBS.c.summary).where(_PUBLISHED).order_by(JOBS.c.changed_at.desc()).limit(RECENT)
    seconds = [summary["seconds"] for summary in connection.execute(recent).scalars()]
    columns = [JOBS.c.summary[("seconds", stage)].as_float() for stage in STAGES]
    sums: Any = [part for column in columns for part in (sa.func.count(column), sa.func.sum(column))]
    row = connection.execute(sa.select(*sums).where(_PUBLISHED)).one()
    found = {}
    for number, stage in enumerate(STAGES):
        count, total = row[2 * number], row[2 * number + 1]
        values = [known[stage] for known in seconds if stage in known]
        if count and values:
            quantiles = dict(zip(QUANTILES, np.quantile(values, QUANTILES).tolist(), strict=True))
            found[stage] = StageSeconds(count, float(total), quantiles)
    return found
