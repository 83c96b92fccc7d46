"""TransMIL: a slide model whose patches look at one another through approximate self-attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.extras import require
from s4mil_monai.models.bag_model import BagModel, BagOutput

HEADS = 8


class TransLayer(nn.Module):
    """LayerNorm → Nyström self-attention → added to what came in; (B, N, H) to (B, N, H).

    H/2 landmarks and six iterations for the pseudo-inverse, as the authors set the library.
    """

    def __init__(self, width: int, *, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = require("nystrom_attention", extra="transmil").NystromAttention(
            dim=width,
            dim_head=width // HEADS,
            heads=HEADS,
            num_landmarks=width // 2,
            pinv_iterations=6,
            residual=True,
            dropout=dropout,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(tokens)
        if tokens.shape[1] < self.attention.num_landmarks:
            return tokens + attend_few(self.attention, normed)
        return tokens + self.attention(normed)


def attend_few(attention: Any, tokens: Tensor) -> Tensor:
    """What the library computes for (B, N, H) tokens, fewer than its landmarks, at the price of N + 1 landmarks.

    The library fills N tokens up to its M landmarks with zeros and takes the pseudo-inverse of the (M, M)
    softmax: 256 landmarks for the 26 tokens of a bag of 25. The M - N rows of zeros are all alike, and so are
    their columns, so every matrix of its iteration is U a U^T with U the unit vectors of the N tokens and one
    vector of M - N equal entries: the iteration on ``a``, (N + 1, N + 1), is the same algebra.
    """
    heads, n, zeros = attention.heads, tokens.shape[1], attention.num_landmarks - tokens.shape[1]
    q, k, v = (
        part.unflatten(2, (heads, -1)).transpose(1, 2) for part in attention.to_qkv(tokens).chunk(3, dim=-1)
    )  # (B, heads, N, H / heads)
    a, largest = _softmax_with_zeros(q * attention.scale @ k.transpose(-1, -2), zeros)
    inverse = _iterate_inverse(a, largest, attention.pinv_iterations)
    attended = (a @ inverse)[..., :n, :] @ (a[..., :n] @ v)  # zeros have no value
    attended = attended + attention.res_conv(v)
    return attention.to_out(attended.transpose(1, 2).flatten(2))


def _softmax_with_zeros(similarity: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    """Softmax of (…, N, N) similarities beside ``zeros`` tokens of zero, in the basis of :func:`attend_few`.

    Also the largest column sum of the whole matrix; its row sums are 1.
    """
    n = similarity.shape[-1]
    beside = similarity.new_full((*similarity.shape[:-1], 1), math.log(zeros))
    of_tokens = torch.cat([similarity, beside], dim=-1).softmax(-1)  # (…, N, N + 1), the last for all zeros
    scale = similarity.new_ones(n + 1)
    scale[n] = zeros**-0.5
    of_zeros = scale * zeros**0.5 / (n + zeros)
    of_zeros[n] = zeros / (n + zeros)
    a = torch.cat([of_tokens * scale, of_zeros.expand(*similarity.shape[:-2], 1, n + 1)], dim=-2)
    columns = of_tokens.sum(-2) * scale**2 + zeros / (n + zeros)
    return a, columns.max()


def _iterate_inverse(a: Tensor, largest: Tensor, iterations: int) -> Tensor:
    """Pseudo-inverse of (…, N, N) by the iteration of the Nyströmformer (Xiong et al. 2021, Eq. 11)."""
    inverse, one = a.transpose(-1, -2) / largest, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        product = a @ inverse
        inverse = 0.25 * inverse @ (13 * one - product @ (15 * one - product @ (7 * one - product)))
    return inverse


class PositionEncoding(nn.Module):
    """Adds to each patch what lies about it on the square: depthwise convolutions of 7, 5 and 3 (PPEG).

    Takes and gives (B, 1 + S², H); the class token, first, passes by.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv7 = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.conv5 = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, tokens: Tensor) -> Tensor:
        class_token, patches = tokens[:, :1], tokens[:, 1:]
        side = math.isqrt(patches.shape[1])
        square = patches.transpose(1, 2).unflatten(2, (side, side))  # (B, H, S, S)
        square = square + self.conv7(square) + self.conv5(square) + self.conv3(square)
        return torch.cat([class_token, square.flatten(2).transpose(1, 2)], dim=1)


class TransMIL(BagModel):
    """Linear + ReLU → square → class token → TransLayer → PPEG → TransLayer → LayerNorm → linear.

    From Shao et al., "TransMIL: Transformer based Correlated Multiple Instance Learning", 2021. The bag is
    filled up to a square by repeating its first patches and read in the order given, so the order matters.
    The slide is scored from the class token; with ``patch_classes`` one more linear layer scores each patch
    from its own token (ours, for training with patch labels too).

    Bags of a batch are read one by one, each on its own length: the square and the landmarks depend on
    the length, and the library scales its pseudo-inverse by the largest value in the batch, which would
    let a bag's score depend on its neighbours.

    ``attention`` is None. The library gives three factors whose product only approximates the softmax:
    its rows may be negative and share their weight with the class token and the repeated patches.

    Args:
        in_features: D, width of the patch features.
        classes: C.
        patch_classes: P, or None for no patch logits.
        dropout: Share dropped after each attention; 0.1 in the authors' code.
        width: H, channels inside, a multiple of 8 for the eight heads; 512 in the paper.

    Raises:
        MissingExtraError: The library ``nystrom-attention`` is not installed.
        ValueError: ``width`` cannot be divided among the heads.
    """

    def __init__(
        self,
        in_features: int = 1024,
        *,
        classes: int = 2,
        patch_classes: int | None = None,
        dropout: float = 0.1,
        width: int = 512,
    ):
        super().__init__()
        if width < HEADS or width % HEADS:
            raise ValueError(f"width is a multiple of {HEADS}, the number of heads, got {width}")
        self.in_features, self.classes = in_features, classes
        self.project = nn.Linear(in_features, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.layer1 = TransLayer(width, dropout=dropout)
        self.position = PositionEncoding(width)
        self.layer2 = TransLayer(width, dropout=dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.patch_head = None if patch_classes is None else nn.Linear(width, patch_classes)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> BagOutput:
        """Predict; see :class:`BagModel` for shapes.

        Raises:
            ValueError: As :meth:`BagModel.check_bags`.
        """
        self.check_bags(features, mask)
        valid = features.new_ones(features.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        tokens = [self._read_bag(bag[real]) for bag, real in zip(features, valid, strict=True)]
        return BagOutput(
            logits=self.head(torch.stack([of_bag[0] for of_bag in tokens])),
            patch_logits=self._score_patches(torch.cat([of_bag[1:] for of_bag in tokens]), valid),
        )

    def _read_bag(self, features: Tensor) -> Tensor:
        """(1 + L, H) tokens of the slide and its patches, of one bag's (L, D) features."""
        patches = F.relu(self.project(features))  # (L, H)
        tokens = torch.cat([self.class_token, fill_square(patches).unsqueeze(0)], dim=1)  # (1, 1 + S², H)
        tokens = self.layer2(self.position(self.layer1(tokens)))
        return self.norm(tokens[0, : 1 + len(patches)])

    def _score_patches(self, tokens: Tensor, valid: Tensor) -> Tensor | None:
        """(B, L, P) logits of the valid patches' tokens, given one bag after the other."""
        if self.patch_head is None:
            return None
        logits = self.patch_head(tokens)
        padded = logits.new_zeros(*valid.shape, logits.shape[1])
        padded[valid] = logits
        return padded


def fill_square(patches: Tensor) -> Tensor:
    """(S², H) of (L, H) patches: the first ones follow the last until the number is the next square.

    >>> fill_square(torch.arange(5).unsqueeze(1)).flatten().tolist()
    [0, 1, 2, 3, 4, 0, 1, 2, 3]
    """
    side = math.isqrt(len(patches) - 1) + 1
    return torch.cat([patches, patches[: side**2 - len(patches)]])


_LAYERS = {
    "project": "_fc1.0",
    "position.conv7": "pos_layer.proj",
    "position.conv5": "pos_layer.proj1",
    "position.conv3": "pos_layer.proj2",
    "norm": "norm",
    "head": "_fc2",
} | {
    f"layer{i}.{ours}": f"layer{i}.{theirs}"
    for i in (1, 2)
    for ours, theirs in {"norm": "norm", "attention.to_out.0": "attn.to_out.0"}.items()
}

AUTHORS_NAMES = (
    {"class_token": "cls_token"}
    | {f"{ours}.{p}": f"{theirs}.{p}" for ours, theirs in _LAYERS.items() for p in ("weight", "bias")}
    | {
        f"layer{i}.attention.{p}": f"layer{i}.attn.{p}"
        for i in (1, 2)
        for p in ("to_qkv.weight", "res_conv.weight")
    }
)
"""Our parameter names of :class:`TransMIL` → the authors' names, to load their checkpoints of any number of
classes; ``patch_head`` is ours alone."""
