"""extract_features(): the patches of one slide in, one FeatureBag out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s4mil_monai import __version__
from s4mil_monai.features.encoder import Encoder
from s4mil_monai.features.patch_stage import choose_patch_batches
from s4mil_monai.features.store import FeatureBag, FeatureOrigin
from s4mil_monai.result import PatchSettings
from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.grid import PatchGrid, lay_grid
from s4mil_monai.slides.patches import read_patches
from s4mil_monai.slides.resolution import plan_reading
from s4mil_monai.slides.slide import Slide
from s4mil_monai.slides.tissue import find_tissue
from s4mil_monai.timing import timed

READERS = 2
"""Threads that read ahead; the backends decode without holding Python's lock."""

BATCHES_AHEAD = 4
"""Batches that wait for the encoder at most: memory stays flat whatever the slide's size."""

Progress = Callable[[int, int], None]
"""Called with patches done and patches in all."""


def extract_features(
    slide: Slide,
    encoder: Encoder,
    settings: PatchSettings,
    *,
    patch_stage: str = "torch",
    batch_size: int = 16,
    progress: Progress | None = None,
    seconds: dict[str, float] | None = None,
) -> FeatureBag:
    """Find tissue, lay the grid, and embed every patch of one slide.

    Args:
        slide: An open slide.
        encoder: What turns a patch into features.
        settings: Which patches.
        patch_stage: Form of the patch batches, ``torch`` or ``dali``.
        batch_size: Patches a step.
        progress: Told after each batch.
        seconds: Receives ``tissue``, ``encoding`` and ``waiting_for_pixels``.

    Raises:
        UnknownResolutionError: The slide does not know its resolution.
        TooCoarseError: It is too coarse for ``settings.mpp``.
        NoTissueError: There is no tissue on it.
        UnreadableSlideError: A patch cannot be decoded.
        UnknownNameError: No such patch stage or scan order.
    """
    seconds = {} if seconds is None else seconds
    plan = plan_reading(slide, mpp=settings.mpp, patch_side_px=settings.side_px)
    with ThreadPoolExecutor(1) as background:
        fingerprint = background.submit(fingerprint_slide, slide.path)
        with timed(seconds, "tissue"):
            tissue = find_tissue(slide)
            grid = lay_grid(tissue, plan, min_tissue=settings.min_tissue, scan_order=settings.scan_order)
        features = encode_patches(
            slide,
            grid,
            encoder,
            patch_stage=patch_stage,
            batch_size=batch_size,
            progress=progress,
            seconds=seconds,
        )
        sha256 = fingerprint.result()
    assert slide.resolution is not None
    origin = FeatureOrigin(
        slide=slide.name,
        slide_sha256=sha256,
        slide_mpp=slide.mpp,
        slide_mpp_source=slide.resolution.source,
        backend=slide.backend,
        encoder=encoder.spec.name,
        encoder_sha256=encoder.fingerprint,
        patch_mpp=plan.mpp,
        patch_side_px=plan.patch_side_px,
        patch_side_px0=plan.side_px0,
        patch_note=plan.note or "",
        min_tissue=settings.min_tissue,
        scan_order=grid.scan_order,
        patch_stage=patch_stage,
        software=f"s4mil_monai {__version__}",
    )
    return FeatureBag(features, grid.top_left_px0, origin)


def encode_patches(
    slide: Slide,
    grid: PatchGrid,
    encoder: Encoder,
    *,
    patch_stage: str,
    batch_size: int,
    progress: Progress | None,
    seconds: dict[str, float],
) -> NDArray[np.float32]:
    """(n, width) features of a grid's patches; a GPU encodes while others are read, a CPU takes turns."""
    spec = encoder.spec
    # On a CPU the encoder has every core. A reader beside it makes each of its layers wait for the core they
    # share, which costs more than taking turns.
    overlap = encoder.device.type != "cpu"
    read = read_ahead if overlap else read_in_turns
    batches = choose_patch_batches(patch_stage, encoder.device)(
        read(slide, grid, batch_size=batch_size),
        patch_side_px=grid.plan.patch_side_px,
        mean=spec.mean,
        deviation=spec.deviation,
        batch_size=batch_size,
    )
    if overlap:
        batches = prepare_ahead(batches)
    features = np.empty((len(grid), spec.width), np.float32)
    done = 0
    while True:
        with timed(seconds, "waiting_for_pixels"):
            batch = next(batches, None)
        if batch is None:
            return features
        with timed(seconds, "encoding"):
            features[done : done + len(batch)] = encoder.encode(batch).numpy()
        done += len(batch)
        if progress is not None:
            progress(done, len(grid))


def prepare_ahead(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Give the same batches, each prepared in a thread while the one before is encoded."""

    def prepare() -> Tensor | None:
        torch.set_num_threads(1)  # of this thread alone: the encoder keeps its cores
        return next(batches, None)

    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        waiting = pool.submit(prepare)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(prepare)
            yield batch


def read_ahead(slide: Slide, grid: PatchGrid, *, batch_size: int) -> Iterator[NDArray[np.uint8]]:
    """Give (n, s, s, 3) batches of regions in scan order; a bounded number is read while others are in use."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        starts = iter(range(0, len(grid), batch_size))
        ahead: deque[Future[NDArray[np.uint8]]] = deque(
            pool.submit(_read_batch, slide, grid, start, batch_size) for start in islice(starts, BATCHES_AHEAD)
        )
        try:
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(
                    pool.submit(_read_batch, slide, grid, start, batch_size) for start in islice(starts, 1)
                )
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_in_turns(slide: Slide, grid: PatchGrid, *, batch_size: int) -> Iterator[NDArray[np.uint8]]:
    """Give the same batches, some read by all threads at once, then none while those are in use."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        starts = iter(range(0, len(grid), batch_size))
        while group := list(islice(starts, BATCHES_AHEAD)):
            yield from list(pool.map(lambda start: _read_batch(slide, grid, start, batch_size), group))


def _read_batch(slide: Slide, grid: PatchGrid, start: int, batch_size: int) -> NDArray[np.uint8]:
    corners = [(x, y) for x, y in grid.top_left_px0[start : start + batch_size].tolist()]
    return read_patches(slide, corners, side_px=grid.plan.read_side_px, level=grid.plan.level)
