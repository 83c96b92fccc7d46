"""A hospital whose processes score nothing: everything else is as in use."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s4mil_monai.batch.states import JobState
from tests.batch.audit import Audit, audit
from tests.batch.broken_machine import wait_until
from tests.batch.fork_server import Forked, ForkServer
from tests.batch.small_site import SmallSite


@dataclass
class LightSite(SmallSite):
    """A site whose schedulers are forked and cost little."""

    server: ForkServer

    def configure(self, **settings: Any) -> Path:
        """As of any site; a slide that hangs shall not hang the tests."""
        return super().configure(**{"slide_limit_s": 60, **settings})

    def scan_light(self, name: str, *, seed: int = 0, says: bytes = b"") -> Path:
        """Put a file on the share that is called as a slide; what it says is in :class:`LightWorker`."""
        (self.share / name).write_bytes(says + random.Random(f"{name}{seed}").randbytes(20_000))
        return self.share / name

    def scan_some(self, number: int, *, says: bytes = b"") -> None:
        """Put so many on the share."""
        for n in range(number):
            self.scan_light(f"{n:04}.tif", says=says)

    def begin(self, *, log: str = "log", **order: Any) -> Forked:
        """Start a pass."""
        return self.server.start(self.file, self.folder / log, **order)

    def run(self, **order: Any) -> tuple[int, str]:
        """One pass: exit code, and what it said."""
        scheduler = self.begin(**order)
        code = scheduler.wait()
        assert "Traceback" not in scheduler.said, scheduler.said
        return code, scheduler.said

    def wait_for_work(self, scheduler: Forked) -> None:
        """Wait until a scheduler has begun with a slide."""
        begun = "SELECT count(*) FROM history WHERE after = 'running' AND owner LIKE ?"
        wait_until(lambda: self._count(begun, f'%"pid": {scheduler.pid},%') > 0)

    def wait_for(self, state: JobState) -> None:
        """Wait until a slide is in a state."""
        wait_until(lambda: self.count(state) > 0)

    def count(self, state: JobState) -> int:
        """Slides in a state, read without this package."""
        return self._count("SELECT count(*) FROM jobs WHERE state = ?", state.value)

    def _count(self, query: str, argument: str) -> int:
        if not (self.out / "ledger.sqlite").exists():
            return 0
        with closing(sqlite3.connect(self.out / "ledger.sqlite")) as connection:
            try:
                return connection.execute(query, (argument,)).fetchone()[0]
            except sqlite3.OperationalError:  # there are no tables yet
                return 0

    def end_pauses(self) -> None:
        """As if enough time had gone by for every slide that waits."""
        with closing(sqlite3.connect(self.out / "ledger.sqlite")) as connection, connection:
            connection.execute("UPDATE jobs SET not_before = 0")

    def tries(self) -> set[int]:
        """How many tries slides have had."""
        return {job.attempts for job in self.jobs().values()}

    def audit(self) -> Audit:
        """See :func:`audit`; a pass before removes what killed ones have left."""
        assert self.run()[0] == 0
        ledger = self.ledger()
        try:
            return audit(ledger, self.share, self.out)
        finally:
            ledger.database.close()
