"""open_isolated(): a slide whose file is only ever touched by other processes.

Slide files are parsed by C libraries, and files are damaged more often than anyone expects: a decoder may
crash, never come back, or ask for all memory. Here that costs one reading process, which is replaced, and the
slide gets an error with its name; the process that holds the models goes on.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from s4mil_monai import errors
from s4mil_monai.errors import DecoderHungError, UnreadableSlideError
from s4mil_monai.geometry import Level, Resolution
from s4mil_monai.slides.limits import DEFAULT_LIMITS, ReadLimits
from s4mil_monai.slides.overrides import Overrides
from s4mil_monai.slides.read_server import as_level
from s4mil_monai.slides.reader import choose_backend
from s4mil_monai.slides.slide import Slide

MOST_READERS = 8
"""Reading processes at most, however many cores there are."""


def count_readers() -> int:
    """How many reading processes, and threads that wait for them, this machine gets."""
    return max(2, min(MOST_READERS, os.cpu_count() or 2))


class ReaderGone(Exception):
    """A reading process died or had to be ended; its text says how."""


class ReaderHung(ReaderGone):
    """It had to be ended because it did not answer in time."""


class Reader:
    """One reading process."""

    def __init__(self, limits: ReadLimits):
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._to_forget: set[str] = set()

    def start(self) -> None:
        """Start the process, unless it runs; returns before it is ready."""
        if self._process is not None:
            return
        memory = _shared_memory(self._limits.max_read_bytes)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "s4mil_monai.slides.read_server"),
                    *(str(theirs.fileno()), str(memory), str(self._limits.max_memory_bytes)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # libraries write to both about damaged files
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory),
                env=_environment(),
            )
        self.memory = mmap.mmap(memory, 0)
        os.close(memory)
        self._channel = ours
        self._answers = ours.makefile("rb")

    def ask(self, request: dict[str, Any], *, limit_s: float) -> dict[str, Any]:
        """Send one request and wait for its answer; that a new process has to start first does not count.

        Raises:
            ReaderHung: It took longer than ``limit_s``; the process is ended.
            ReaderGone: The process crashed.
        """
        self.start()
        if not self._is_ready:
            self._exchange(b"", limit_s=self._limits.starting_s, what="start")
            self._is_ready = True
        forget, self._to_forget = sorted(self._to_forget), set()
        line = json.dumps({**request, "forget": forget, "limit_s": limit_s}).encode() + b"\n"
        return json.loads(self._exchange(line, limit_s=limit_s, what="come back"))

    def _exchange(self, line: bytes, *, limit_s: float, what: str) -> bytes:
        """Send a line, or nothing, and wait for the one that comes."""
        self._channel.settimeout(limit_s)
        try:
            self._channel.sendall(line)
            answer = self._answers.readline()
        except TimeoutError as error:
            self.end()
            raise ReaderHung(f"did not {what} within {limit_s:g} s") from error
        except OSError:
            answer = b""
        if not answer:
            raise ReaderGone(f"crashed: {self._last_words()}")
        return answer

    def forget(self, path: str) -> None:
        """Let go of a slide with the next request."""
        self._to_forget.add(path)

    @property
    def remembers(self) -> bool:
        """Whether a slide waits to be let go of."""
        return self._process is not None and bool(self._to_forget)

    def _last_words(self) -> str:
        assert self._process is not None
        process = self._process
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        self.end()
        if process.returncode is None:
            return "no answer"
        if process.returncode < 0:
            return signal.Signals(-process.returncode).name
        return f"exit code {process.returncode}"

    def end(self) -> None:
        """End the process now; the next request starts another."""
        if self._process is None:
            return
        self._process.kill()
        self._answers.close()
        self._channel.close()
        self.memory.close()
        with suppress(subprocess.TimeoutExpired):  # stuck inside a read of a dead share: the kernel keeps it
            self._process.wait(timeout=10)
        self._process, self._is_ready = None, False
        self._to_forget.clear()


class ReaderPool:
    """A few reading processes, lent to one thread at a time; safe to share between threads."""

    def __init__(self, size: int | None = None, limits: ReadLimits = DEFAULT_LIMITS):
        self.limits = limits
        self.size = size or count_readers()
        self.busy_s = 0.0
        """Seconds that requests took, added up over all processes."""
        self._readers = [Reader(limits) for _ in range(self.size)]
        self._idle = list(self._readers)
        self._changed = threading.Condition()

    def warm_up(self) -> None:
        """Start the processes; they import their libraries while the caller does something else."""
        for reader in self._readers:
            reader.start()

    def ask(self, request: dict[str, Any], *, limit_s: float) -> dict[str, Any]:
        """As :meth:`Reader.ask`, of any idle process."""
        with self.borrow() as reader:
            return reader.ask(request, limit_s=limit_s)

    @contextmanager
    def borrow(self) -> Iterator[Reader]:
        """Wait for an idle process and have it for oneself."""
        with self._changed:
            while not self._idle:
                self._changed.wait()
            reader = self._idle.pop()
        started = time.perf_counter()
        try:
            yield reader
        finally:
            with self._changed:
                self.busy_s += time.perf_counter() - started
                self._idle.append(reader)
                self._changed.notify()

    def forget(self, path: str) -> None:
        """Have every process close a slide: the idle ones now, the others when they are asked next."""
        with self._changed:
            for reader in self._readers:
                reader.forget(path)
            idle, self._idle = self._idle, []
        for reader in idle:
            if reader.remembers:
                with suppress(ReaderGone):
                    reader.ask({"do": "forget"}, limit_s=self.limits.reading_s)
        with self._changed:
            self._idle.extend(idle)
            self._changed.notify_all()

    def close(self) -> None:
        """End all processes."""
        for reader in self._readers:
            reader.end()


class IsolatedSlide(Slide):
    """A slide behind a pool of reading processes; made by :func:`open_isolated`."""

    backend: ClassVar[str] = "isolated"

    def __init__(self, path: Path, backend: str, levels: Sequence[Level], pool: ReaderPool):
        super().__init__(path, levels)
        self.backend = backend  # type: ignore[misc]
        self._pool = pool

    def read_inside(self, x: int, y: int, width: int, height: int, level: Level) -> NDArray[np.uint8]:
        size = height * width * 3
        if size > self._pool.limits.max_read_bytes:
            raise ValueError(f"{size:,} bytes in one read, at most {self._pool.limits.max_read_bytes:,}")
        request = {
            "do": "read",
            "path": str(self.path),
            "backend": self.backend,
            "level": [level.size_px, level.downsample, level.number],
            "region": [x, y, width, height],
        }
        with self._pool.borrow() as reader:
            try:
                answer = reader.ask(request, limit_s=self._pool.limits.reading_s)
            except ReaderHung as error:
                raise DecoderHungError(
                    self.name,
                    f"{self.backend} {error} with {width}x{height} pixels at ({x}, {y}) of level {level.number}; "
                    "the file is damaged, or the share it lies on does not answer",
                ) from error
            if "failed" in answer:
                raise ValueError(answer["failed"])
            return np.frombuffer(reader.memory, np.uint8, size).reshape(height, width, 3).copy()

    def close(self) -> None:
        self._pool.forget(str(self.path))


_pool_lock = threading.Lock()
_pool: ReaderPool | None = None


def reader_pool() -> ReaderPool:
    """The pool of this process, made at the first call and ended with the process."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ReaderPool()
            atexit.register(_pool.close)
        return _pool


def open_isolated(
    path: str | Path,
    *,
    assume_mpp: float | None = None,
    overrides: Overrides | None = None,
    backends: Sequence[str] | None = None,
    pool: ReaderPool | None = None,
) -> Slide:
    """Open a slide as :func:`s4mil_monai.slides.reader.open_slide` does, in processes of its own.

    A library that crashes or hangs while it opens the file is passed over like one that cannot read it.

    Args:
        path: A file, or a folder that holds one DICOM slide.
        assume_mpp: µm per level-0 pixel; wins over what the file says.
        overrides: Of the site, per file or scanner; they too win over what the file says.
        backends: Names to try instead, in this order.
        pool: Reading processes; those of this process by default.

    Raises:
        UnreadableSlideError: There is no such file, no backend can read it, or it asks for too much.
        UnknownNameError: A backend of that name does not exist.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise UnreadableSlideError(str(path), "there is no such file")
    if not path.is_file() and not path.is_dir():
        raise UnreadableSlideError(path.name, "neither a file nor a folder (a pipe, socket or device)")
    pool = pool or reader_pool()

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        answer = pool.ask({**request, "path": str(path)}, limit_s=pool.limits.opening_s)
        if "refused" in answer:
            raise getattr(errors, answer["refused"])(path.name, answer["reason"])
        if "failed" in answer:
            raise ValueError(answer["failed"])
        return answer

    def open_with(backend: str) -> Slide:
        found = ask({"do": "open", "backend": backend})
        slide = IsolatedSlide(path, backend, [as_level(level) for level in found["levels"]], pool)
        slide.notes = tuple(found["notes"])
        return slide

    rows = [asdict(row) for row in overrides.rows] if overrides else []
    try:
        slide = choose_backend(path, backends or ask({"do": "backends"})["backends"], open_with)
        found = ask({"do": "resolution", "backend": slide.backend, "assume_mpp": assume_mpp, "overrides": rows})
    except (ReaderGone, ValueError) as error:
        pool.forget(str(path))
        raise UnreadableSlideError(path.name, f"its header cannot be read ({error})") from error
    except errors.SlideError:
        pool.forget(str(path))
        raise
    slide.magnification = found["magnification"]
    slide.resolution = Resolution(*found["resolution"]) if found["resolution"] else None
    slide.notes = tuple(dict.fromkeys((*slide.notes, *found["notes"])))
    return slide


def _shared_memory(size: int) -> int:
    """Descriptor of ``size`` bytes that two processes can map; they cost memory only where they are used."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("s4mil-pixels")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _environment() -> dict[str, str]:
    """One thread a process, no GPU, and this package wherever it was imported from."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **single, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
