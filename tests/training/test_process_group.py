"""Leaving the processes of a training, each in a Python of its own: what is tested is how it goes down."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
SCRIPT = """
import atexit, pathlib
def threads(): return sorted(p.read_text().strip() for p in pathlib.Path("/proc/self/task").glob("*/comm"))
atexit.register(lambda: print("left:", *(name for name in threads() if "gloo" in name)))
from s4mil_monai.training.process_group import join_processes, leave_processes
def train():
    join_processes()
    join_processes()
    import torch
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2))
    network.cycle = [network]
    network(torch.ones(3, 4)).sum().backward()
    print("in training:", *(name for name in threads() if "gloo" in name))
    leave_processes()
train()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the names of threads are read from /proc")
def test_no_thread_of_the_group_is_left_when_python_goes():
    finished = subprocess.run(
        (sys.executable, "-c", SCRIPT), env={**os.environ, **ALONE}, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    training, left = finished.stdout.splitlines()
    assert "pt_gloo_runloop" in training
    assert left == "left:"
