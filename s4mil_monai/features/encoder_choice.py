"""The runtime ``auto``: measured briefly, the fastest whose features are those of float32 PyTorch, remembered."""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional as F

from s4mil_monai import __version__
from s4mil_monai.errors import S4MilError, first_line
from s4mil_monai.features.encoder_cache import cache_folder
from s4mil_monai.features.encoder_runtime import Embed
from s4mil_monai.whole_file import write_whole

logger = logging.getLogger(__name__)

LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99, "float16": 0.99}
"""Between a patch's features and those of float32 PyTorch, for the worst patch. Half precision is the caller's own
choice; there the gate only keeps out what is broken."""

MEASURED_BATCH = 16
"""Patches a batch that is timed."""

ROUNDS = 3
"""Batches timed a runtime; they take turns, so that a machine whose speed drifts treats them alike."""


class Choice(BaseModel):
    """What was measured, and what came of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: dict[str, str]
    """What the choice depends on."""
    runtime: str
    patches_per_s: dict[str, float] = Field(min_length=1)
    """Of each runtime that could be started."""
    cosine: dict[str, float]
    """Of each runtime's worst patch to float32 PyTorch."""


def choose_runtime(
    starts: Mapping[str, Callable[[], Embed]],
    reference: Embed,
    key: Mapping[str, str],
    *,
    patches: Tensor,
    least_cosine: float,
    folder: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """The remembered choice of a key, or a new one that is remembered.

    Args:
        starts: What starts each candidate, by name; the first is taken when no other one passes.
        reference: float32 PyTorch.
        key: What the choice depends on: see :func:`describe_place`.
        patches: (B, 3, p, p) to measure with.
        least_cosine: What a candidate's worst patch has to reach.
        folder: Where choices are kept; by default under :func:`cache_folder`.
        clock: Gives seconds.
    """
    folder = folder if folder is not None else cache_folder() / "runtimes"
    path = folder / f"{hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:24]}.json"
    remembered = _read_choice(path, key)
    if remembered is not None and remembered.runtime in starts:
        return remembered
    choice = measure_runtimes(starts, reference, key, patches=patches, least_cosine=least_cosine, clock=clock)
    text = choice.model_dump_json(indent=2) + "\n"
    try:
        write_whole(path, text)
    except OSError as error:
        logger.info("%s: the measured runtime is not kept (%s)", path, error)
    return choice


def _read_choice(path: Path, key: Mapping[str, str]) -> Choice | None:
    try:
        choice = Choice.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return choice if choice.key == dict(key) else None


def measure_runtimes(
    starts: Mapping[str, Callable[[], Embed]],
    reference: Embed,
    key: Mapping[str, str],
    *,
    patches: Tensor,
    least_cosine: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Start every candidate, warm it up, time it, and take the fastest whose features are the reference's."""
    wanted = reference(patches)
    embeds: dict[str, Embed] = {}
    cosine: dict[str, float] = {}
    for name, start in starts.items():
        try:
            embeds[name] = start()
            cosine[name] = worst_cosine(embeds[name](patches), wanted)
        except (S4MilError, RuntimeError, OSError) as error:
            embeds.pop(name, None)
            logger.info("encoder runtime %s cannot be used here: %s", name, first_line(error))
    seconds = {name: statistics.median(times) for name, times in _time(embeds, patches, clock).items()}
    sound = [name for name in embeds if cosine[name] >= least_cosine]
    fallback = next(iter(starts))
    runtime = min(sound, key=lambda name: seconds[name], default=fallback)
    speed = {name: round(len(patches) / max(value, 1e-9), 1) for name, value in seconds.items()}
    logger.info("encoder runtime %s, of patches/s %s", runtime, speed, extra={"event": "runtime_chosen"})
    return Choice(key=dict(key), runtime=runtime, patches_per_s=speed, cosine=cosine)


def _time(embeds: Mapping[str, Embed], patches: Tensor, clock: Callable[[], float]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in embeds}
    for _ in range(ROUNDS):
        for name, embed in embeds.items():
            started = clock()
            embed(patches)
            times[name].append(clock() - started)
    return times


def worst_cosine(features: Tensor, wanted: Tensor) -> float:
    """Least cosine between the rows of two (B, width) tables; -1 where one is not finite.

    >>> round(worst_cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])), 4)
    0.7071
    """
    if features.shape != wanted.shape:
        return -1.0
    least = F.cosine_similarity(features.double(), wanted.double()).min().item()
    return least if math.isfinite(least) else -1.0


def textured_patches(side_px: int, *, count: int = MEASURED_BATCH) -> Tensor:
    """(count, 3, side_px, side_px) normalised pictures of coarse and fine structure, the same every time."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.zeros(count, 3, side_px, side_px)
    for grain_px, contrast in ((32, 0.8), (8, 0.6), (1, 0.3)):
        cells = -(-side_px // grain_px)
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        picture += contrast * F.interpolate(noise, size=side_px, mode="bilinear")
    return picture.contiguous()


def describe_place(
    *, fingerprint: str, device: torch.device, processor: str, precision: str, patch_side_px: int
) -> dict[str, str]:
    """What the speed and the features of a runtime depend on; another value of any of it is measured anew."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    return {
        "encoder": fingerprint,
        "patch_side_px": str(patch_side_px),
        "precision": precision,
        "device": f"{device.type}: {place}",
        "threads": str(torch.get_num_threads()),
        "s4mil_monai": __version__,
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime") or _version("onnxruntime-gpu"),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
