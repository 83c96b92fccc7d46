"""Which form of the patch batches is used, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from s4mil_monai.errors import UnknownNameError
from s4mil_monai.extras import require
from s4mil_monai.features.patch_batches import PatchBatches, torch_batches


def choose_patch_batches(name: str, device: torch.device | None = None) -> PatchBatches:
    """The form called ``torch`` or ``dali``.

    Args:
        name: Of the form.
        device: Where the encoder runs; DALI prepares patches there if it is a GPU.

    Raises:
        UnknownNameError: No form of that name.
        MissingExtraError: DALI is not installed.
    """
    forms: dict[str, Callable[[], PatchBatches]] = {"torch": lambda: torch_batches, "dali": lambda: _dali(device)}
    if name not in forms:
        raise UnknownNameError("patch stage", name, tuple(forms))
    return forms[name]()


def _dali(device: torch.device | None) -> PatchBatches:
    from s4mil_monai.features.dali_batches import dali_batches

    require("nvidia.dali", extra="dali")
    if device is None or device.type != "cuda":
        return dali_batches
    return partial(dali_batches, device_id=device.index or 0)
