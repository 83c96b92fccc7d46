"""Whatever happens: every slide exactly once, nothing lost, nothing half-written. All faults are made for real."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest

from s4mil_monai.batch.site import read_checked_site
from s4mil_monai.batch.slide_worker import SlideWorker
from s4mil_monai.batch.states import JobState
from s4mil_monai.batch.work import Failed, Work
from tests.batch.audit import check_integrity
from tests.batch.broken_machine import (
    MEMORY_GROUPS,
    call,
    can_mount,
    disk_in_a_file,
    forget_pages,
    memory_group,
    small_disk,
    wait_until,
)
from tests.batch.fork_server import Forked
from tests.batch.kill_point import KillPoint
from tests.batch.light_site import LightSite
from tests.batch.light_worker import MEMORY_GROUP, ONLY_ONCE
from tests.batch.storm import Storm

PUBLISHED, WAITING, QUARANTINED = JobState.PUBLISHED, JobState.WAITING, JobState.QUARANTINED


@pytest.fixture
def mounting(tmp_path: Path) -> None:
    """For tests that mount file systems."""
    if not can_mount(tmp_path / "probe"):
        pytest.skip("file systems cannot be mounted here")


# Killed ------------------------------------------------------------------------------------------------------


def test_after_fifty_kills_every_slide_is_published_once_and_whole(light_site):
    light_site.configure(losses=1000)
    storm = Storm(light_site, random.Random(20261125))
    storm.rage(50)
    found = storm.finish()
    assert found.problems == []
    assert found.published == len(list(light_site.share.iterdir()))
    assert len(storm.by_code) > 5


def test_the_whole_command_killed_and_told_to_stop_scores_its_slides_in_the_end(site):
    slides = [site.scan(name, seed=seed) for seed, name in enumerate(("a.tif", "b.tif"))]
    killed = site.start("run")
    wait_until(lambda: bool(list(site.out.glob(".work/*"))))
    killed.kill()
    killed.communicate()
    told = site.start("run")
    wait_until(lambda: any(job.owner and f'"pid": {told.pid},' in job.owner for job in site.ledger().held()))
    told.terminate()
    assert "Traceback" not in told.communicate()[1]
    assert told.returncode == 0
    waiting = [job for job in site.jobs().values() if job.state is not PUBLISHED]
    assert {(job.state, job.attempts) for job in waiting} <= {(WAITING, 0)}
    last = site.call("run")
    assert last.returncode == 0, last.stderr
    assert set(site.states().values()) == {PUBLISHED}
    assert len(list(site.out.glob("results/*/*/result.json"))) == len(slides)
    assert check_integrity(site.out / "ledger.sqlite") == "ok"
    assert list(site.out.glob(".work/*")) == []


def test_a_slide_in_work_whenever_a_scheduler_is_killed_ends_in_quarantine(light_site):
    light_site.configure(losses=2)
    light_site.scan_light("bad.tif", says=b"stop")
    for _ in range(2):
        scheduler = light_site.begin()
        light_site.wait_for_work(scheduler)
        scheduler.kill()
        scheduler.wait()
    assert light_site.run()[0] == 1
    job = light_site.jobs()["bad.tif"]
    assert (job.state, job.error) == (QUARANTINED, "LostSchedulerError")
    assert job.reason == "the scheduler was killed while it had the slide"


@pytest.mark.parametrize("place", ["publish.py:_rename", "publish.py:_record_it"])
def test_a_result_that_was_written_when_the_scheduler_was_killed_is_not_made_again(light_site, place):
    light_site.scan_light("a.tif")
    point = KillPoint("publishing", place, call=1, line=0)
    assert (
        light_site.run(kill=point.as_dict(), tombstone=str(light_site.folder / "tombstone"))[0] == -signal.SIGKILL
    )
    assert light_site.count(JobState.PUBLISHING) == 1
    assert light_site.audit().problems == []
    assert [step.after for step in light_site.ledger().history()].count(JobState.RUNNING) == 1


def test_a_result_whose_scheduler_was_killed_waits_for_a_disk_that_is_read_only(light_site, mounting):
    light_site.configure(ledger=f"sqlite:///{light_site.folder / 'ledger.sqlite'}")
    light_site.scan_light("a.tif")
    point = KillPoint("publishing", "publish.py:_rename", call=1, line=0)
    with small_disk(light_site.out, "16m"):
        light_site.run(kill=point.as_dict(), tombstone=str(light_site.folder / "tombstone"))
        call("mount", "-o", "remount,ro", light_site.out)
        code, said = light_site.run()
        assert code == 1
        assert "Read-only file system" in said
        call("mount", "-o", "remount,rw", light_site.out)
        assert light_site.audit().problems == []


def test_processes_that_score_end_with_their_scheduler(light_site):
    light_site.scan_some(3, says=b"slow")
    scheduler = light_site.begin()
    light_site.wait_for_work(scheduler)
    scheduler.kill(group=False)
    scheduler.wait()
    wait_until(lambda: not _is_there(scheduler.pid))
    assert light_site.run()[0] == 0


def test_a_slide_that_was_removed_or_replaced_is_set_aside_after_some_tries(light_site):
    light_site.configure(tries=2, losses=1000)
    light_site.scan_some(4, says=b"slow")
    scheduler = light_site.begin()
    wait_until(lambda: (light_site.count(JobState.RUNNING), light_site.count(JobState.WAITING)) == (3, 1))
    scheduler.kill()
    scheduler.wait()
    (light_site.share / "0003.tif").unlink()
    code, said = light_site.run()
    assert code == 1
    assert "0003.tif" not in said
    gone = light_site.jobs()["0003.tif"]
    assert (gone.state, gone.error, gone.attempts) == (QUARANTINED, "MissingSlideError", 2)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# Told to stop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_within_s", [0, 30])
def test_told_to_stop_it_finishes_or_hands_back_what_is_in_work(light_site, stop_within_s):
    light_site.configure(stop_within_s=stop_within_s)
    light_site.scan_some(5, says=b"slow")
    scheduler = light_site.begin()
    light_site.wait_for_work(scheduler)
    scheduler.kill(signal.SIGTERM, group=False)
    assert scheduler.wait() == 0
    states = light_site.jobs().values()
    assert {(job.state, job.attempts) for job in states} <= {(WAITING, 0), (PUBLISHED, 1)}
    assert light_site.count(PUBLISHED if stop_within_s else WAITING) > 0
    assert light_site.audit().problems == []


# Several at once ---------------------------------------------------------------------------------------------


def test_two_schedulers_at_once_publish_each_slide_once(light_site):
    light_site.scan_some(20)
    both = [light_site.begin(log=name) for name in ("one", "other")]
    assert [scheduler.wait() for scheduler in both] == [0, 0], both[0].said + both[1].said
    assert light_site.audit().problems == []
    owners = {step.owner for step in light_site.ledger().history() if step.after is PUBLISHED}
    assert len(owners) <= 2


def test_a_scheduler_that_was_asleep_for_longer_than_its_lease_publishes_nothing_twice(light_site):
    light_site.configure(lease_s=0.5)
    light_site.scan_some(4, says=b"slow")
    asleep = light_site.begin(log="asleep")
    light_site.wait_for_work(asleep)
    _put_to_sleep(asleep, light_site)
    held = light_site.ledger().held()
    wait_until(lambda: len(light_site.ledger().find_abandoned()) == len(held))
    assert light_site.run()[0] == 0
    asleep.kill(signal.SIGCONT)
    asleep.wait()
    assert light_site.count(PUBLISHED) == 4
    assert light_site.audit().problems == []


def _put_to_sleep(scheduler: Forked, site: LightSite) -> None:
    """Stop its processes, but not in the middle of a transaction: others would wait for that."""
    while True:
        scheduler.kill(signal.SIGSTOP)
        ledger = sqlite3.connect(site.out / "ledger.sqlite", timeout=0.2)
        with closing(ledger), suppress(sqlite3.OperationalError):
            ledger.execute("BEGIN IMMEDIATE")
            return
        scheduler.kill(signal.SIGCONT)


# Disks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ledger_on_it", [False, True])
def test_a_full_disk_ends_the_pass_and_blames_no_slide(light_site, mounting, ledger_on_it):
    elsewhere = {} if ledger_on_it else {"ledger": f"sqlite:///{light_site.folder / 'ledger.sqlite'}"}
    light_site.configure(**elsewhere)
    light_site.scan_some(24)  # 62 kB each of results
    with small_disk(light_site.out, "1m"):
        for _ in range(3):
            code, said = light_site.run()
            assert code == 1
            assert "No space left on device" in said or "database or disk is full" in said
        call("mount", "-o", "remount,size=16m", light_site.out)
        assert light_site.run()[0] == 0
        assert light_site.audit().problems == []
    assert not elsewhere or light_site.tries() == {1}


@pytest.mark.parametrize("ledger_on_it", [False, True])
def test_a_disk_that_is_read_only_ends_the_pass_and_blames_no_slide(light_site, mounting, ledger_on_it):
    elsewhere = {} if ledger_on_it else {"ledger": f"sqlite:///{light_site.folder / 'ledger.sqlite'}"}
    light_site.configure(**elsewhere)
    light_site.scan_some(3)
    with small_disk(light_site.out, "16m"):
        call("mount", "-o", "remount,ro", light_site.out)
        code, said = light_site.run()
        assert code == 1
        assert "unable to open database file" in said if ledger_on_it else "Read-only file system" in said
        call("mount", "-o", "remount,rw", light_site.out)
        assert light_site.run()[0] == 0
        assert light_site.audit().problems == []
        assert light_site.tries() == {1}


# The ledger --------------------------------------------------------------------------------------------------


@pytest.fixture
def hold_ledger(light_site):
    """Hold the ledger in this process, so that no other can use it, for so long or for good."""
    connections = []

    def hold(seconds: float | None = None) -> None:
        connection = sqlite3.connect(
            light_site.out / "ledger.sqlite", check_same_thread=False, isolation_level=None
        )
        connection.execute("BEGIN EXCLUSIVE")
        connections.append(connection)
        if seconds is not None:
            threading.Timer(seconds, connection.close).start()

    yield hold
    for connection in connections:
        connection.close()


def test_a_ledger_that_is_locked_for_a_while_is_waited_for(light_site, hold_ledger):
    light_site.scan_some(6)
    scheduler = light_site.begin()
    light_site.wait_for_work(scheduler)
    hold_ledger(1.0)
    assert scheduler.wait() == 0
    assert light_site.audit().problems == []


def test_a_ledger_that_stays_locked_ends_the_pass_with_one_line(light_site, hold_ledger):
    light_site.configure(ledger_patience_s=0.3)
    light_site.scan_some(6)
    scheduler = light_site.begin()
    light_site.wait_for_work(scheduler)
    hold_ledger()
    assert scheduler.wait() == 1
    code, said = light_site.run()
    last = said.splitlines()[-1]
    assert (code, last.endswith("database is locked; is the database running, and nobody else holding it?")) == (
        1,
        True,
    )


def test_what_a_pass_had_that_lost_its_ledger_is_scored_by_the_next(light_site, hold_ledger):
    light_site.configure(ledger_patience_s=0.3)
    light_site.scan_some(6)
    scheduler = light_site.begin()
    light_site.wait_for_work(scheduler)
    hold_ledger(1.5)
    assert scheduler.wait() == 1
    light_site.configure()
    assert light_site.run()[0] == 0
    assert light_site.audit().problems == []


def test_a_standing_scheduler_that_lost_its_ledger_goes_on_with_what_it_had(light_site, hold_ledger):
    light_site.configure(ledger_patience_s=0.3)
    scheduler = light_site.begin(every_s=0.1)
    wait_until(lambda: "nothing new" in scheduler.said)
    light_site.scan_some(6)
    light_site.wait_for_work(scheduler)
    hold_ledger(1.5)
    wait_until(lambda: "the next pass tries again" in scheduler.said)
    wait_until(lambda: light_site.count(JobState.PUBLISHED) == 6)
    scheduler.kill(signal.SIGTERM, group=False)
    scheduler.wait()
    assert "Traceback" not in scheduler.said
    light_site.configure()
    assert light_site.audit().problems == []


def test_slides_of_a_share_that_went_away_make_one_problem_and_are_scored_when_it_is_back(light_site):
    light_site.scan_some(30, says=b"slow")
    scheduler = light_site.begin()
    wait_until(lambda: light_site.count(JobState.WAITING) > 5)
    light_site.share.rename(light_site.folder / "away")
    light_site.share.mkdir()
    assert scheduler.wait() == 1
    assert "slides are not where seen last; is the share mounted?" in scheduler.said
    assert "0001.tif" not in scheduler.said
    light_site.share.rmdir()
    (light_site.folder / "away").rename(light_site.share)
    light_site.end_pauses()
    assert light_site.tries() <= {0, 1}


def test_without_its_ledger_results_are_taken_up_and_not_made_again(light_site):
    light_site.scan_some(3)
    assert light_site.run()[0] == 0
    made = {path: path.stat().st_ino for path in light_site.out.glob("results/*/*/result.json")}
    for file in light_site.out.glob("ledger.sqlite*"):
        file.unlink()
    damaged = next(iter(made))
    damaged.write_text("half")
    assert light_site.run()[0] == 0
    now = {path: path.stat().st_ino for path in light_site.out.glob("results/*/*/result.json")}
    assert {path for path, inode in made.items() if now[path] == inode} == set(made) - {damaged}
    assert light_site.count(PUBLISHED) == 3
    [aside] = light_site.out.glob("results/*/*.set-aside-*")
    shutil.rmtree(aside)
    assert light_site.audit().problems == []


def test_a_ledger_removed_while_it_is_in_use_ends_the_pass(light_site):
    light_site.scan_some(6, says=b"slow")
    scheduler = light_site.begin()
    light_site.wait_for(PUBLISHED)
    (light_site.out / "ledger.sqlite").unlink()
    assert scheduler.wait() == 1
    assert "ledger.sqlite: is gone (No such file or directory); restore it from a copy" in scheduler.said
    assert light_site.run()[0] == 0
    assert light_site.audit().problems == []


def test_an_unreachable_database_is_one_line_and_nothing_is_touched(light_site):
    pytest.importorskip("psycopg")
    light_site.configure(ledger="postgresql+psycopg://s4mil:secret@/x?host=/nowhere", ledger_patience_s=0.1)
    light_site.scan_some(1)
    code, said = light_site.run()
    [line] = said.splitlines()
    assert code == 1
    assert line.startswith("s4mil: postgresql+psycopg://s4mil:***@/x")
    assert "is the database running" in line
    assert not light_site.out.exists()


def test_a_database_restarted_in_the_middle_is_waited_for(light_site, postgres):
    light_site.configure(ledger=postgres.make_database())
    light_site.scan_some(24)
    ledger = light_site.ledger()
    scheduler = light_site.begin()
    for wanted in (1, 8):
        wait_until(lambda wanted=wanted: ledger.counts()[PUBLISHED] >= wanted)
        postgres.stop()
        postgres.start()
    assert scheduler.wait() == 0, scheduler.said
    assert light_site.audit().problems == []
    ledger.database.close()


# Shares ------------------------------------------------------------------------------------------------------


def test_a_share_unmounted_in_the_middle_blames_no_slide(light_site, mounting):
    hidden = light_site.share.rename(light_site.folder / "hidden")
    light_site.share.mkdir()
    call("mount", "--bind", hidden, light_site.share)
    try:
        light_site.scan_some(6, says=b"slow")
        scheduler = light_site.begin()
        light_site.wait_for(PUBLISHED)
    finally:
        call("umount", "-l", light_site.share)
    assert scheduler.wait() == 1
    assert "is the share mounted?" in scheduler.said
    assert set(light_site.states().values()) == {PUBLISHED, WAITING}
    light_site.share.rmdir()
    hidden.rename(light_site.share)
    light_site.end_pauses()
    assert light_site.run()[0] == 0
    assert light_site.audit().problems == []
    assert light_site.tries() == {1}


def test_a_file_that_is_still_being_copied_is_not_scored(light_site):
    light_site.configure(settle_s=1.5)
    slide = light_site.scan_light("a.tif")
    copied = threading.Event()

    def copy() -> None:
        while not copied.wait(0.05):
            with slide.open("ab") as file:
                file.write(b"more")

    copying = threading.Thread(target=copy)
    copying.start()
    code, said = light_site.run()
    copied.set()
    copying.join()
    assert code == 0
    assert "1 still changing" in said
    assert light_site.jobs() == {}
    light_site.configure()
    assert light_site.audit().problems == []


def test_a_slide_whose_disk_fails_while_it_is_read_is_not_blamed(site, mounting, tmp_path):
    """The image under a mounted file system is cut short: the file is still listed, its bytes are gone."""
    image = tmp_path / "image"
    with disk_in_a_file(image, site.share, 32 << 20):
        slide = site.scan("a.tif")
        forget_pages(slide)
        kind = read_checked_site(site.file, default_bundle=lambda: site.bundle)
        worker = SlideWorker(kind.worker_settings())
        os.truncate(image, 1 << 20)
        outcome = worker.prepare(Work("lease", "0" * 64, slide, tmp_path / "part"))
        assert os.path.exists(slide)
        assert isinstance(outcome, Failed)
        assert outcome.of_the_share
        assert outcome.failure.reason == "cannot be read (Input/output error); is the share mounted?"


# Processes that score ----------------------------------------------------------------------------------------


def test_a_slide_that_takes_all_memory_is_alone_in_quarantine(light_site):
    if not os.access(MEMORY_GROUPS / "memory.limit_in_bytes", os.W_OK):
        pytest.skip("no control groups for memory here")
    light_site.configure(tries=2)
    light_site.scan_some(5)
    light_site.scan_light("bad.tif", says=b"much")
    with memory_group(100 << 20) as group:
        assert light_site.run(**{MEMORY_GROUP: str(group)})[0] == 1
    jobs = light_site.jobs()
    bad = jobs.pop("bad.tif")
    assert (bad.state, bad.error) == (QUARANTINED, "LostProcessError")
    assert bad.reason == "the process that scores was ended by SIGKILL"
    assert {(job.state, job.attempts) for job in jobs.values()} == {(PUBLISHED, 1)}


def test_a_slide_that_never_ends_is_given_up_and_the_others_are_not_blamed(light_site):
    light_site.configure(tries=1, slide_limit_s=3)
    light_site.scan_some(5)
    light_site.scan_light("bad.tif", says=b"stop")  # SIGSTOP: nothing in its process moves any more
    assert light_site.run()[0] == 1
    jobs = light_site.jobs()
    bad = jobs.pop("bad.tif")
    assert (bad.state, bad.error) == (QUARANTINED, "SlideLimitError")
    assert bad.reason == "took longer than 3 s (slide_limit_s)"
    assert {(job.state, job.attempts) for job in jobs.values()} == {(PUBLISHED, 1)}


def test_a_slide_that_waits_behind_a_long_one_is_not_late(light_site):
    """Each takes half a second; the last of three in a process has waited for two."""
    light_site.configure(tries=1, slide_limit_s=0.9)
    light_site.scan_some(6, says=b"slow")
    assert light_site.run()[0] == 0
    assert light_site.tries() == {1}


def test_a_process_that_cannot_be_started_again_ends_the_pass(light_site):
    light_site.scan_light("bad.tif", says=b"kill")
    scheduler = light_site.begin(**{ONLY_ONCE: str(light_site.out / "ledger.sqlite-wal.not-yet")})
    (light_site.out).mkdir(exist_ok=True)
    (light_site.out / "ledger.sqlite-wal.not-yet").touch()
    assert scheduler.wait() == 1
    assert set(light_site.states().values()) <= {WAITING, JobState.RETRY}
