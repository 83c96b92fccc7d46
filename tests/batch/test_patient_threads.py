"""What scoring processes are started with."""

from __future__ import annotations

import os
from multiprocessing import get_context

import pytest

from s4mil_monai.batch.local_executor import PATIENT_THREADS, _environment

POLICY = "OMP_WAIT_POLICY"


def policy_of_a_new_process() -> str | None:
    with _environment(PATIENT_THREADS), get_context("spawn").Pool(1) as pool:
        return pool.apply(os.getenv, (POLICY,))


def test_threads_that_wait_for_each_other_let_go_of_their_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(POLICY, raising=False)
    assert policy_of_a_new_process() == "passive"
    assert POLICY not in os.environ


def test_what_the_site_has_set_for_its_threads_holds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(POLICY, "active")
    assert policy_of_a_new_process() == "active"
    assert os.environ[POLICY] == "active"
