"""What training minimises."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH_WEIGHT = 5.0
"""Lambda of the paper's Eq. 7."""

UNKNOWN = -1
"""Label of a patch nobody labelled, or of padding."""


class SlideLoss(nn.Module):
    """Cross entropy of the slide's logits (Eq. 6), the mean over the bags.

    Args:
        repo_compat: Take the softmax twice, as the authors' released code does, which passes probabilities to a
            cross entropy that expects logits. It flattens the gradient: a sure and right slide still costs
            ``-log(e / (e + C - 1))``, 0.31 for two classes. Off by default: the paper's formula has one.
    """

    def __init__(self, *, repo_compat: bool = False):
        super().__init__()
        self.repo_compat = repo_compat

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, C) logits and (B,) labels → scalar."""
        return F.cross_entropy(logits.softmax(1) if self.repo_compat else logits, labels)


class MultitaskLoss(nn.Module):
    """Slide loss plus ``weight`` times the mean cross entropy of the labelled patches (Eq. 7).

    A bag without one labelled patch counts with its slide loss alone.

    Args:
        weight: Lambda; 5 in the paper.
        repo_compat: Of the slide loss; see :class:`SlideLoss`.
    """

    def __init__(self, *, weight: float = PATCH_WEIGHT, repo_compat: bool = False):
        super().__init__()
        self.weight = weight
        self.slide_loss = SlideLoss(repo_compat=repo_compat)

    def forward(self, logits: Tensor, patch_logits: Tensor, labels: Tensor, patch_labels: Tensor) -> Tensor:
        """Combine both losses.

        Args:
            logits: (B, C).
            patch_logits: (B, L, P).
            labels: (B,).
            patch_labels: (B, L), :data:`UNKNOWN` where there is none.

        Returns:
            A scalar: the mean over the bags.
        """
        per_bag = [
            F.cross_entropy(of_bag[known], of_patches[known])
            for of_bag, of_patches in zip(patch_logits, patch_labels, strict=True)
            if bool((known := of_patches != UNKNOWN).any())
        ]
        patches = torch.stack(per_bag).sum() / len(labels) if per_bag else logits.new_zeros(())
        return self.slide_loss(logits, labels) + self.weight * patches
