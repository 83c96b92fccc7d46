"""How busy each stage of a piece of work was."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Busy seconds by stage, which several threads may add to at once.

    Stages that overlap add up to more than the time that passed; the share of it that each was busy says which
    one the others wait for.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._started = time.perf_counter()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds a block takes to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage."""
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def report(self) -> dict[str, float]:
        """Seconds by stage, and ``total``: those since the work began, which is less where stages overlapped."""
        with self._lock:
            known = {stage: round(seconds, 3) for stage, seconds in self._seconds.items()}
        return {**known, "total": round(time.perf_counter() - self._started, 3)}
