"""Schedulers that are forked from a process that has imported everything: one costs hundredths of a second.

Started as ``python -m tests.batch.fork_server``; takes orders as lines of JSON and answers each with one.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class ForkServer:
    """Starts schedulers, each the leader of its own process group."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.batch.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, file: Path, log: Path, **order: Any) -> Forked:
        """Start one pass over a site, as `s4mil batch run` does."""
        return self.fork("tests.batch.fork_server:run_pass", log, file=str(file), **order)

    def fork(self, function: str, log: Path, **arguments: Any) -> Forked:
        """Call ``module:function``, which gives an exit code, in a process of its own."""
        log.unlink(missing_ok=True)
        return Forked(self, self.ask(do="fork", function=function, log=str(log), arguments=arguments), log)

    def ask(self, **order: Any) -> Any:
        """Send an order and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=300)


class Forked:
    """A scheduler in its own process."""

    def __init__(self, server: ForkServer, pid: int, log: Path):
        self._server, self.pid, self._log = server, pid, log

    def wait(self) -> int:
        """Its exit code; negative for a signal. Nothing of its group is left after."""
        return self._server.ask(do="wait", pid=self.pid)

    def kill(self, number: int = signal.SIGKILL, *, group: bool = True) -> None:
        """Send it a signal, and by default to all it has started."""
        (os.killpg if group else os.kill)(self.pid, number)

    @property
    def said(self) -> str:
        """What it has printed."""
        return self._log.read_text() if self._log.exists() else ""


def main() -> None:
    """Answer orders until there are no more."""
    _import_all()
    for line in sys.stdin:
        order = json.loads(line)
        answer = _fork(order) if order["do"] == "fork" else _reap(order["pid"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _import_all() -> None:
    """Before the fork, not after each."""
    from s4mil_monai.batch import passes  # noqa: F401
    from s4mil_monai.batch.database import Database
    from s4mil_monai.features import patch_stream  # noqa: F401
    from tests.batch import light_worker  # noqa: F401

    Database("sqlite://").close()  # imports the migrations
    gc.freeze()  # children share what nobody counts


def _fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    os.setpgid(pid, pid or os.getpid())  # whichever of both is first
    if pid:
        return pid
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 70
    try:
        module, _, name = order["function"].partition(":")
        code = getattr(import_module(module), name)(**order["arguments"])
    except BaseException:  # noqa: BLE001 — whatever it is, the tests shall read it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_pass(
    file: str,
    kill: dict[str, Any] | None = None,
    tombstone: str = "",
    every_s: float | None = None,
    **environment: str,
) -> int:
    """As `s4mil batch run`, with light processes instead of those that hold a model."""
    from s4mil_monai.batch.logs import set_up_logs
    from s4mil_monai.batch.passes import run_passes
    from s4mil_monai.cli.console import complain, say
    from s4mil_monai.errors import S4MilError
    from tests.batch.kill_point import KillPoint, arm
    from tests.batch.light_worker import LightExecutor

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    set_up_logs()
    os.environ.update(environment)
    if kill is not None:
        arm(KillPoint(**kill), tombstone)
    code, settings = 0, Path(file)
    try:
        for done in run_passes(
            settings, stop=stop, every_s=every_s, default_bundle=lambda: settings, make_executor=LightExecutor
        ):
            code = done.exit_code
            say(done.line)
    except S4MilError as error:
        complain(str(error))
        code = 1
    return code


def _reap(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
