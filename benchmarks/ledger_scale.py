"""What the ledger's operations take when it holds a million jobs, on SQLite and on PostgreSQL.

    python benchmarks/ledger_scale.py [--jobs 1000000] [--records 100000] [--databases sqlite,postgresql]
        [--processes 8]

The ledger is filled in bulk: half of the jobs published, half waiting, some that failed, in quarantine, or held by
schedulers of other machines; a sighting and a line of history for each; a chain of `--records` provenance records
of 2 KB. Then each operation is called many times by one process, and the life of a job (claim, begin to publish,
publish with its record) by several at once, which must not take a job twice.

PostgreSQL is started for the run, with its own settings as installed, in a folder of its own, and listens on a
socket only. That needs root and Debian's binaries; without them it is left out, in so many words.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from fire import Fire

from s4mil_monai.batch.database import Database
from s4mil_monai.batch.ledger import Failure, Job, JobKind, Ledger
from s4mil_monai.batch.provenance import FIRST, link
from s4mil_monai.batch.schema import CHAIN, HISTORY, JOBS, PROVENANCE, SIGHTINGS
from s4mil_monai.batch.sightings import Sightings
from s4mil_monai.batch.states import JobState

POSTGRES = Path("/usr/lib/postgresql/15/bin")
KIND = JobKind(hashlib.sha256(b"model").hexdigest(), hashlib.sha256(b"settings").hexdigest(), "s4mil_slide-1.0")
AT_ONCE = 10_000
"""Rows in one statement while the ledger is filled."""
HELD = 1000
"""Jobs under leases of other machines; and leases that are renewed in one call."""
SUMMARY = {"status": "scored", "predicted": "tumour", "probability": 0.93, "notes": [], "patches": 9500} | {
    "seconds": {"opening": 0.1, "tissue": 0.2, "quality": 0.4, "reading": 20.0, "encoding": 19.0, "total": 21.0}
}
MEASURES = {f"measure_{number}": number / 7 for number in range(16)}
RECORD = json.dumps(
    {"summary": SUMMARY, "measures": MEASURES, "outputs": {f"file_{n}": "0" * 64 for n in range(12)}}
)

Row = dict[str, Any]


def main(
    jobs: int = 1_000_000, records: int = 100_000, databases: str = "sqlite,postgresql", processes: int = 8
) -> None:
    """Print one table a database."""
    names = databases.split(",") if isinstance(databases, str) else databases
    for name in names:
        with OPENED[name]() as url:
            if url is None:
                print(f"\n{name}: not measured, it is not installed here")
                continue
            measure(name, url, jobs, records, processes)


# Databases


@contextmanager
def open_sqlite() -> Iterator[str | None]:
    """A file on the disk of the working directory: a temporary folder may lie in memory."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        yield f"sqlite:///{Path(folder).absolute() / 'ledger.sqlite'}"


@contextmanager
def open_postgresql() -> Iterator[str | None]:
    """A server of its own, stopped and removed at the end."""
    if not (POSTGRES / "postgres").exists() or os.geteuid() != 0:
        yield None
        return
    folder = Path(tempfile.mkdtemp())
    shutil.chown(folder, "postgres", "postgres")
    data = folder / "data"
    try:
        _as_postgres("initdb", "-D", data, "-A", "trust", "-E", "UTF8")
        options = f"-c listen_addresses= -c unix_socket_directories={folder}"
        _as_postgres("pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        finally:
            _as_postgres("pg_ctl", "-D", data, "-w", "-m", "fast", "stop")
    finally:
        shutil.rmtree(folder)


def _as_postgres(program: str, *arguments: object) -> None:
    command = ["runuser", "-u", "postgres", "--", str(POSTGRES / program), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")


OPENED = {"sqlite": open_sqlite, "postgresql": open_postgresql}


def open_ledger(url: str) -> Ledger:
    """As a site opens it."""
    return Ledger(Database(url), lease_s=120, tries=3, losses=5, backoff_s=600)


# What it holds


def fill(ledger: Ledger, jobs: int, records: int) -> None:
    """Write all rows in bulk."""
    now = time.time()
    _insert(ledger, JOBS, (make_job(number, jobs, now) for number in range(jobs)))
    _insert(ledger, HISTORY, ({"job": key_of(number), "at": now, "after": "waiting"} for number in range(jobs)))
    _insert(ledger, SIGHTINGS, (make_sighting(number, now) for number in range(jobs)))
    _insert(ledger, PROVENANCE, make_chain(ledger, records))
    if not ledger.database.is_sqlite:  # as autovacuum would within minutes
        with sa.create_engine(ledger.database._url, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")


def key_of(number: int) -> str:
    """Of a job."""
    return hashlib.sha256(f"job {number}".encode()).hexdigest()


def slide_of(number: int) -> str:
    """Fingerprint of a slide."""
    return hashlib.sha256(f"slide {number}".encode()).hexdigest()


def path_of(number: int) -> str:
    """Where a slide lies."""
    return f"/share/slides/2026/{number // 1000:05}/slide_{number:07}.svs"


def state_of(number: int, jobs: int) -> JobState:
    """Half is published; the others wait, but for a few."""
    if number < jobs // 2:
        return JobState.PUBLISHED
    left = number - jobs // 2
    if left < HELD:
        return JobState.RUNNING
    return {0: JobState.RETRY, 1: JobState.QUARANTINED}.get(number % 200, JobState.WAITING)


def make_job(number: int, jobs: int, now: float) -> Row:
    """A row of jobs; every row has the same columns."""
    state = state_of(number, jobs)
    held, published = state is JobState.RUNNING, state is JobState.PUBLISHED
    owner = json.dumps({"machine": f"node{number % 125:03}", "pid": 4711, "started": "1"})
    return {
        "key": key_of(number),
        "slide": slide_of(number),
        "model": KIND.model,
        "settings": KIND.settings,
        "path": path_of(number),
        "name": Path(path_of(number)).name,
        "state": state.value,
        "attempts": int(state is not JobState.WAITING),
        "losses": 0,
        "found_at": now - jobs + number,
        "changed_at": now - jobs + number,
        "not_before": 0.0,
        "lease": uuid.uuid4().hex if held or published else None,
        "owner": owner if held else None,
        "leased_at": now if held else None,
        "expires_at": now + 36000 if held else None,
        "folder": f"results/slide_{number:07}/s4mil" if published else None,
        "sums": key_of(number) if published else None,
        "summary": SUMMARY if published else None,
        "measures": MEASURES if published else None,
    }


def make_sighting(number: int, now: float) -> Row:
    """A row of sightings: every file was read through."""
    snapshot = f"slide_{number:07}.svs 1234567890 {number}"
    return {"path": path_of(number), "snapshot": snapshot, "since": now - 86400, "slide": slide_of(number)}


def make_chain(ledger: Ledger, records: int) -> Iterator[Row]:
    """Rows of provenance; sets the head when the last is given."""
    previous = FIRST
    for number in range(1, records + 1):
        new = link(number, previous, RECORD)
        previous = new.hash
        yield {"job": key_of(number), **new.__dict__}
    ledger.database.transact(
        lambda connection: connection.execute(sa.update(CHAIN).values(number=records, hash=previous))
    )


def _insert(ledger: Ledger, table: sa.Table, rows: Iterator[Row]) -> None:
    while chunk := list(islice(rows, AT_ONCE)):
        ledger.database.transact(lambda connection, chunk=chunk: connection.execute(sa.insert(table), chunk))


# What is measured


@dataclass(frozen=True)
class Times:
    """Of one operation."""

    name: str
    seconds: list[float]

    def row(self) -> str:
        """A line of the table."""
        ms = sorted(1000 * value for value in self.seconds)
        p99 = ms[min(len(ms) - 1, int(0.99 * len(ms)))]
        rate = 1000 / statistics.mean(ms)
        return f"| {self.name} | {len(ms)} | {rate:.1f} | {statistics.median(ms):.2f} | {p99:.2f} |"


def timed(name: str, work: Callable[[], object], times: int) -> Times:
    """Call something many times."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    found = Times(name, seconds)
    print(found.row(), flush=True)
    return found


def measure(name: str, url: str, jobs: int, records: int, processes: int) -> None:
    """Fill a ledger and print its table."""
    ledger = open_ledger(url)
    started = time.perf_counter()
    fill(ledger, jobs, records)
    print(
        f"\n{name}: {jobs} jobs, {records} provenance records, filled in {time.perf_counter() - started:.0f} s\n"
    )
    print("| operation | calls | calls/s | p50, ms | p99, ms |\n|---|---|---|---|---|")
    measure_scheduling(ledger, jobs)
    measure_asking(ledger, jobs, records)
    measure_together(url, processes)
    if ledger.database.is_sqlite:
        print(f"\n{Path(sa.make_url(url).database or '').stat().st_size / 1e9:.1f} GB")
    ledger.database.close()


def measure_scheduling(ledger: Ledger, jobs: int) -> None:
    """What a scheduler does for every slide."""
    numbers = iter(range(jobs, 2 * jobs))
    claimed: list[Job] = []

    def add() -> None:
        number = next(numbers)
        assert ledger.add(key_of(number), slide_of(number), KIND, path=path_of(number), name="slide.svs")

    def claim() -> None:
        job = ledger.claim(KIND, uuid.uuid4().hex)
        assert job is not None
        claimed.append(job)

    timed("add", add, 500)
    timed("claim", claim, HELD)
    tokens = [job.lease or "" for job in claimed]
    timed(f"renew, {HELD} leases", lambda: ledger.renew(tokens), 20)
    timed("next_try_s", lambda: ledger.next_try_s(KIND), 100)
    timed("find_abandoned, 2000 held", ledger.find_abandoned, 20)
    timed("fail", lambda: ledger.fail(claimed.pop(), Failure("SlideError", "cannot be read")), 200)
    timed("hand_back", lambda: ledger.hand_back(claimed.pop(), "stopped"), 200)
    timed("begin_publishing + publish", lambda: publish(ledger, claimed.pop()), 500)


def publish(ledger: Ledger, job: Job) -> None:
    """Both steps of a result."""
    assert ledger.begin_publishing(job, folder=f"results/{job.slide[:8]}/s4mil", sums=job.key)
    assert ledger.publish(job, summary=SUMMARY, measures=MEASURES, record=RECORD)


def measure_asking(ledger: Ledger, jobs: int, records: int) -> None:
    """What people, reports and looks at the sources ask."""
    sightings = Sightings(ledger.database)
    some = min(jobs, 100_000)
    known = {row["path"]: row["snapshot"] for row in (make_sighting(number, 0) for number in range(some))}
    new = {f"{path}.new": str(snapshot) for path, snapshot in known.items()}
    slides = [slide_of(number) for number in range(some)]
    timed("counts", ledger.counts, 5)
    timed("counts of a kind", lambda: ledger.counts(KIND), 5)
    timed("all in quarantine", lambda: ledger.jobs(JOBS.c.state == JobState.QUARANTINED), 3)
    timed("a slide by its file name", lambda: ledger.jobs(JOBS.c.name == "slide_0000007.svs"), 3)
    timed("a slide by its fingerprint", lambda: ledger.jobs(JOBS.c.slide.like(f"{slide_of(7)[:12]}%")), 3)
    timed("history of a job", lambda: ledger.history(key_of(7)), 50)
    timed("recent_measures, 100", lambda: ledger.recent_measures(KIND, limit=100), 10)
    timed("places of a slide", lambda: sightings.places(slide_of(7)), 50)
    timed(f"note, {some} known files", lambda: sightings.note(known), 3)
    timed(f"note, {some} new files", lambda: sightings.note(new), 1)
    timed(f"slides_with_jobs, {some}", lambda: sightings.slides_with_jobs(slides, KIND.model, KIND.settings), 3)
    timed(f"chain, {records} records", lambda: sum(1 for _ in ledger.chain()), 1)


def measure_together(url: str, processes: int, each: int = 200) -> None:
    """Several schedulers at once; prints how many jobs they bring from claim to published in a second."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        barrier = manager.Barrier(processes)
        found = pool.starmap(live, [(url, each, barrier)] * processes)
    claimed = [key for keys, _, _ in found for key in keys]
    if len(set(claimed)) != processes * each:
        raise RuntimeError(f"{len(claimed)} claims of {len(set(claimed))} jobs: some were taken twice")
    seconds = max(end for _, _, end in found) - min(start for _, start, _ in found)
    print(f"| a job's life, {processes} processes at once, none taken twice | {len(claimed)} |", end="")
    print(f" {len(claimed) / seconds:.1f} | | |")


def live(url: str, each: int, barrier: Any) -> tuple[list[str], float, float]:
    """What a scheduler of its own process does with some jobs; gives their keys, its begin and its end."""
    ledger = open_ledger(url)
    ledger.head()
    barrier.wait()
    keys, started = [], time.time()
    for _ in range(each):
        job = ledger.claim(KIND, uuid.uuid4().hex)
        assert job is not None
        publish(ledger, job)
        keys.append(job.key)
    return keys, started, time.time()


if __name__ == "__main__":
    Fire(main)
