"""S4MIL: the paper's slide model, and the exact share each patch has in its score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.models.bag_model import BagModel, BagOutput, keep_valid
from s4mil_monai.models.fast_linear import fast_linear
from s4mil_monai.models.s4d import S4D, Discretization, convolve_blocks

SEGMENT = 8192
"""Patches read at once when no gradients are wanted: a multiple of the S4D's block, and a bound on memory."""


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

    Patch logits are the head applied to single patches: what the slide's logits would be if that patch held
    every maximum. In the multitask form (``patch_classes``) they come from a linear layer of their own on each
    patch before the maximum, trained with patch labels (Eq. 7).

    Args:
        in_features: D, width of the patch features.
        classes: C.
        width: H, channels inside; 512 in the paper.
        state_dim: N of the S4D; 128 and 32 in the paper's Table 2.
        layers: S4D layers, 1 to 3 in the paper's Table 3.
        patch_classes: P of the multitask form; None for the slide model.
        discretization: ``zoh`` as the authors' released code, or ``bilinear`` as the paper's text.
    """

    def __init__(
        self,
        in_features: int = 1024,
        *,
        classes: int = 2,
        width: int = 512,
        state_dim: int = 32,
        layers: int = 1,
        patch_classes: int | None = None,
        discretization: Discretization = "zoh",
    ):
        super().__init__()
        self.in_features, self.classes = in_features, classes
        self.project = nn.Linear(in_features, width)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.LayerNorm(width), S4D(width, state_dim=state_dim, discretization=discretization))
                for _ in range(layers)
            )
        )
        self.head = nn.Linear(width, classes)
        self.patch_head = None if patch_classes is None else nn.Linear(width, patch_classes)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> S4MILOutput:
        """Predict; see :class:`BagModel` for shapes.

        Raises:
            ValueError: As :meth:`BagModel.check_bags`.
        """
        self.check_bags(features, mask)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return self._read_whole(features, mask)
        return self._read_in_segments(features, mask)

    def layers(self) -> list[tuple[nn.LayerNorm, S4D]]:
        """The S4D layers, each with the norm before it."""
        return [(block[0], block[1]) for block in self.blocks.children()]  # type: ignore[index]

    def _read_whole(self, features: Tensor, mask: Tensor | None) -> S4MILOutput:
        """All at once, as gradients need it."""
        values = self.blocks(F.relu(fast_linear(self.project, features)))  # (B, L, H)
        pooled, winners = keep_valid(values, mask).max(dim=1)  # (B, H)
        return S4MILOutput(
            logits=self.head(pooled), patch_logits=self._read_patches(values), pooled=pooled, winners=winners
        )

    def _read_in_segments(self, features: Tensor, mask: Tensor | None) -> S4MILOutput:
        """Segment by segment, carrying the state of each layer and the maxima: same numbers, little memory."""
        layers = [(norm, s4d, s4d.block_constants()) for norm, s4d in self.layers()]
        states: list[Tensor | None] = [None] * len(layers)
        maxima, patch_logits = None, []
        for start in range(0, features.shape[1], SEGMENT):
            part = slice(start, start + SEGMENT)
            values = fast_linear(self.project, features[:, part]).relu_()
            for i, (norm, s4d, constants) in enumerate(layers):
                convolved, states[i] = convolve_blocks(norm(values), constants, states[i])
                values = s4d.mix_channels(convolved)
            patch_logits.append(self._read_patches(values))
            maxima = _keep_larger(maxima, keep_valid(values, None if mask is None else mask[:, part]), start)
        assert maxima is not None
        pooled, winners = maxima
        return S4MILOutput(
            logits=self.head(pooled), patch_logits=torch.cat(patch_logits, 1), pooled=pooled, winners=winners
        )

    def _read_patches(self, values: Tensor) -> Tensor:
        return (self.head if self.patch_head is None else self.patch_head)(values)

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


def _keep_larger(maxima: tuple[Tensor, Tensor] | None, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Running (maximum, patch that has it), each (B, H), after a segment of values (B, S, H)."""
    found = values.amax(1)
    if maxima is None:
        return found, values.argmax(1)
    pooled, winners = maxima
    bag, channel = (found > pooled).nonzero(as_tuple=True)
    if len(bag) == 0:
        return maxima
    # few channels find a new maximum once some segments are read: look for its place only there
    place = values[bag, :, channel].argmax(1) + start
    return torch.maximum(found, pooled), winners.index_put((bag, channel), place)


def authors_names() -> dict[str, str]:
    """Our parameter names → those of ``S4Model`` in the authors' released code, which has one layer."""
    ours_of_kernel = ("log_dt", "log_A_real", "A_imag", "C")
    return {
        "project.weight": "fc1.0.weight",
        "project.bias": "fc1.0.bias",
        "blocks.0.0.weight": "s4_block.0.weight",
        "blocks.0.0.bias": "s4_block.0.bias",
        **{f"blocks.0.1.{name}": f"s4_block.1.kernel.{name}" for name in ours_of_kernel},
        "blocks.0.1.D": "s4_block.1.D",
        "blocks.0.1.mix.weight": "s4_block.1.output_linear.0.weight",  # a convolution of width 1 there
        "blocks.0.1.mix.bias": "s4_block.1.output_linear.0.bias",
        "head.weight": "fc2.weight",
        "head.bias": "fc2.bias",
    }
