"""What training minimises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.clam import ClamMB, ClamSB, clam_loss

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
        class_weights: Factor of each class's bags. Unlike PyTorch's ``weight`` the mean is not divided by them,
            which would undo them in a batch of one bag.
    """

    class_weights: Tensor | None

    def __init__(self, *, repo_compat: bool = False, class_weights: Sequence[float] | None = None):
        super().__init__()
        self.repo_compat = repo_compat
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, C) logits and (B,) labels → scalar."""
        losses = F.cross_entropy(logits.softmax(1) if self.repo_compat else logits, labels, reduction="none")
        if self.class_weights is not None:
            losses = losses * self.class_weights.to(losses)[labels]
        return losses.mean()


class MultitaskLoss(nn.Module):
    """Slide loss plus ``weight`` times the mean cross entropy of the labelled patches (Eq. 7).

    A bag without one labelled patch counts with its slide loss alone.

    Args:
        weight: Lambda; 5 in the paper.
        repo_compat: Of the slide loss; see :class:`SlideLoss`.
        class_weights: Of the slide loss.
    """

    def __init__(
        self,
        *,
        weight: float = PATCH_WEIGHT,
        repo_compat: bool = False,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        self.weight = weight
        self.slide_loss = SlideLoss(repo_compat=repo_compat, class_weights=class_weights)

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
        # Without labels still of the patch logits: with several processes each parameter wants a gradient.
        patches = torch.stack(per_bag).sum() / len(labels) if per_bag else 0 * patch_logits.sum()
        return self.slide_loss(logits, labels) + self.weight * patches


class MultitaskInTraining(nn.Module):
    """A bundle's multitask network in training: slide and patch logits.

    Takes channel-first ``(B, D, L)`` features. Patch labels pass through, so that a MONAI trainer
    hands them to the loss.

    Args:
        slide_logits: The network that is exported, around a model with patch logits; it shares all parameters.
    """

    def __init__(self, slide_logits: SlideLogits):
        super().__init__()
        self.slide_logits = slide_logits

    def forward(self, image: Tensor, patch_labels: Tensor) -> dict[str, Tensor]:
        output = self.slide_logits.model(image.transpose(1, 2))
        return {"logits": output.logits, "patch_logits": output.patch_logits, "patch_labels": patch_labels}


class MultitaskObjective(nn.Module):
    """A :class:`MultitaskLoss` of what :class:`MultitaskInTraining` gives."""

    def __init__(self, loss: MultitaskLoss):
        super().__init__()
        self.loss = loss

    def forward(self, output: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return self.loss(output["logits"], output["patch_logits"], labels, output["patch_labels"])


class ClamInTraining(nn.Module):
    """A bundle's CLAM network in training: slide logits and, computed beside them, the clustering loss.

    Takes channel-first ``(B, D, L)`` features and the labels, which choose the instance classifier. The loss is
    computed here and not by the objective, so that with several processes its gradients are averaged as well.

    Args:
        slide_logits: The network that is exported, around a :class:`ClamSB` or :class:`ClamMB`.
    """

    def __init__(self, slide_logits: SlideLogits):
        super().__init__()
        self.slide_logits = slide_logits

    def forward(self, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        model = cast(ClamSB | ClamMB, self.slide_logits.model)
        output = model(image.transpose(1, 2))
        return {"logits": output.logits, "instance_loss": model.instance_loss(output, labels)}


class ClamObjective(nn.Module):
    """CLAM's slide and clustering loss of what :class:`ClamInTraining` gives.

    Args:
        slide_loss: Of the slide's logits.
        bag_weight: Share of the slide's loss; 0.7 in the paper.
    """

    def __init__(self, slide_loss: SlideLoss, *, bag_weight: float = 0.7):
        super().__init__()
        self.slide_loss, self.bag_weight = slide_loss, bag_weight

    def forward(self, output: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return clam_loss(self.slide_loss(output["logits"], labels), output["instance_loss"], self.bag_weight)


def slide_logits_of(output: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The slide's logits of a network's output, whichever form it has."""
    return output if isinstance(output, Tensor) else output["logits"]
