"""A storm of kills: schedulers that are killed at random moments until all slides are published in spite of it."""

from __future__ import annotations

import random
import sqlite3
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tests.batch.audit import Audit, check_integrity
from tests.batch.kill_point import KillPoint
from tests.batch.light_site import LightSite

LONGEST_S = 0.4
"""By the clock, a scheduler is killed at most so long after it began."""


@dataclass
class Storm:
    """Kills on one site, and what they hit."""

    site: LightSite
    generator: random.Random
    by_code: Counter[str] = field(default_factory=Counter)
    """Kills at a place in the code, by phase."""
    by_clock: Counter[str] = field(default_factory=Counter)
    """Kills at a moment, by what the ledger said then."""

    @property
    def kills(self) -> int:
        """All that hit a living process."""
        return self.by_code.total() + self.by_clock.total()

    def rage(self, kills: int) -> None:
        """Kill so many; whenever slides run short, there are new ones."""
        slides = 0
        while self.kills < kills:
            if self._waiting() < 6:
                for _ in range(6):
                    self.site.scan_light(f"{slides:04}.tif")
                    slides += 1
            (self._kill_at_a_place if self.generator.random() < 0.6 else self._kill_at_a_moment)()

    def finish(self) -> Audit:
        """Let a scheduler come to the end, another tidy up, and look at everything."""
        assert self.site.run()[0] == 0
        found = self.site.audit()
        if (said := check_integrity(self.site.out / "ledger.sqlite")) != "ok":
            found.broken.append(f"SQLite says: {said}")
        return found

    def _kill_at_a_place(self) -> None:
        point, tombstone = KillPoint.draw(self.generator), self.site.folder / "tombstone"
        tombstone.unlink(missing_ok=True)
        code = self.site.begin(kill=point.as_dict(), tombstone=str(tombstone)).wait()
        if code < 0:
            self.by_code[tombstone.read_text()] += 1
        else:
            assert code == 0, code

    def _kill_at_a_moment(self) -> None:
        scheduler = self.site.begin()
        time.sleep(self.generator.uniform(0.03, LONGEST_S))
        scheduler.kill(group=self.generator.random() < 0.5)  # else what it started has to notice by itself
        if scheduler.wait() < 0:
            self.by_clock[describe_moment(self.site.out)] += 1

    def _waiting(self) -> int:
        states = _read_states(self.site.out / "ledger.sqlite")
        return len(list(self.site.share.iterdir())) - states["published"]


def describe_moment(out: Path) -> str:
    """What was in work when everything stopped, as the ledger says it."""
    states = _read_states(out / "ledger.sqlite")
    if states["publishing"]:
        return "publishing"
    if states["running"]:
        return "written" if list(out.glob(".work/*/features.h5")) else "scoring"
    return "nothing in work"


def _read_states(ledger: Path) -> Counter[str]:
    """Read without this package, as it must be readable."""
    if not ledger.exists():
        return Counter()
    with closing(sqlite3.connect(ledger)) as connection:
        try:
            return Counter(dict(connection.execute("SELECT state, count(*) FROM jobs GROUP BY state")))
        except sqlite3.OperationalError:  # killed before there were tables
            return Counter()
