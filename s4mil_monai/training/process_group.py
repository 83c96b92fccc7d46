"""Joining the processes of one training, and leaving them so that each ends with its own exit status."""

from __future__ import annotations

import atexit
import gc
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

# Its functions have the group of all processes as a default, taken when it is imported: imported after the group
# was made, as by DistributedDataParallel, it holds the group and its threads until Python is gone
import torch.distributed.nn.functional

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def join_processes() -> None:
    """Become one of the processes that ``torchrun`` started: over NCCL where there are GPUs, else over Gloo."""
    if not dist.is_initialized():
        dist.init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo")


def leave_processes() -> None:
    """Leave them, and see to it that the group's threads are gone before Python takes itself down.

    A thread of Gloo still has the tensors of its last message in hand when that has long arrived, and needs Python
    to put them down. If Python is on its way out by then, it ends the thread, and the thread the process: SIGABRT,
    "terminate called without an active exception", after a training that was complete.
    """
    group = dist.group.WORLD
    dist.destroy_process_group()
    if group is not None:
        atexit.register(_let_go, [group])


def _let_go(held: list[ProcessGroup]) -> None:
    """The network and its engines go first, as cycles of garbage, so that what is held is the last reference:

    only where Python itself drops it, the group waits for its threads without keeping Python from them.
    """
    gc.collect()
    held.clear()
