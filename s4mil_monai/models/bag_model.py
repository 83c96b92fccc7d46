"""What every bag model takes and gives, and its form at a MONAI bundle's seam."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BagOutput:
    """Predictions for a batch of bags."""

    logits: Tensor
    """(B, C) of the slides."""
    patch_logits: Tensor | None = None
    """(B, L, P) of the patches, where the model has them; arbitrary at padding."""
    attention: Tensor | None = None
    """(B, L) weights of the patches, where the model has them; 0 at padding."""


class BagModel(nn.Module, ABC):
    """A model that reads bags of patch features.

    Takes ``(B, L, D)`` features and an optional ``(B, L)`` validity mask, true for real patches; padding
    follows the patches and never changes a score.
    """

    in_features: int
    classes: int

    @abstractmethod
    def forward(self, features: Tensor, mask: Tensor | None = None) -> BagOutput:
        """Predict for bags padded to one length."""

    def check_bags(self, features: Tensor, mask: Tensor | None) -> None:
        """Refuse what no bag model can read.

        Raises:
            ValueError: Wrong width or rank, an empty bag, NaN, or a mask that excludes a whole bag.
        """
        if features.ndim != 3 or features.shape[2] != self.in_features:
            raise ValueError(
                f"{type(self).__name__} wants features (B, L, {self.in_features}), got {tuple(features.shape)}"
            )
        if features.shape[1] == 0:
            raise ValueError("an empty bag has no score: got features of length 0")
        if mask is not None and mask.shape != features.shape[:2]:
            raise ValueError(f"wanted a mask {tuple(features.shape[:2])}, got {tuple(mask.shape)}")
        if mask is not None and not bool(mask.any(dim=1).all()):
            raise ValueError("the mask leaves a bag without patches")
        # one pass without a copy: the sum is finite only if all is; in float32, for half precision overflows
        if not bool(torch.isfinite(features.sum(dtype=torch.float32))):
            raise ValueError("features are not finite: NaN or infinity among them; embed the slide again")


class SlideLogits(nn.Module):
    """A bag model at MONAI's seam: channel-first ``(B, D, L)`` features in, ``(B, C)`` slide logits out."""

    def __init__(self, model: BagModel):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.transpose(1, 2)).logits


def keep_valid(values: Tensor, mask: Tensor | None) -> Tensor:
    """Set (B, L, H) values at padding to the lowest number, so that no maximum picks them."""
    if mask is None:
        return values
    return values.masked_fill(~mask.bool().unsqueeze(-1), torch.finfo(values.dtype).min)


def mean_valid(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average (B, L, H) values over the patches that are no padding; (B, H)."""
    if mask is None:
        return values.mean(dim=1)
    valid = mask.bool().unsqueeze(-1)  # (B, L, 1)
    return values.masked_fill(~valid, 0).sum(dim=1) / valid.sum(dim=1)
