"""Which process of which machine something belongs to, and whether that process is gone."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any


def describe_me() -> str:
    """This process, as JSON; :func:`has_ended` takes what it says."""
    pid = os.getpid()
    return json.dumps({"machine": name_machine(), "pid": pid, "started": started_at(pid)})


def name_machine() -> str:
    """The machine, and where Linux says so the space of process numbers: containers may share a host's name."""
    name = socket.gethostname().replace("/", "-")
    with suppress(OSError):
        return f"{name}-{os.stat('/proc/self/ns/pid').st_ino}"
    return name


def has_ended(facts: dict[str, Any]) -> bool:
    """Whether the process of this machine that wrote these facts is gone, or another has its number now."""
    pid, started = facts.get("pid"), facts.get("started")
    if not isinstance(pid, int):
        return False
    now = started_at(pid)
    return now is None or bool(now and started and now != started)


def process_is_gone(pid: int) -> bool:
    """Whether no process of this machine has the number."""
    if pid <= 0:  # for the kernel, groups of processes
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OverflowError:
        return True
    except PermissionError:
        return False
    return False


def started_at(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; tells it from a later one with the same number.

    None for a process that is gone; empty where the system does not tell.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None if process_is_gone(pid) else ""
    return stat.rpartition(")")[2].split()[19]
