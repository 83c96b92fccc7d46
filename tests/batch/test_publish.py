"""What a publisher says when it cannot write: errors get into logs, and names of slides may be of patients."""

from __future__ import annotations

import pytest

from s4mil_monai.batch.database import Database
from s4mil_monai.batch.ledger import JobKind, Ledger
from s4mil_monai.batch.publish import Places, Publisher
from s4mil_monai.batch.work import Scored
from s4mil_monai.errors import OutputError

KIND = JobKind("m" * 64, "s" * 64, "tiny-1.0")


def test_a_result_that_cannot_be_written_is_told_by_its_pseudonym(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}", patience_s=5)
    ledger = Ledger(database, lease_s=60, tries=2, losses=2, backoff_s=100)
    ledger.add("a" * 64, "b" * 64, KIND, path="/share/Doe John.svs", name="Doe John.svs")
    job = ledger.claim(KIND, "token")
    assert job is not None
    publisher = Publisher(ledger, Places(tmp_path), kind=KIND, origin={}, run="now")
    with pytest.raises(OutputError) as refused:  # nobody has made the folder of this try
        publisher.publish(job, Scored("token", {}, {}, {}))
    reason = "the result of bbbbbbbbbbbb cannot be written (No such file or directory)"
    assert str(refused.value) == f"{tmp_path}: {reason}"
    database.close()
