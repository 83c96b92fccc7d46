"""The contract of :mod:`s4mil_monai.features.patch_batches` on DALI, on a GPU or the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s4mil_monai.extras import require
from s4mil_monai.features.patch_batches import RGB


def dali_batches(
    regions: Iterable[NDArray[np.uint8]],
    *,
    patch_side_px: int,
    mean: RGB,
    deviation: RGB,
    batch_size: int,
    device_id: int | None = None,
    threads: int = 2,
) -> Iterator[Tensor]:
    """The DALI form: ``external_source`` → ``resize`` → ``crop_mirror_normalize``.

    Args:
        regions: As in the contract.
        patch_side_px: As in the contract.
        mean: As in the contract.
        deviation: As in the contract.
        batch_size: As in the contract.
        device_id: A CUDA device, or None to run on the CPU.
        threads: CPU threads of the pipeline.
    """
    waiting = iter(regions)
    first = next(waiting, None)
    if first is None:
        return
    pipeline = _build(
        resize=first.shape[1] != patch_side_px,
        patch_side_px=patch_side_px,
        mean=mean,
        deviation=deviation,
        batch_size=batch_size,
        device_id=device_id,
        threads=threads,
    )
    for batch in chain((first,), waiting):
        pipeline.feed_input("regions", batch)
        (patches,) = pipeline.run()
        yield _as_torch(patches)


def _build(
    *,
    resize: bool,
    patch_side_px: int,
    mean: RGB,
    deviation: RGB,
    batch_size: int,
    device_id: int | None,
    threads: int,
) -> Any:
    dali = require("nvidia.dali", extra="dali")
    fn = require("nvidia.dali.fn", extra="dali")
    types = dali.types

    # One batch in, one batch out: reading ahead is done by whoever feeds the regions.
    pipeline = dali.Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=1,
        exec_dynamic=False,
    )
    with pipeline:
        patches = fn.external_source(name="regions", layout="HWC", dtype=types.UINT8)
        if device_id is not None:
            patches = patches.gpu()
        if resize:
            patches = fn.resize(
                patches,
                size=[patch_side_px, patch_side_px],
                interp_type=types.INTERP_LINEAR,
                antialias=True,
                dtype=types.FLOAT,
            )
        patches = fn.crop_mirror_normalize(
            patches,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in mean],
            std=[255 * value for value in deviation],
        )
        pipeline.set_outputs(patches)
    pipeline.build()
    return pipeline


def _as_torch(patches: Any) -> Tensor:
    """Copy out of DALI's buffer, which the next run overwrites."""
    tensor = patches.as_tensor()
    return torch.from_dlpack(tensor).clone()
