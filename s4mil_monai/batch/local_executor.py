"""LocalExecutor: processes of this machine that hold a model each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import connection, get_context
from typing import Any

from s4mil_monai.batch.scoring_process import serve
from s4mil_monai.batch.work import Began, Event, Executor, Lost, Work, WorkerSettings
from s4mil_monai.errors import S4MilError

IN_ONE_PROCESS = 3
"""Slides: one being prepared, one embedded, one written."""

PATIENT_THREADS = {"OMP_WAIT_POLICY": "passive"}
"""Threads of the encoder that wait for each other let go of their cores. Spinning, they kept them from whatever
else runs there, as the steps of other slides, and the encoder ran at a third of its speed. What the site has set
holds."""


class ProcessDiedError(S4MilError):
    """A process that scores died before it was ready."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the process that scores {self.reason} while it loaded the model; is there enough memory?"


class LocalExecutor(Executor):
    """Scores on this machine."""

    def __init__(self, settings: WorkerSettings, *, workers: int = 1):
        """Prepare processes.

        Args:
            settings: Of the model each of them holds.
            workers: How many; GPUs are theirs in turn.
        """
        self._settings = settings
        self._processes = [_ScoringProcess(replace(settings, process=number)) for number in range(workers)]
        self._waiting: list[Work] = []
        self._started = False

    def start(self) -> None:
        """Load the model in every process.

        Raises:
            S4MilError: It cannot be loaded.
        """
        if self._started:
            return
        for process in self._processes:
            process.begin()
        for process in self._processes:
            process.wait_until_ready()
        self._started = True

    def room(self) -> int:
        """How many more slides it takes now; none while one waits for a process of its own."""
        if self._waiting:
            return 0
        return sum(process.room() for process in self._processes)

    def submit(self, work: Work) -> None:
        """Take a slide, in the process that has fewest; one that died is started anew."""
        self._waiting.append(work)
        self._send_waiting()

    def poll(self, timeout_s: float) -> list[Event]:
        """What has happened, waiting for it at most so long."""
        running = [process for process in self._processes if process.is_running]
        if not running:
            time.sleep(timeout_s)
            return []
        connection.wait([process.channel for process in running], timeout_s)
        events = [event for process in running for event in process.collect()]
        self._send_waiting()
        return events

    def _send_waiting(self) -> None:
        while self._waiting:
            process = min(self._processes, key=lambda process: len(process.works))
            if process.works and (self._waiting[0].alone or not process.room()):
                return
            process.submit(self._waiting.pop(0))

    def drop(self, lease: str) -> None:
        """Kill the process that has a slide."""
        for process in self._processes:
            if lease in process.works:
                process.kill()

    def stop(self) -> list[Event]:
        """Kill all processes; gives what they had still to tell, and what is lost with them."""
        events: list[Event] = [Lost(work.lease, "was not begun") for work in self._waiting]
        self._waiting.clear()
        for process in self._processes:
            process.kill()
        return events + [event for process in self._processes for event in process.collect_last()]


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Start processes with some variables more; those that are set stay as they are."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


class _ScoringProcess:
    def __init__(self, settings: WorkerSettings):
        self._settings = settings
        self._process: Any = None
        self._is_ready = False
        self._begun: set[str] = set()
        self.works: dict[str, Work] = {}
        """What it has, by lease."""

    @property
    def is_running(self) -> bool:
        """Whether it was started, and its end has not been noticed."""
        return self._process is not None

    def room(self) -> int:
        """How many more slides it takes."""
        return 0 if any(work.alone for work in self.works.values()) else IN_ONE_PROCESS - len(self.works)

    def begin(self) -> None:
        """Start it; it loads the model by itself."""
        self._is_ready = False
        ours, theirs = get_context("spawn").Pipe()
        arguments = (theirs, self._settings, os.getpid())
        self._process = get_context("spawn").Process(target=serve, args=arguments, name="s4mil-score", daemon=True)
        with _environment(PATIENT_THREADS):
            self._process.start()
        theirs.close()
        self.channel = ours

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            S4MilError: It cannot be.
        """
        try:
            answer = self.channel.recv()
        except (EOFError, OSError) as error:
            raise ProcessDiedError(self._end()) from error
        if isinstance(answer, S4MilError):
            self._end()
            raise answer
        self._is_ready = True

    def submit(self, work: Work) -> None:
        """Send it a slide, starting it if need be; that it died shows when events are collected."""
        if not self.is_running:
            self.begin()
        self.works[work.lease] = work
        with suppress(OSError):
            self.channel.send(work)

    def collect(self) -> list[Event]:
        """Events that have come; those of its death, if it has died."""
        events: list[Event] = []
        try:
            while self.channel.poll():
                event = self.channel.recv()
                if event is None:  # started anew, the model is loaded
                    self._is_ready = True
                    continue
                if isinstance(event, S4MilError):
                    return [*events, *self._lose(f"cannot load the model: {event}", of_the_machine=True)]
                events.append(event)
                events += self._note(event)
        except (EOFError, OSError):
            return [*events, *self._lose(self._end(), of_the_machine=not self._is_ready)]
        return events

    def _note(self, event: Event) -> list[Event]:
        """Keep account of an event; gives those that follow from it."""
        if isinstance(event, Began):
            self._begun.add(event.lease)
            return []
        self._begun.discard(event.lease)
        self.works.pop(event.lease, None)
        # until now they have waited behind it, and their time did not count
        return [Began(lease) for lease in self.works if lease in self._begun]

    def collect_last(self) -> list[Event]:
        """All events of a process that was killed."""
        events: list[Event] = []
        while self.is_running:
            connection.wait([self.channel])
            events += self.collect()
        return events

    def kill(self) -> None:
        """End it now; :meth:`collect` tells what is lost."""
        if self._process is not None and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    def _lose(self, reason: str, *, of_the_machine: bool = False) -> list[Event]:
        self._end()
        lost, self.works = self.works, {}
        shared, self._begun = len(self._begun) > 1, set()
        return [Lost(lease, f"the process that scores {reason}", of_the_machine, shared) for lease in lost]

    def _end(self) -> str:
        """Forget the process; says how it ended."""
        process, self._process = self._process, None
        if process is None:
            return "is gone"
        process.join(timeout=5)
        if process.exitcode is None:
            process.kill()
            process.join()
        self.channel.close()
        code = process.exitcode or 0
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
