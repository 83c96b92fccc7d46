"""Which form of the patch batches is used, by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from s4mil_monai.errors import UnknownNameError
from s4mil_monai.extras import require
from s4mil_monai.features.patch_batches import PatchBatches, torch_batches

DALI_PAYS_FROM = 1000
"""Patches of a slide from which DALI on a CPU has earned its start of a second, where regions are shrunk: it takes
half the time there. Where they are not, torch is as fast (`benchmarks/pipeline.py preparing`)."""


def choose_patch_batches(
    name: str, device: torch.device | None = None, *, patches: int = 0, shrunk: bool = False
) -> PatchBatches:
    """The form called ``torch`` or ``dali``; ``auto`` is the faster one where DALI is installed.

    Args:
        name: Of the form, or ``auto``.
        device: Where the encoder runs; DALI prepares patches there if it is a GPU.
        patches: How many will come.
        shrunk: Whether regions are larger than the patches made of them.

    Raises:
        UnknownNameError: No form of that name.
        MissingExtraError: DALI is not installed.
    """
    forms: dict[str, Callable[[], PatchBatches]] = {"torch": lambda: torch_batches, "dali": lambda: _dali(device)}
    if name not in (*forms, "auto"):
        raise UnknownNameError("patch stage", name, (*forms, "auto"))
    return forms[resolve_patch_stage(name, device, patches=patches, shrunk=shrunk)]()


def resolve_patch_stage(
    name: str, device: torch.device | None = None, *, patches: int = 0, shrunk: bool = False
) -> str:
    """What ``auto`` stands for: ``dali`` on a GPU or for many regions to shrink, else ``torch``; others stay."""
    if name != "auto":
        return name
    pays = (device is not None and device.type == "cuda") or (shrunk and patches >= DALI_PAYS_FROM)
    return "dali" if pays and importlib.util.find_spec("nvidia.dali") else "torch"


def _dali(device: torch.device | None) -> PatchBatches:
    from s4mil_monai.features.dali_batches import dali_batches

    require("nvidia.dali", extra="dali")
    if device is None or device.type != "cuda":
        return dali_batches
    return partial(dali_batches, device_id=device.index or 0)
