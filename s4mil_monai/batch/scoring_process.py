"""A process that holds a model and scores what it is sent; the scheduler outlives it.

Three slides are in it at once: one is being prepared, one embedded, one written. Whatever kills it, a decoder, the
kernel for want of memory, a driver, costs these tries and not the run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from s4mil_monai.batch.logs import going_by, set_up_logs
from s4mil_monai.batch.printable import printable
from s4mil_monai.batch.work import Began, Event, Failed, Work, WorkerSettings
from s4mil_monai.errors import S4MilError

if TYPE_CHECKING:
    from s4mil_monai.batch.slide_worker import Opened, SlideWorker

PR_SET_PDEATHSIG = 1


def serve(channel: Connection, settings: WorkerSettings, scheduler: int) -> None:
    """Load the model, say so, then score until None comes or the scheduler is gone.

    Args:
        channel: Brings :class:`Work` and takes events; the first is None when the model is loaded, or the error.
        settings: Of the model.
        scheduler: Process that started this one.
    """
    _die_with(scheduler)
    set_up_logs()
    from s4mil_monai.allocator import keep_large_buffers
    from s4mil_monai.slides.isolation import reader_pool

    keep_large_buffers()
    reader_pool().warm_up()  # its processes start while this one imports torch
    try:
        from s4mil_monai.batch.slide_worker import SlideWorker

        worker = SlideWorker(settings)
    except S4MilError as error:
        channel.send(error)
        return
    channel.send(None)
    sending = threading.Lock()

    def tell(event: Event) -> None:
        with sending:
            channel.send(event)

    run_pipeline(_receive(channel), worker, tell)


def run_pipeline(works: Iterator[Work], worker: SlideWorker, tell: Callable[[Event], None]) -> None:
    """Score slides one after the other: the next is prepared, and the last written, while one is embedded."""
    from s4mil_monai.features.patch_stream import ahead

    def prepare() -> Iterator[Opened | Failed]:
        for work in works:
            tell(Began(work.lease))
            with named(work):
                opened = worker.prepare(work)
            yield opened

    with ThreadPoolExecutor(1, thread_name_prefix="write") as writing:
        for opened in ahead(prepare()):
            if not isinstance(opened, Failed):
                with named(opened.work):
                    opened = worker.embed(opened)
            if isinstance(opened, Failed):
                tell(opened)
            else:
                writing.submit(_write, opened, worker, tell)


def named(work: Work) -> AbstractContextManager[None]:
    """While a slide is in a step, no log says its name."""
    names = (str(work.path), work.path.name)
    return going_by(work.slide[:12], *names, *map(printable, names))  # as libraries quote names that are no UTF-8


def _write(opened: Opened, worker: SlideWorker, tell: Callable[[Event], None]) -> None:
    from s4mil_monai.batch.slide_worker import describe_failure

    with named(opened.work):
        try:
            tell(worker.write(opened))
        except Exception as error:  # unheard of, the slide would be taken for one that never ends
            tell(describe_failure(opened.work, error))


def _receive(channel: Connection) -> Iterator[Work]:
    try:
        while (work := channel.recv()) is not None:
            yield work
    except EOFError:
        return


def _die_with(scheduler: int) -> None:
    """Be killed when the scheduler ends, however it ends: another will start a process for the same GPU."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != scheduler:
        os._exit(1)
