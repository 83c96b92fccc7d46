"""A ledger of many years answers as one of a day: what is asked often walks an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event

from s4mil_monai.batch.database import Database
from s4mil_monai.batch.ledger import Failure, Job, JobKind, Ledger
from s4mil_monai.batch.schema import METADATA
from s4mil_monai.batch.sightings import AT_ONCE, Sightings

KIND = JobKind("model", "settings")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    database = Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}", clock=lambda: 1000.0)
    return Ledger(database, lease_s=60, tries=3, losses=5, backoff_s=0)


def add(ledger: Ledger, *names: str, kind: JobKind = KIND) -> None:
    for name in names:
        ledger.add(f"{name}-{kind.model}", name, kind, path=f"/share/{name}", name=name)


def claim(ledger: Ledger, token: str = "token") -> Job:
    job = ledger.claim(KIND, token)
    assert job is not None
    return job


def plans(database: Database, work: Any) -> list[str]:
    """How SQLite goes about every statement of a piece of work."""
    said: list[tuple[str, Any]] = []

    def listen(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "UPDATE")):
            said.append((statement, parameters))

    engine = database._engine
    event.listen(engine, "before_cursor_execute", listen)
    work()
    event.remove(engine, "before_cursor_execute", listen)
    assert said
    with engine.connect() as connection:
        return [
            row.detail
            for statement, parameters in said
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]


def test_the_migrated_tables_are_those_of_the_schema(ledger: Ledger):
    with ledger.database._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_what_a_scheduler_asks_walks_indices_and_sorts_nothing(ledger: Ledger):
    add(ledger, "a", "b", "c")
    held = claim(ledger, "held")
    asked = {
        "claim": lambda: ledger.claim(KIND, "another"),
        "next_try_s": lambda: ledger.next_try_s(KIND),
        "renew": lambda: ledger.renew(["held", "another"]),
        "fail": lambda: ledger.fail(held, Failure("E", "reason")),
        "find_abandoned": lambda: ledger.find_abandoned(),
        "recent_measures": lambda: ledger.recent_measures(KIND, limit=1),
        "counts": lambda: ledger.counts(),
        "places": lambda: Sightings(ledger.database).places("a"),
    }
    for name, work in asked.items():
        for plan in plans(ledger.database, work):
            assert "TEMP B-TREE" not in plan, (name, plan)
            assert not plan.startswith("SCAN") or "COVERING INDEX" in plan, (name, plan)


def test_a_slide_that_failed_waits_behind_those_not_tried(ledger: Ledger):
    add(ledger, "poison", "fine")
    first = claim(ledger, "one")
    ledger.fail(first, Failure("E", "reason"))
    second = claim(ledger, "two")
    assert {first.slide, second.slide} == {"poison", "fine"}
    assert claim(ledger, "three").key == first.key  # the only one left


def test_a_slide_that_lost_its_scheduler_waits_behind_those_that_did_not(ledger: Ledger):
    add(ledger, "a", "b")
    killer = claim(ledger, "one")
    ledger.lose(killer, "the scheduler was killed")
    assert claim(ledger, "two").key != killer.key


def test_the_next_try_is_now_where_a_slide_waits_and_later_where_one_was_handed_back(ledger: Ledger):
    assert ledger.next_try_s(KIND) is None
    add(ledger, "a", kind=JobKind("another", "settings"))
    assert ledger.next_try_s(KIND) is None
    add(ledger, "a")
    assert ledger.next_try_s(KIND) == 0
    ledger.hand_back(claim(ledger), "the share is gone", pause_s=30)
    assert ledger.next_try_s(KIND) == 30


def test_slides_are_looked_up_in_pieces(ledger: Ledger):
    names = [f"slide{number}" for number in range(AT_ONCE + 1)]
    add(ledger, names[0], names[-1])
    sightings = Sightings(ledger.database)
    assert sightings.slides_with_jobs(names, KIND.model, KIND.settings) == {names[0], names[-1]}
    assert sightings.slides_with_jobs([], KIND.model, KIND.settings) == set()
    sightings.note(dict.fromkeys(names, "1 MB"))
    sightings.keep(names[-1], "1 MB", "fingerprint")
    seen = sightings.note(dict.fromkeys(names[1:], "1 MB"))
    assert len(seen) == AT_ONCE
    assert seen[names[-1]].slide == "fingerprint"
