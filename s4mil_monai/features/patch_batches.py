"""Batches of normalised patches: the contract, and its plain PyTorch form.

A form takes batches of square RGB regions, ``(n, s, s, 3)`` uint8, as read from the slide, and gives batches
``(n, 3, p, p)`` float32 for the encoder: resampled where ``s != p``, divided by 255, mean and deviation
applied. Resampling is separable and linear, antialiased when shrinking (a triangle as wide as the shrink
factor), with the edge pixel repeated outside: DALI's ``fn.resize(antialias=True)``, so that every form gives
the same numbers, borders included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

RGB = tuple[float, float, float]


class PatchBatches(Protocol):
    """A form of the contract."""

    def __call__(
        self,
        regions: Iterable[NDArray[np.uint8]],
        *,
        patch_side_px: int,
        mean: RGB,
        deviation: RGB,
        batch_size: int,
    ) -> Iterator[Tensor]:
        """Give one (n, 3, patch_side_px, patch_side_px) float32 batch for each (n, s, s, 3) batch of regions.

        Args:
            regions: Batches of at most ``batch_size`` regions, all of one side.
            patch_side_px: Side of the patches that result.
            mean: Of each channel, after division by 255.
            deviation: Of each channel, after division by 255.
            batch_size: Largest batch that will come.
        """
        ...


def torch_batches(
    regions: Iterable[NDArray[np.uint8]], *, patch_side_px: int, mean: RGB, deviation: RGB, batch_size: int
) -> Iterator[Tensor]:
    """The plain PyTorch form; see the module for the contract."""
    scale = 1 / (255 * torch.tensor(deviation)).view(3, 1, 1)
    shift = -(torch.tensor(mean) / torch.tensor(deviation)).view(3, 1, 1)
    for batch in regions:
        patches = torch.from_numpy(batch).permute(0, 3, 1, 2)
        # weights of resampling add up to one: normalising first is the same, and touches fewer pixels
        yield _resample(torch.addcmul(shift, patches, scale), patch_side_px)


def _resample(patches: Tensor, side_px: int) -> Tensor:
    """(n, 3, s, s) → (n, 3, side_px, side_px) by the contract's rule."""
    if patches.shape[2] == side_px:
        return patches
    if patches.shape[2] < side_px:  # nothing to antialias: plain bilinear is the same rule, and faster
        return F.interpolate(patches, size=side_px, mode="bilinear")
    weights = resampling_weights(patches.shape[2], side_px)
    return weights @ patches @ weights.T


@lru_cache(maxsize=16)
def resampling_weights(from_px: int, to_px: int) -> Tensor:
    """(to_px, from_px) matrix that resamples one axis linearly, antialiased, edge pixels repeated.

    >>> resampling_weights(2, 4)
    tensor([[1.0000, 0.0000],
            [0.7500, 0.2500],
            [0.2500, 0.7500],
            [0.0000, 1.0000]])
    """
    shrink = from_px / to_px
    radius = max(1.0, shrink)
    centres = (np.arange(to_px) + 0.5) * shrink - 0.5
    reach = int(np.ceil(radius)) + 1
    taps = np.floor(centres)[:, None] + np.arange(-reach, reach + 1)
    weights = np.clip(1 - np.abs(taps - centres[:, None]) / radius, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((to_px, from_px))
    rows = np.broadcast_to(np.arange(to_px)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, from_px - 1).astype(int)), weights)
    return torch.from_numpy(matrix).float()
