"""S4MIL: the paper's slide model, and the exact share each patch has in its score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.models.bag_model import BagModel, BagOutput, keep_valid
from s4mil_monai.models.s4d import S4D


@dataclass(frozen=True)
class S4MILOutput(BagOutput):
    """What S4MIL gives beyond every bag model."""

    pooled: Tensor | None = None
    """(B, H) maximum of each channel over the patches."""
    winners: Tensor | None = None
    """(B, H) the patch that has it."""


@dataclass(frozen=True)
class Contributions:
    """One slide's logits taken apart: ``logits = bias + contributions.sum(0)``, exactly."""

    patches: Tensor
    """(K,) indices of the patches that won at least one channel, in scan order."""
    contributions: Tensor
    """(K, C) their shares of the logits."""
    bias: Tensor
    """(C,)"""


class S4MIL(BagModel):
    """Linear + ReLU → (LayerNorm → S4D) x layers → maximum over the patches → linear (Fillioux et al., Eq. 6).

    Patch logits are the head applied to single patches: what the slide's logits would be if that patch
    held every maximum.

    Args:
        in_features: D, width of the patch features.
        classes: C.
        width: H, channels inside; 512 in the paper.
        state_dim: N of the S4D; 128 and 32 in the paper's Table 2.
        layers: S4D layers, 1 to 3 in the paper's Table 3.
    """

    def __init__(
        self,
        in_features: int = 1024,
        *,
        classes: int = 2,
        width: int = 512,
        state_dim: int = 32,
        layers: int = 1,
    ):
        super().__init__()
        self.in_features, self.classes = in_features, classes
        self.project = nn.Linear(in_features, width)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(width), S4D(width, state_dim=state_dim)) for _ in range(layers))
        )
        self.head = nn.Linear(width, classes)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> S4MILOutput:
        """Predict; see :class:`BagModel` for shapes.

        Raises:
            ValueError: As :meth:`BagModel.check_bags`.
        """
        self.check_bags(features, mask)
        values = self.blocks(F.relu(self.project(features)))  # (B, L, H)
        pooled, winners = keep_valid(values, mask).max(dim=1)  # (B, H)
        return S4MILOutput(
            logits=self.head(pooled), patch_logits=self.head(values), pooled=pooled, winners=winners
        )

    @torch.no_grad()
    def take_apart(self, output: S4MILOutput, bag: int = 0) -> Contributions:
        """Split one slide's logits among the patches that decided them.

        The logit is linear in the channel maxima and each maximum belongs to one patch:
        ``logit_c = b_c + Σ_d W[c, d] z_d(t*_d)``. Summed in float64.
        """
        assert output.pooled is not None
        assert output.winners is not None
        shares = (self.head.weight.double() * output.pooled[bag].double()).T  # (H, C)
        patches, owner = output.winners[bag].unique(return_inverse=True)
        contributions = shares.new_zeros(len(patches), self.classes).index_add_(0, owner, shares)
        return Contributions(patches, contributions, self.head.bias.double())
