"""Joining a Ray cluster, or starting one on this machine, and how many actors of which kind it has room for."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from s4mil_monai.errors import ClusterError, first_line
from s4mil_monai.extras import require

REACHED_WITHIN_S = 5.0
"""A cluster that does not take a connection within this time is not there. Ray itself tries for minutes, and ends
the process in the end."""

HERE = "this machine"

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}
"""For Ray, where the environment does not say otherwise: it tells nobody that it runs, prints nothing of machines
that died (we log what was lost with them), and no actor without a GPU sees one."""


@dataclass(frozen=True)
class Plan:
    """How many actors there are to be, and what each takes."""

    embedding: int
    reading: int
    on_gpus: bool
    """Whether each embedding actor has a GPU; else it has as much of a CPU as a reading one."""
    cpu_share: float
    """CPUs of an actor: one, or half of one where a machine has no other."""


def plan_actors(nodes: Sequence[Mapping[str, float]], *, workers: int, readers: int, device: str) -> Plan:
    """Divide the machines that are there among the actors that are wanted.

    Args:
        nodes: Resources of each living machine, as Ray counts them.
        workers: Embedding actors wanted.
        readers: Reading actors wanted.
        device: ``cpu``, ``cuda``, or ``auto``: GPUs where there are any.

    >>> plan_actors([{"CPU": 8, "GPU": 2}, {"CPU": 4}], workers=4, readers=12, device="auto")
    Plan(embedding=2, reading=12, on_gpus=True, cpu_share=1.0)
    >>> plan_actors([{"CPU": 1}], workers=1, readers=3, device="auto")
    Plan(embedding=1, reading=1, on_gpus=False, cpu_share=0.5)
    """
    cpus = [node["CPU"] for node in nodes if node.get("CPU", 0) > 0]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    share = 1.0 if min(cpus, default=1) >= 2 else 0.5
    places = sum(int(found / share) for found in cpus)
    on_gpus = device.startswith("cuda") or (device != "cpu" and gpus > 0)
    embedding = min(workers, gpus) if on_gpus else max(0, min(workers, places - 1))
    return Plan(embedding, min(readers, places if on_gpus else places - embedding), on_gpus, share)


class Cluster:
    """The connection of this process to a cluster; ended with it, if it was started here."""

    def __init__(self, address: str | None):
        """Connect, or start one on this machine where there is no address.

        Raises:
            ClusterError: It cannot be reached.
            MissingExtraError: Ray is not installed.
        """
        check_address(address)
        self._ray = import_ray()
        self._folder: str | None = None
        try:
            with _signals_kept():
                self._init(address)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            self.leave()
            reason = f"is no Ray cluster that can be joined ({first_line(error)})"
            raise ClusterError(address or HERE, reason) from error
        except SystemExit as error:  # what Ray makes of SIGTERM meanwhile
            self.leave()
            raise ClusterError(address or HERE, "was still to be joined when the run was ended") from error

    def _init(self, address: str | None) -> None:
        if address is not None:
            self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            return
        _choose_token()
        # short: paths of sockets lie in it, which have 107 characters at most
        self._folder = tempfile.mkdtemp(prefix="s4mil-ray-", dir=os.environ.get("RAY_TMPDIR"))
        self._ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=self._folder,
            _node_ip_address="127.0.0.1",  # nobody else is to reach it
        )

    def nodes(self) -> list[dict[str, float]]:
        """Resources of each living machine."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def leave(self) -> None:
        """Let go of the cluster; one that was started here ends, and nothing is left of it."""
        with _signals_kept():
            self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def make_actor(self, kind: type, plan: Plan, *, on_gpu: bool, threads: int, arguments: tuple) -> Any:
        """Handle of a new actor, which starts when there is room for it.

        It is not started again by Ray: whoever gave it work has to know that it is gone.
        """
        actor = self._ray.remote(kind).options(
            num_cpus=0 if on_gpu else plan.cpu_share,
            num_gpus=1 if on_gpu else 0,
            max_concurrency=threads,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        return actor.remote(*arguments)


def check_address(address: str | None) -> None:
    """Refuse a cluster that does not answer, within seconds and before Ray is asked.

    Args:
        address: ``host:port``, ``ray://host:port``; nothing is said of ``auto`` and None.

    Raises:
        ClusterError: Nobody answers there, or it is no address.
        MissingExtraError: Ray is not installed.
    """
    import_ray()
    if address is None or address == "auto":
        return
    found = re.fullmatch(r"(?:ray://)?(?P<host>[^\s/]+):(?P<port>\d{1,5})", address)
    if found is None:
        raise ClusterError(address, "is no address of a Ray cluster; write host:6379, ray://host:10001 or auto")
    try:
        answers = _speaks_grpc(found["host"].strip("[]"), int(found["port"]))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClusterError(address, f"nobody answers there ({reason}); does `ray status` on its head?") from error
    if not answers:
        raise ClusterError(address, "what answers there is no Ray cluster; is it the right port?")


def _speaks_grpc(host: str, port: int) -> bool:
    """Whether a server greets as gRPC does, which all of Ray is served by: with the settings of HTTP/2 (RFC 9113).

    Ray itself would ask a server of another kind for minutes.
    """
    with socket.create_connection((host, port), REACHED_WITHIN_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return True  # it waits for a handshake first
        connection.settimeout(REACHED_WITHIN_S)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        answer = connection.recv(9, socket.MSG_WAITALL)  # length in three bytes, then the kind of frame
        return answer[3:4] == b"\4"


def import_ray() -> Any:
    """The library, which reads :data:`QUIET` as it is imported.

    Raises:
        MissingExtraError: It is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    return require("ray", extra="ray")


def _choose_token() -> None:
    """A secret for the cluster that is started here; Ray would write one into the user's home."""
    named = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(name in os.environ for name in named):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM over; it is the scheduler's, which hands back what is in work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
