"""Verification while a batch publishes: what comes meanwhile is no tampering, and tampering is still found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from s4mil_monai.batch.database import Database
from s4mil_monai.batch.ledger import Job, JobKind, Ledger
from s4mil_monai.batch.provenance import PROVENANCE_FILE, PROVENANCE_FORMAT, list_sums, write_record
from s4mil_monai.batch.schema import CHAIN, PROVENANCE
from s4mil_monai.batch.verify import verify_results
from s4mil_monai.models.manifest import MANIFEST

KIND = JobKind("m" * 64, "s" * 64, "tiny-1.0")
NO_DATA = {"summary": {}, "measures": None}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    database = Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}", patience_s=5)
    yield Ledger(database, lease_s=60, tries=2, losses=2, backoff_s=100)
    database.close()


def begin(ledger: Ledger, out: Path, name: str) -> tuple[Job, str]:
    """Bring a result as far as its folder's name; gives its job and record."""
    assert ledger.add(name * 64, name * 64, KIND, path=f"/share/{name}.svs", name=f"{name}.svs")
    job = ledger.claim(KIND, f"token {name}")
    assert job is not None
    folder = f"results/{name}/tiny-1.0"
    (out / folder).mkdir(parents=True)
    (out / folder / "result.json").write_text(name)
    outputs = {"result.json": hashlib.sha256(name.encode()).hexdigest()}
    record = write_record({"format": PROVENANCE_FORMAT, "job": job.key, "folder": folder, "outputs": outputs})
    (out / folder / PROVENANCE_FILE).write_text(record)
    (out / folder / MANIFEST).write_text(list_sums(record))
    assert ledger.begin_publishing(job, folder=folder, sums="0" * 64)
    return job, record


def publish(ledger: Ledger, out: Path, name: str) -> None:
    job, record = begin(ledger, out, name)
    assert ledger.publish(job, **NO_DATA, record=record)


def spoil(out: Path, name: str) -> str:
    file = out / "results" / name / "tiny-1.0" / "result.json"
    file.write_text("negative")
    return f"results/{name}/tiny-1.0/result.json: was changed: its SHA-256 is another"


def problems(ledger: Ledger, out: Path, **known: object) -> list[str]:
    return [str(found) for found in verify_results(ledger, out, **known)]  # pyright: ignore[reportArgumentType]


def test_what_is_published_while_files_are_hashed_is_no_problem(ledger, tmp_path):
    for name in "ab":
        publish(ledger, tmp_path, name)
    first, second = spoil(tmp_path, "a"), spoil(tmp_path, "b")
    checking = verify_results(ledger, tmp_path)
    assert str(next(checking)) == first
    publish(ledger, tmp_path, "c")
    assert [str(found) for found in checking] == [second]


def test_what_is_published_between_the_head_and_the_list_of_folders_is_no_problem(ledger, tmp_path):
    publish(ledger, tmp_path, "a")
    end = ledger.head()
    publish(ledger, tmp_path, "b")
    assert problems(ledger, tmp_path, end=end) == []
    assert problems(ledger, tmp_path, end=end, head=ledger.head()[1]) == []


def test_what_is_between_its_name_and_its_record_is_no_problem(ledger, tmp_path):
    publish(ledger, tmp_path, "a")
    job, record = begin(ledger, tmp_path, "b")
    assert problems(ledger, tmp_path) == []
    said = spoil(tmp_path, "a")
    checking = verify_results(ledger, tmp_path)
    assert str(next(checking)) == said
    assert ledger.publish(job, **NO_DATA, record=record)
    assert list(checking) == []


def test_a_record_that_was_put_behind_the_end_of_the_chain_is_found(ledger, tmp_path):
    publish(ledger, tmp_path, "a")
    end = ledger.head()
    publish(ledger, tmp_path, "b")
    ledger.database.transact(lambda it: it.execute(sa.update(CHAIN).values(number=end[0], hash=end[1])))
    assert problems(ledger, tmp_path) == [
        "record 2: comes after record 1, with which the chain ends",
        "results/b/tiny-1.0: is in no record",
    ]


def test_a_record_that_is_added_to_the_chain_meanwhile_is_checked_too(ledger, tmp_path):
    publish(ledger, tmp_path, "a")
    end = ledger.head()
    publish(ledger, tmp_path, "b")
    changed = sa.update(PROVENANCE).where(PROVENANCE.c.number == 2).values(record="{}")
    ledger.database.transact(lambda it: it.execute(changed))
    assert "record 2: was changed: its hash is another" in problems(ledger, tmp_path, end=end)


def test_files_that_cannot_be_read_are_problems_and_the_rest_is_checked(ledger, tmp_path):
    for name in "ab":
        publish(ledger, tmp_path, name)
    dangling = tmp_path / "results" / "a" / "tiny-1.0" / "result.json"
    dangling.unlink()
    dangling.symlink_to("nowhere")
    said = spoil(tmp_path, "b")
    assert problems(ledger, tmp_path) == [
        "results/a/tiny-1.0/result.json: cannot be read (No such file or directory)",
        said,
    ]
