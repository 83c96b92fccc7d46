"""A process that scores nothing and writes real files, slowly enough to be killed while it does."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from s4mil_monai.batch.local_executor import LocalExecutor, _ScoringProcess
from s4mil_monai.batch.scoring_process import _die_with, _receive, run_pipeline
from s4mil_monai.batch.site import Site
from s4mil_monai.batch.slide_worker import _hash_all, describe_failure
from s4mil_monai.batch.work import Failed, Scored, Work
from s4mil_monai.whole_file import sync_tree

MEMORY_GROUP, ONLY_ONCE = "TEST_MEMORY_GROUP", "TEST_ONLY_ONCE"
"""In the environment: a control group to score in; a file that, once it is there, lets no process start."""
STEP_S = 0.01
"""How long each of the three steps takes, besides writing."""


@dataclass
class LightSlide:
    """A file that was read; only its work is looked at by the pipeline."""

    work: Work
    content: bytes


class LightWorker:
    """The steps of :class:`SlideWorker`, without a model: the result is the slide's own bytes."""

    def prepare(self, work: Work) -> LightSlide | Failed:
        """Read the file."""
        try:
            shutil.rmtree(work.part, ignore_errors=True)
            work.part.mkdir(parents=True)
            content = work.path.read_bytes()
            time.sleep(STEP_S)
            return LightSlide(work, content)
        except OSError as error:
            return describe_failure(work, error)

    def embed(self, slide: LightSlide) -> LightSlide | Failed:
        """Obey a slide that says what is to happen to the process."""
        if slide.content.startswith(b"kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if slide.content.startswith(b"stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if slide.content.startswith(b"much"):
            return LightSlide(slide.work, b"1" * (1 << 30))
        time.sleep(0.5 if slide.content.startswith(b"slow") else STEP_S)
        return slide

    def write(self, slide: LightSlide) -> Scored | Failed:
        """Write some files piece by piece, one in a folder."""
        work = slide.work
        try:
            (work.part / "fhir").mkdir()
            for name in ("result.json", "features.h5", "fhir/report.json"):
                with (work.part / name).open("wb") as file:
                    for start in range(0, len(slide.content), 4096):
                        file.write(slide.content[start : start + 4096])
            time.sleep(STEP_S)
            sync_tree(work.part)
            summary = {"status": "scored", "decision": "negative", "seconds": {"total": 0.1}}
            return Scored(work.lease, _hash_all(work.part), summary, {"slide": {"sha256": work.slide}}, {"n": 1})
        except OSError as error:
            return describe_failure(work, error)


def serve_light(channel: Connection, scheduler: int) -> None:
    """As :func:`s4mil_monai.batch.scoring_process.serve`."""
    _die_with(scheduler)
    if MEMORY_GROUP in os.environ:
        Path(os.environ[MEMORY_GROUP], "cgroup.procs").write_text(str(os.getpid()))
    if os.environ.get(ONLY_ONCE) and Path(os.environ[ONLY_ONCE]).exists():
        os._exit(1)
    channel.send(None)
    run_pipeline(_receive(channel), LightWorker(), channel.send)  # type: ignore[arg-type]


class LightExecutor(LocalExecutor):
    """The executor of this machine, with processes that are forked and hold no model."""

    def __init__(self, site: Site):
        super().__init__(site.worker_settings(), workers=0)
        self._processes = [_LightProcess(self._settings) for _ in range(site.settings.workers)]


class _LightProcess(_ScoringProcess):
    def begin(self) -> None:
        self._is_ready = False
        ours, theirs = get_context("fork").Pipe()
        self._process = get_context("fork").Process(target=serve_light, args=(theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()
        self.channel = ours
