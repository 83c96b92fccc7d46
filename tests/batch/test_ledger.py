"""The ledger: one contract, on SQLite and on PostgreSQL."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from s4mil_monai.batch.database import Database
from s4mil_monai.batch.ledger import Failure, Job, JobKind, Ledger
from s4mil_monai.batch.provenance import check_chain
from s4mil_monai.batch.schema import METADATA
from s4mil_monai.batch.sightings import Sightings
from s4mil_monai.batch.states import FROM, JobState
from s4mil_monai.errors import LedgerError

KIND = JobKind("m" * 64, "s" * 64, "tiny-1.0")
BROKEN = Failure("UnreadableSlideError", "it is damaged")
ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that is empty."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    return request.getfixturevalue("postgres").make_database()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_it(url: str, clock: Clock) -> Iterator[Callable[..., Ledger]]:
    """Opens the ledger, as often as one likes; ``of`` another machine or process than this one."""
    opened: list[Ledger] = []

    def open_ledger(of: str | None = None, *, tries: int = 2, losses: int = 2) -> Ledger:
        database = Database(url, clock=clock, patience_s=5)
        opened.append(Ledger(database, lease_s=60, tries=tries, losses=losses, backoff_s=100))
        if of is not None:
            opened[-1]._me = json.dumps({"machine": of, "pid": 1, "started": "1"})
        return opened[-1]

    yield open_ledger
    for ledger in opened:
        ledger.database.close()


@pytest.fixture
def ledger(open_it: Callable[..., Ledger]) -> Ledger:
    return open_it()


def add(ledger: Ledger, *names: str) -> None:
    for name in names:
        assert ledger.add(name * 64, name * 64, KIND, path=f"/share/{name}.svs", name=f"{name}.svs")


def claim(ledger: Ledger, token: str = "t1") -> Job:
    job = ledger.claim(KIND, token)
    assert job is not None
    return job


def publish(ledger: Ledger, job: Job) -> bool:
    record = json.dumps({"job": job.key, "outputs": {}})
    return ledger.begin_publishing(job, folder="results/a", sums="0" * 64) and ledger.publish(
        job, summary={}, measures={"tissue_mm2": 1.0}, record=record
    )


def test_a_slide_goes_from_waiting_over_running_and_publishing_to_published(ledger):
    add(ledger, "a")
    job = claim(ledger)
    assert (job.state, job.attempts) == (JobState.RUNNING, 1)
    assert publish(ledger, job)
    steps = [(step.before, step.after) for step in ledger.history("a" * 64)]
    states = [JobState.WAITING, JobState.RUNNING, JobState.PUBLISHING, JobState.PUBLISHED]
    assert steps == list(zip([None, *states], states, strict=False))
    assert list(check_chain(ledger.chain(), head=ledger.head())) == []
    assert ledger.recent_measures(KIND, limit=5) == [{"tissue_mm2": 1.0}]


def test_what_was_done_is_done_once_when_the_answer_was_lost_and_it_is_done_again(ledger):
    add(ledger, "a")
    assert not ledger.add("a" * 64, "a" * 64, KIND, path="/share/a.svs", name="a.svs")
    job = claim(ledger)
    assert claim(ledger) == job  # the same token
    assert publish(ledger, job)
    assert publish(ledger, job) is False  # begin_publishing: no longer held
    assert ledger.publish(job, summary={}, measures=None, record="{}")
    assert len(list(ledger.chain())) == 1
    assert [step.after for step in ledger.history()].count(JobState.PUBLISHED) == 1


def test_a_published_slide_is_never_claimed_again_nor_moved_by_hand(ledger):
    add(ledger, "a")
    publish(ledger, claim(ledger))
    assert ledger.claim(KIND, "t2") is None
    assert ledger.retry(["a" * 64]) == []
    assert ledger.quarantine(["a" * 64], "why not") == []
    assert [state for state, befores in FROM.items() if JobState.PUBLISHED in befores] == []


@pytest.mark.parametrize(
    "name", [b"M\xfcller.svs", b"back\\slash.svs", b"\\xfc.svs", b"\xe2\x80\xae.svs", b"\xff\\"]
)
def test_a_name_that_is_no_utf_8_comes_back_as_it_was(ledger, name):
    path = os.fsdecode(b"/share/" + name)
    assert ledger.add("a" * 64, "a" * 64, KIND, path=path, name=os.fsdecode(name))
    job = claim(ledger)
    assert (job.path, os.fsencode(job.name)) == (path, name)
    sightings = Sightings(ledger.database)
    assert sightings.note({path: f"{job.name} 1 2"})[path].unchanged_s == 0
    sightings.keep(path, f"{job.name} 1 2", "a" * 64)
    assert sightings.note({path: f"{job.name} 1 2"})[path].slide == "a" * 64
    assert sightings.places("a" * 64) == {path: f"{job.name} 1 2"}


def test_what_a_library_says_can_be_kept_whatever_is_in_it(ledger):
    add(ledger, "a")
    job = claim(ledger)
    ledger.fail(job, Failure("TiffError", "page \x00 of M\udcfcller"))
    assert ledger.find(job.key).reason == "page \ufffd of M\ufffdller"


def test_a_slide_of_another_model_is_another_job(ledger):
    add(ledger, "a")
    assert ledger.claim(JobKind("n" * 64, "s" * 64), "t1") is None
    assert ledger.next_try_s(JobKind("n" * 64, "s" * 64)) is None


def test_tries_are_further_and_further_apart_and_end_in_quarantine(ledger, clock):
    add(ledger, "a")
    assert ledger.fail(claim(ledger, "t1"), BROKEN) is JobState.RETRY
    assert ledger.next_try_s(KIND) == 100
    assert ledger.claim(KIND, "t2") is None
    clock.now += 100
    assert ledger.fail(claim(ledger, "t2"), BROKEN) is JobState.QUARANTINED
    clock.now += 1e6
    assert ledger.claim(KIND, "t3") is None
    assert [job.state for job in ledger.retry(["a" * 64])] == [JobState.QUARANTINED]
    assert claim(ledger, "t3").attempts == 1


def test_what_no_try_can_help_is_in_quarantine_at_once(ledger):
    add(ledger, "a")
    failure = Failure("UnknownResolutionError", "no mpp", permanent=True)
    assert ledger.fail(claim(ledger), failure) is JobState.QUARANTINED


def test_a_slide_handed_back_has_lost_no_try(ledger, clock):
    add(ledger, "a")
    ledger.hand_back(claim(ledger, "t1"), "the share is away", pause_s=60)
    assert ledger.claim(KIND, "t2") is None
    clock.now += 61
    assert claim(ledger, "t2").attempts == 1


def test_a_pause_ends_when_the_clock_is_set_back_to_before_it_began(ledger, clock):
    add(ledger, "a")
    ledger.fail(claim(ledger, "t1"), BROKEN)
    clock.now -= 3600
    assert ledger.next_try_s(KIND) == 0
    assert claim(ledger, "t2").attempts == 2


def test_a_lease_ends_when_its_machine_is_not_heard_of_and_holds_while_it_is(open_it, clock):
    theirs, ours = open_it("elsewhere"), open_it()
    add(theirs, "a")
    job = claim(theirs)
    clock.now += 50
    assert theirs.renew(["t1"]) == {"t1"}
    clock.now += 50
    assert ours.find_abandoned() == []
    clock.now += 11
    [found] = ours.find_abandoned()
    mine = ours.take_over(found, "t2")
    assert mine is not None
    assert theirs.renew(["t1"]) == set()
    assert not publish(theirs, job)  # it comes back, too late
    assert publish(ours, dataclasses.replace(mine))


def test_a_lease_from_the_future_is_of_before_the_clock_was_set_back(open_it, clock):
    theirs, ours = open_it("elsewhere"), open_it()
    add(theirs, "a")
    claim(theirs)
    clock.now -= 3600
    assert [job.key for job in ours.find_abandoned()] == ["a" * 64]


def test_two_take_an_abandoned_slide_over_and_one_has_it(open_it, clock):
    theirs, one, other = open_it("elsewhere"), open_it(), open_it()
    add(theirs, "a")
    claim(theirs)
    clock.now += 61
    [found] = one.find_abandoned()
    assert one.take_over(found, "t2") is not None
    assert other.take_over(found, "t3") is None


def test_a_slide_in_work_when_its_scheduler_is_killed_again_and_again_ends_in_quarantine(ledger):
    add(ledger, "a")
    assert ledger.lose(claim(ledger, "t1"), "killed") is JobState.WAITING
    assert ledger.lose(claim(ledger, "t2"), "killed") is JobState.QUARANTINED
    job = ledger.find("a" * 64)
    assert (job.error, job.reason, job.attempts) == ("LostSchedulerError", "killed", 1 - 1)


def test_a_slide_tried_again_by_hand_has_all_its_losses_before_it(ledger):
    add(ledger, "a")
    assert [ledger.lose(claim(ledger, token), "killed") for token in "tu"][-1] is JobState.QUARANTINED
    ledger.retry(["a" * 64])
    assert ledger.lose(claim(ledger, "v"), "killed") is JobState.WAITING


def test_slides_that_brought_nothing_down_come_first(ledger, clock):
    add(ledger, "a")
    clock.now += 1
    add(ledger, "b")
    ledger.lose(claim(ledger, "t1"), "killed")
    assert claim(ledger, "t2").name == "b.svs"


def claim_all(url: str, prefix: str) -> int:
    """In a process of its own: claim until there is nothing left, and print what was claimed."""
    ledger = Ledger(Database(url), lease_s=60, tries=3, losses=3, backoff_s=0)
    number = 0
    while (job := ledger.claim(KIND, f"{prefix}-{number}")) is not None:
        sys.stdout.write(f"{job.key}\n")
        number += 1
    return 0


def test_four_processes_claim_every_slide_once(ledger, url, fork_server, tmp_path):
    names = [f"{number:064}" for number in range(80)]
    for name in names:
        ledger.add(name, name, KIND, path=name, name=name)
    claimers = [
        fork_server.fork(
            "tests.batch.test_ledger:claim_all", tmp_path / f"log{number}", url=url, prefix=f"p{number}"
        )
        for number in range(4)
    ]
    assert [claimer.wait() for claimer in claimers] == [0, 0, 0, 0]
    claimed = [line for claimer in claimers for line in claimer.said.split()]
    assert sorted(claimed) == names


def test_tables_are_as_the_code_has_them(ledger):
    with ledger.database._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_a_ledger_of_a_later_version_is_refused_and_stays_as_it_is(ledger, url):
    with ledger.database._engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(LedgerError, match="is of version 9999, newer than this software knows; update"):
        Database(url)
    with ledger.database._engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == "9999"


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"patients.xlsx" * 1000)
    with pytest.raises(LedgerError, match="file is not a database"):
        Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
