"""Reading a new slide through: whatever happens, there is an outcome."""

from __future__ import annotations

import os

from s4mil_monai.batch.hashing import Hashing
from s4mil_monai.batch.intake import Candidate
from s4mil_monai.slides.fingerprint import fingerprint_slide
from tests.batch.broken_machine import wait_until


def outcome_of(path, limit_s=60):
    hashing = Hashing(Candidate(path, path.name, "", None), limit_s=limit_s)
    wait_until(lambda: hashing.outcome is not None)
    return hashing.outcome


def test_the_outcome_is_the_slides_fingerprint(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"pixels")
    assert outcome_of(tmp_path / "a.svs") == fingerprint_slide(tmp_path / "a.svs")


def test_a_file_that_never_answers_is_given_up(tmp_path):
    os.mkfifo(tmp_path / "a.svs")  # nobody writes
    found = outcome_of(tmp_path / "a.svs", limit_s=0.1)
    assert isinstance(found, OSError)
    assert found.strerror == "not read through within 0.1 s"


def test_a_file_that_is_gone_is_told(tmp_path):
    assert isinstance(outcome_of(tmp_path / "a.svs"), FileNotFoundError)


def test_an_error_nobody_thought_of_is_told_too(tmp_path):
    found = outcome_of(tmp_path / "a\0.svs")  # ValueError: embedded null byte
    assert isinstance(found, OSError)
    assert "ValueError" in str(found.strerror)
