"""stream_patches(): the patches of a slide, read and prepared, batch by batch in scan order.

On a GPU, reading and preparing run ahead of the encoder in threads, by a bounded number of batches, so that
memory stays flat whatever the slide's size. On a CPU they take turns with it: the encoder has every core, and a
reader beside it makes each of its layers wait for the core they share, which costs more than it gains.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s4mil_monai.errors import UnreadableSlideError
from s4mil_monai.features.encoder import EncoderSpec
from s4mil_monai.features.patch_stage import choose_patch_batches
from s4mil_monai.features.prepare import PreparedSlide
from s4mil_monai.slides.isolation import count_readers
from s4mil_monai.slides.patches import read_sound_patches

READERS = count_readers()
"""Threads that read; each waits for a reading process, or for a library that lets go of Python's lock."""

BATCHES_AHEAD = 2 * READERS
"""Batches of regions that wait for the encoder at most: memory stays flat whatever the slide's size."""

MAX_DAMAGED_SHARE = 0.05
"""A slide with more damaged patches than this gets no features: too much of it would go unseen."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class PatchBatch:
    """Some patches of one slide, ready for the encoder."""

    prepared: PreparedSlide
    start: int
    """Place of the first in the scan order."""
    patches: Tensor
    """(n, 3, p, p) float32, normalised."""
    sound: NDArray[np.bool_]
    """(n,) whether each could be decoded; the others are white."""

    @property
    def is_last(self) -> bool:
        """Whether no more patches of this slide come."""
        return self.start + len(self.patches) == len(self.prepared.grid)


@dataclass(frozen=True)
class RegionBatch:
    """Some patches of one slide as read from its level."""

    start: int
    """Place of the first in the scan order."""
    regions: NDArray[np.uint8]
    """(n, s, s, 3)."""
    sound: NDArray[np.bool_]
    """(n,)."""


def stream_patches(
    prepared: PreparedSlide,
    spec: EncoderSpec,
    *,
    device: torch.device,
    patch_stage: str,
    batch_size: int,
    read: Iterator[RegionBatch] | None = None,
) -> Iterator[PatchBatch]:
    """Read and prepare the patches of one slide for an encoder.

    Args:
        prepared: An open slide with its grid.
        spec: Of the encoder: mean and deviation.
        device: Where it runs.
        patch_stage: Form of the patch batches: ``torch``, ``dali`` or ``auto``.
        batch_size: Patches in a batch.
        read: Their regions in scan order, where somebody else reads them; by default they are read here.

    Raises:
        UnreadableSlideError: Too many patches cannot be decoded.
        DecoderHungError: A library did not come back.
        UnknownNameError: No such patch stage.
    """
    grid = prepared.grid
    if read is None:
        read = (read_in_turns if device.type == "cpu" else read_ahead)(prepared, batch_size=batch_size)
    in_work: deque[RegionBatch] = deque()

    def regions() -> Iterator[NDArray[np.uint8]]:
        unreadable = 0
        for batch in read:
            unreadable += int((~batch.sound).sum())
            check_damage(prepared, unreadable)
            in_work.append(batch)
            yield batch.regions

    timed_regions = _Timed(regions())
    tensors = _Timed(
        choose_patch_batches(patch_stage, device, patches=len(grid), shrunk=grid.plan.is_shrunk)(
            timed_regions,
            patch_side_px=grid.plan.patch_side_px,
            mean=spec.mean,
            deviation=spec.deviation,
            batch_size=batch_size,
        )
    )
    known = 0.0
    for tensor in tensors:
        seconds = tensors.seconds - timed_regions.seconds
        prepared.stages.add("preparing", seconds - known)
        known = seconds
        batch = in_work.popleft()
        yield PatchBatch(prepared, batch.start, tensor, batch.sound)


def check_damage(prepared: PreparedSlide, damaged: int) -> None:
    """Give a slide up when more of its patches are damaged than can be left out.

    Raises:
        UnreadableSlideError: With the numbers.
    """
    patches = len(prepared.grid)
    if damaged > MAX_DAMAGED_SHARE * patches:
        raise UnreadableSlideError(
            prepared.slide.name,
            f"{damaged} of {patches} patches are damaged, at most {MAX_DAMAGED_SHARE:.0%} can be left out: they "
            "do not decode, or differ from the coarser levels; copy the file again or scan the slide again",
        )


def read_ahead(prepared: PreparedSlide, *, batch_size: int) -> Iterator[RegionBatch]:
    """Give the regions of a slide in scan order; a bounded number of batches is read while others are in use."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        starts = iter(range(0, len(prepared.grid), batch_size))

        def submit(count: int) -> list[Future[RegionBatch]]:
            return [pool.submit(_read_batch, prepared, start, batch_size) for start in islice(starts, count)]

        ahead = deque(submit(BATCHES_AHEAD))
        try:
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(submit(1))
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_in_turns(prepared: PreparedSlide, *, batch_size: int) -> Iterator[RegionBatch]:
    """Give the same batches, some read by all threads at once, then none while those are in use."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        starts = iter(range(0, len(prepared.grid), batch_size))
        while group := list(islice(starts, BATCHES_AHEAD)):
            yield from list(pool.map(lambda start: _read_batch(prepared, start, batch_size), group))


def _read_batch(prepared: PreparedSlide, start: int, batch_size: int) -> RegionBatch:
    grid = prepared.grid
    corners = [(x, y) for x, y in grid.top_left_px0[start : start + batch_size].tolist()]
    with prepared.stages.timed("reading"):
        regions, sound = read_sound_patches(
            prepared.slide, corners, side_px=grid.plan.read_side_px, level=grid.plan.level
        )
    return RegionBatch(start, regions, sound)


def ahead(items: Iterator[Item], *, depth: int = 1) -> Iterator[Item]:
    """Give the same items, up to ``depth`` of them made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[Item | _End]] = deque(pool.submit(_next, items) for _ in range(depth))
        try:
            while not isinstance(item := waiting.popleft().result(), _End):
                waiting.append(pool.submit(_next, items))
                yield item
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(items, Generator):
                items.close()


class _End:
    """No more items; None could be one."""


def _next(items: Iterator[Item]) -> Item | _End:
    torch.set_num_threads(1)  # of this thread alone: the encoder keeps its cores
    return next(items, _End())


class _Timed(Iterator[Item]):
    """The same items, counting the seconds it took to get them."""

    def __init__(self, items: Iterator[Item]):
        self._items = items
        self.seconds = 0.0

    def __next__(self) -> Item:
        started = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - started
