"""A moment to be killed at, told by a place in the code: clocks hardly ever hit the microseconds that matter."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

PLACES = {
    "intake": (
        "intake.py:look",
        "intake.py:add",
        "sightings.py:note",
        "sightings.py:keep",
        "ledger.py:add",
        "ledger.py:_note",
    ),
    "hashing": (
        "checksum.py:sha256_of",
        "fingerprint.py:fingerprint_slide",
        "scheduler.py:_read",
    ),
    "claim": (
        "ledger.py:claim",
        "ledger.py:_find_claimable",
        "ledger.py:_lease",
        "scheduler.py:_begin",
        "local_executor.py:submit",
        "publish.py:adopt",
    ),
    "scoring": (
        "light_worker.py:prepare",
        "light_worker.py:embed",
        "light_worker.py:write",
        "scheduler.py:_work_a_little",
        "ledger.py:renew",
        "local_executor.py:collect",
    ),
    "before the rename": (
        "publish.py:publish",
        "publish.py:_rename_and_record",
        "whole_file.py:sync_tree",
        "ledger.py:begin_publishing",
        "provenance.py:list_sums",
    ),
    "renamed, not recorded": (
        "whole_file.py:sync_folder",
        "publish.py:_rename",
        "publish.py:_record_it",
        "ledger.py:publish",
        "ledger.py:_append",
        "ledger.py:_let_go",
        "provenance.py:link",
    ),
    "after recording": (
        "scheduler.py:_tell_published",
        "run_report.py:write_run_report",
        "whole_file.py:write_whole",
        "ledger.py:end_run",
    ),
    "recovery": (
        "scheduler.py:_recover",
        "ledger.py:find_abandoned",
        "ledger.py:take_over",
        "ledger.py:lose",
        "publish.py:finish",
        "publish.py:sweep",
    ),
    "opening the ledger": (
        "database.py:_migrate",
        "database.py:transact",
        "ledger.py:begin_run",
    ),
}
"""Functions by what they are part of."""


@dataclass(frozen=True)
class KillPoint:
    """The so-many-th line of the so-many-th call of a function; at its end, if it has fewer lines."""

    phase: str
    place: str
    call: int
    line: int

    @classmethod
    def draw(cls, generator: random.Random) -> KillPoint:
        """Any phase, each as often as the others."""
        phase = generator.choice(list(PLACES))
        place = generator.choice(PLACES[phase])
        return cls(phase, place, call=generator.choice((1, 1, 2, 3)), line=generator.randrange(10))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def arm(point: KillPoint, tombstone: str) -> None:
    """Have this process's group killed when it comes to a point; it writes the phase to ``tombstone`` before."""
    file, _, function = point.place.rpartition(":")
    calls = 0

    def enter(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal calls
        code = frame.f_code
        if code.co_name != function or not code.co_filename.endswith(file):
            return None
        calls += 1
        return _count_lines(point, tombstone) if calls == point.call else None

    threading.settrace(enter)
    sys.settrace(enter)


def _count_lines(point: KillPoint, tombstone: str) -> Any:
    lines = 0

    def step(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        if lines > point.line or event == "return":
            with open(tombstone, "w") as file:
                file.write(point.phase)
            os.killpg(0, signal.SIGKILL)
        return step

    return step
