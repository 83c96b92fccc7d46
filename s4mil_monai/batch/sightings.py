"""Sightings: what slide files looked like when they were looked at last, and since when."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from s4mil_monai.batch.database import Database
from s4mil_monai.batch.ledger import DAY_S
from s4mil_monai.batch.schema import JOBS, SIGHTINGS, SOURCES

AT_ONCE = 500
"""Values in one statement."""


@dataclass(frozen=True)
class Sighting:
    """One slide as it is now."""

    unchanged_s: float
    """Seconds for which it is known to have looked the same."""
    slide: str | None
    """Its fingerprint, if it has been read through in this state."""
    pause_s: float = 0
    """Seconds until it may be read through again, where that has failed."""


class Sightings:
    """Kept in the ledger, so that a file is read through once and not every ten minutes."""

    def __init__(self, database: Database):
        self._database = database

    def note(self, snapshots: Mapping[str, str]) -> dict[str, Sighting]:
        """Compare slides with how they were seen last, and remember how they are now.

        Args:
            snapshots: By path; see :func:`take_snapshot`.
        """

        def work(connection: Connection) -> dict[str, Sighting]:
            now = self._database.now(connection)
            known = {row.path: row for row in _find_in(connection, SIGHTINGS.c.path, list(snapshots), SIGHTINGS)}
            changed = [
                {"path": path, "snapshot": snapshot, "since": now, "slide": None}
                for path, snapshot in snapshots.items()
                # a time in the future is of before the clock was set back
                if path not in known or known[path].snapshot != snapshot or known[path].since > now
            ]
            _replace(connection, [row for row in changed if row["path"] in known], changed)
            fresh = {str(row["path"]) for row in changed}
            return {
                path: Sighting(0, None) if path in fresh else _describe(known[path], now) for path in snapshots
            }

        return self._database.transact(work)

    def keep(self, path: str, snapshot: str, slide: str) -> None:
        """Remember the fingerprint of a slide in the state in which it was read."""
        same = sa.and_(SIGHTINGS.c.path == path, SIGHTINGS.c.snapshot == snapshot)
        self._database.transact(
            lambda connection: connection.execute(sa.update(SIGHTINGS).where(same).values(slide=slide))
        )

    def fail(self, path: str, snapshot: str, *, tries: int, backoff_s: float) -> None:
        """Remember that a slide could not be read through, and let it rest: after each failure for twice as long,
        after so many tries for a day."""

        def work(connection: Connection) -> None:
            same = sa.and_(SIGHTINGS.c.path == path, SIGHTINGS.c.snapshot == snapshot)
            failures = (connection.execute(sa.select(SIGHTINGS.c.failures).where(same)).scalar() or 0) + 1
            pause_s = DAY_S if failures >= tries else min(DAY_S, backoff_s * 2 ** (failures - 1))
            values = {"failures": failures, "not_before": self._database.now(connection) + pause_s}
            connection.execute(sa.update(SIGHTINGS).where(same).values(**values))

        self._database.transact(work)

    def slides_with_jobs(self, slides: Collection[str], model: str, settings: str) -> set[str]:
        """Those of some fingerprints that have a job of a kind, whatever has become of it."""
        of_kind = sa.and_(JOBS.c.model == model, JOBS.c.settings == settings)
        return self._database.transact(
            lambda connection: {
                row.slide for row in _find_in(connection, JOBS.c.slide, list(slides), JOBS.c.slide, of_kind)
            }
        )

    def note_device(self, source: str, device: str) -> None:
        """Remember on which device a source lies in which there are slides."""

        def work(connection: Connection) -> None:
            known = connection.execute(sa.select(SOURCES.c.device).where(SOURCES.c.path == source)).scalar()
            if known is None:
                row = {"path": source, "device": device}
                connection.execute(_insert(connection)(SOURCES).on_conflict_do_nothing(), row)
            elif known != device:
                connection.execute(sa.update(SOURCES).where(SOURCES.c.path == source).values(device=device))

        self._database.transact(work)

    def device_of(self, source: str) -> str | None:
        """On which device a source lay when there were slides in it last; None where there never were."""
        query = sa.select(SOURCES.c.device).where(SOURCES.c.path == source)
        return self._database.transact(lambda connection: connection.execute(query).scalar())

    def places(self, slide: str) -> dict[str, str]:
        """Where a slide has been seen, and what its files looked like when they were read through."""
        seen = sa.select(SIGHTINGS.c.path, SIGHTINGS.c.snapshot).where(SIGHTINGS.c.slide == slide)
        return self._database.transact(
            lambda connection: {row.path: row.snapshot for row in connection.execute(seen)}
        )


def _describe(row: Any, now: float) -> Sighting:
    pause_s = row.not_before - now if row.failures else 0
    # a longer one than there is began before the clock was set back
    return Sighting(now - row.since, row.slide, pause_s if 0 < pause_s <= DAY_S else 0)


def _find_in(
    connection: Connection, column: sa.Column[str], values: Sequence[str], wanted: Any, *conditions: Any
) -> Iterator[Any]:
    """Rows whose column has one of some values: a ledger holds the slides of all years, a look those of today."""
    for start in range(0, len(values), AT_ONCE):
        query = sa.select(wanted).where(column.in_(values[start : start + AT_ONCE]), *conditions)
        yield from connection.execute(query)


def _replace(connection: Connection, old: list[dict], new: list[dict]) -> None:
    for start in range(0, len(old), AT_ONCE):
        paths = [row["path"] for row in old[start : start + AT_ONCE]]
        connection.execute(sa.delete(SIGHTINGS).where(SIGHTINGS.c.path.in_(paths)))
    for start in range(0, len(new), AT_ONCE):
        # another scheduler may note the same file at the same moment: either is right
        statement = _insert(connection)(SIGHTINGS).on_conflict_do_nothing()
        connection.execute(statement, new[start : start + AT_ONCE])


def _insert(connection: Connection):
    from sqlalchemy.dialects import postgresql, sqlite

    return sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
