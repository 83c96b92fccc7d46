"""CLAM: slide models that pool by gated attention, and the clustering loss that shapes it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.models.bag_model import BagModel, BagOutput, keep_valid


@dataclass(frozen=True, kw_only=True)
class ClamOutput(BagOutput):
    """What CLAM gives beyond every bag model; ``attention`` is that of the predicted class."""

    attention_raw: Tensor
    """(B, K, L) scores before the softmax, K = 1 (SB) or C (MB); arbitrary at padding."""
    hidden: Tensor
    """(B, L, H) patches as the attention and the instance classifiers see them; 0 at padding."""


class GatedAttention(nn.Module):
    """Scores each patch by ``w · (tanh(V h) ⊙ sigmoid(U h))``, once per branch (Ilse et al. 2018, Eq. 9).

    Takes (B, L, H) and gives (B, L, K).
    """

    def __init__(self, width: int, *, attention_width: int, branches: int, dropout: float):
        super().__init__()
        self.signal = nn.Linear(width, attention_width)
        self.gate = nn.Linear(width, attention_width)
        self.score = nn.Linear(attention_width, branches)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        signal = self.dropout(torch.tanh(self.signal(hidden)))
        gate = self.dropout(torch.sigmoid(self.gate(hidden)))
        return self.score(signal * gate)


class _Clam(BagModel):
    """What the two forms share: all but the number of attention branches and the slide's head."""

    branch_per_class: bool

    def __init__(
        self,
        in_features: int = 1024,
        *,
        classes: int = 2,
        k_sample: int = 8,
        subtyping: bool = False,
        dropout: float = 0.0,
        width: int = 512,
        attention_width: int = 256,
    ):
        super().__init__()
        if k_sample < 1:
            raise ValueError(f"k_sample is the number of patches taken at each end, at least 1, got {k_sample}")
        self.in_features, self.classes = in_features, classes
        self.k_sample, self.subtyping = k_sample, subtyping
        self.project = nn.Linear(in_features, width)
        self.dropout = nn.Dropout(dropout)
        branches = classes if self.branch_per_class else 1
        self.attend = GatedAttention(width, attention_width=attention_width, branches=branches, dropout=dropout)
        self.head = self.build_head(width)
        self.instance_heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(classes))

    @abstractmethod
    def build_head(self, width: int) -> nn.Module:
        """The layer or layers that score the slide."""

    @abstractmethod
    def score_pooled(self, pooled: Tensor) -> Tensor:
        """(B, C) logits of the (B, K, H) vectors that the branches pooled."""

    def forward(self, features: Tensor, mask: Tensor | None = None) -> ClamOutput:
        """Predict; see :class:`BagModel` for shapes.

        Raises:
            ValueError: As :meth:`BagModel.check_bags`.
        """
        self.check_bags(features, mask)
        hidden = self._hide(features, mask)  # (B, L, H)
        raw = self.attend(hidden)  # (B, L, K)
        weights = keep_valid(raw, mask).softmax(dim=1)  # (B, L, K)
        logits = self.score_pooled(weights.transpose(1, 2) @ hidden)
        return ClamOutput(
            logits=logits,
            attention=self._of_predicted_class(weights, logits),
            attention_raw=raw.transpose(1, 2),
            hidden=hidden,
        )

    def instance_loss(self, output: ClamOutput, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """How badly the true class's instance classifier separates its most and least attended patches.

        The ``k_sample`` patches with the highest attention in the true class's branch count as evidence of
        it (label 1), those with the lowest as none (label 0). With ``subtyping``, where classes exclude each
        other, the highest of every other class count as none for that class, and the sum is divided by C.
        A bag shorter than ``k_sample`` gives all its patches, one shorter than ``2 k_sample`` some at both
        ends. Cross entropy, the authors' code's default; their paper has the smooth top-1 SVM loss.

        Args:
            output: What :meth:`forward` gave for these bags.
            labels: (B,) true classes of the slides, integers in [0, C).
            mask: (B, L), the one that :meth:`forward` had.

        Returns:
            The mean over the bags, a scalar. Its gradient reaches the patches chosen, not the choice.

        Raises:
            ValueError: Labels of another shape, or outside [0, C).
        """
        self._check_labels(labels, bags=len(output.hidden))
        scores = output.attention_raw.expand(-1, self.classes, -1)  # (B, C, L): one branch serves every class
        losses = []
        for bag, label in enumerate(labels.tolist()):
            valid = slice(None) if mask is None else mask[bag].bool()
            losses.append(self._instance_loss_of_bag(scores[bag, :, valid], output.hidden[bag, valid], label))
        return torch.stack(losses).mean()

    def _hide(self, features: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.dropout(F.relu(self.project(features)))
        # padding has weight 0, but 0 times an overflow in half precision would still be NaN
        return hidden if mask is None else hidden.masked_fill(~mask.bool().unsqueeze(-1), 0)

    def _of_predicted_class(self, weights: Tensor, logits: Tensor) -> Tensor:
        """(B, L) of the (B, L, K) weights."""
        bags = torch.arange(len(logits), device=logits.device)
        return weights.expand(-1, -1, self.classes)[bags, :, logits.argmax(dim=1)]

    def _instance_loss_of_bag(self, scores: Tensor, hidden: Tensor, label: int) -> Tensor:
        """Of one bag's (C, L) scores and (L, H) valid patches."""
        k = min(self.k_sample, len(hidden))
        highest = scores.topk(k, dim=1).indices  # (C, k)
        lowest = scores[label].topk(k, largest=False).indices  # (k,)
        ends = hidden[torch.cat([highest[label], lowest])]  # (2k, H)
        evidence = torch.arange(2 * k, device=hidden.device) < k
        loss = F.cross_entropy(self.instance_heads[label](ends), evidence.long())
        if not self.subtyping:
            return loss
        none = torch.zeros(k, dtype=torch.long, device=hidden.device)
        for other, head in enumerate(self.instance_heads):
            if other != label:
                loss = loss + F.cross_entropy(head(hidden[highest[other]]), none)
        return loss / self.classes

    def _check_labels(self, labels: Tensor, *, bags: int) -> None:
        if labels.shape != (bags,):
            raise ValueError(f"wanted one label per bag, ({bags},), got {tuple(labels.shape)}")
        if not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise ValueError(f"labels are classes in [0, {self.classes}), got {labels.tolist()}")


class ClamSB(_Clam):
    """CLAM with a single attention branch: all classes are scored from one pooled vector.

    Linear + ReLU → gated attention → softmax over the patches → weighted mean → linear, from Lu et al.,
    "Data-efficient and weakly supervised computational pathology on whole-slide images", 2021. The order of
    the patches does not matter. Train with :meth:`instance_loss` and :func:`clam_loss`.

    Args:
        in_features: D, width of the patch features.
        classes: C.
        k_sample: Patches taken at each end of the attention for :meth:`instance_loss`; 8 in the paper.
        subtyping: Whether the classes exclude each other, so that a class's evidence is none of another's.
        dropout: Share dropped after the projection and in both halves of the attention. Where it is not 0,
            the authors' code has 0.25 in the attention whatever the value.
        width: H, channels inside; 512 in the paper.
        attention_width: Channels of the attention; 256 in the authors' size "small", 384 in "big".
    """

    branch_per_class = False
    head: nn.Linear

    def build_head(self, width: int) -> nn.Linear:
        return nn.Linear(width, self.classes)

    def score_pooled(self, pooled: Tensor) -> Tensor:
        return self.head(pooled[:, 0])


class ClamMB(_Clam):
    """CLAM with one attention branch per class: each class is scored from the vector its branch pooled.

    Arguments as :class:`ClamSB`.
    """

    branch_per_class = True
    head: nn.ModuleList

    def build_head(self, width: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(width, 1) for _ in range(self.classes))

    def score_pooled(self, pooled: Tensor) -> Tensor:
        return torch.cat([of_class(pooled[:, c]) for c, of_class in enumerate(self.head)], dim=1)


def clam_loss(bag_loss: Tensor, instance_loss: Tensor, bag_weight: float = 0.7) -> Tensor:
    """The two losses weighed to one, ``w bag + (1 - w) instance``; w is 0.7 in the paper.

    >>> clam_loss(bag_loss=torch.tensor(1.0), instance_loss=torch.tensor(2.0))
    tensor(1.3000)

    Raises:
        ValueError: ``bag_weight`` is no fraction.
    """
    if not 0 <= bag_weight <= 1:
        raise ValueError(f"bag_weight is a fraction in [0, 1], got {bag_weight}")
    return bag_weight * bag_loss + (1 - bag_weight) * instance_loss


def clam_sb_authors_names(classes: int) -> dict[str, str]:
    """Our parameter names of :class:`ClamSB` → the authors' names, to load their checkpoints.

    >>> clam_sb_authors_names(2)["head.weight"]
    'classifiers.weight'
    """
    return _with_parameters(_shared_authors_names(classes) | {"head": "classifiers"})


def clam_mb_authors_names(classes: int) -> dict[str, str]:
    """Our parameter names of :class:`ClamMB` → the authors' names, to load their checkpoints.

    >>> clam_mb_authors_names(3)["head.2.bias"]
    'classifiers.2.bias'
    """
    heads = {f"head.{c}": f"classifiers.{c}" for c in range(classes)}
    return _with_parameters(_shared_authors_names(classes) | heads)


def _shared_authors_names(classes: int) -> dict[str, str]:
    return {
        "project": "attention_net.0",
        "attend.signal": "attention_net.3.attention_a.0",
        "attend.gate": "attention_net.3.attention_b.0",
        "attend.score": "attention_net.3.attention_c",
    } | {f"instance_heads.{c}": f"instance_classifiers.{c}" for c in range(classes)}


def _with_parameters(layers: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{p}": f"{theirs}.{p}" for ours, theirs in layers.items() for p in ("weight", "bias")}
