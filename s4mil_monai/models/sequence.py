"""LSTM and transformer, the sequence models S4MIL is compared with (Fillioux et al., MICCAI 2023, Table 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.models.bag_model import BagModel, BagOutput, mean_valid


class LSTMModel(BagModel):
    """Linear + ReLU → one LSTM layer → its state after the last patch → linear.

    Reads the patches in scan order and forgets as it goes; at a bag's end it has taken L steps.

    With D = 1024, H = 256 and 2 classes it has the 789,250 parameters of Table 2: 262,400 in the projection,
    526,336 in the LSTM (one direction, both of PyTorch's bias vectors), 514 in the head.

    Args:
        in_features: D, width of the patch features.
        classes: C.
        width: H, of the projection and of the state.
    """

    def __init__(self, in_features: int = 1024, *, classes: int = 2, width: int = 256):
        super().__init__()
        self.in_features, self.classes = in_features, classes
        self.project = nn.Linear(in_features, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> BagOutput:
        """Predict; see :class:`BagModel` for shapes.

        Raises:
            ValueError: As :meth:`BagModel.check_bags`.
        """
        self.check_bags(features, mask)
        states, _ = self.lstm(F.relu(self.project(features)))  # (B, L, H)
        return BagOutput(logits=self.head(take_last(states, mask)))


class TransformerModel(BagModel):
    """Linear + ReLU → transformer layers → LayerNorm → mean over the patches → linear.

    Nothing tells it where a patch lies: the score does not depend on the order of the patches.

    With D = 1024, H = 256, 2 classes and its defaults it has the 1,054,978 parameters of Table 2: 262,400 in
    the projection, 395,776 in each of two layers (attention 263,168, feed-forward 131,584, two LayerNorms
    1,024; all with biases), 512 in the last LayerNorm, 514 in the head; so no class token and no learned
    positions. The count does not say whether a layer normalises before or after its sums; this is PyTorch's
    default, after.

    Time grows with L², memory with L: attention is computed in blocks and its weights are never kept.
    Two settings guard that. Layers are length first, since for batch first PyTorch's inference path
    (``torch._transformer_encoder_layer_fwd``) builds (heads, L, L) on the CPU; and attention weights have no
    dropout, for which it does the same in training.

    Args:
        in_features: D, width of the patch features.
        classes: C.
        width: H, channels inside.
        layers: Transformer layers.
        heads: Attention heads of a layer; they share H.
        feedforward: Width inside a layer's feed-forward part.
        dropout: Share of channels dropped after attention and in the feed-forward part, in training.
    """

    def __init__(
        self,
        in_features: int = 1024,
        *,
        classes: int = 2,
        width: int = 256,
        layers: int = 2,
        heads: int = 4,
        feedforward: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.in_features, self.classes = in_features, classes
        self.project = nn.Linear(in_features, width)
        # Not nn.TransformerEncoder: it copies one layer, so that all would start from the same weights.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, feedforward, dropout, batch_first=False)
            for _ in range(layers)
        )
        for module in self.layers.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> BagOutput:
        """Predict; see :class:`BagModel` for shapes.

        Raises:
            ValueError: As :meth:`BagModel.check_bags`.
        """
        self.check_bags(features, mask)
        padding = None if mask is None else ~mask.bool()  # (B, L)
        values = F.relu(self.project(features)).transpose(0, 1)  # (L, B, H)
        for layer in self.layers:
            values = layer(values, src_key_padding_mask=padding)
        return BagOutput(logits=self.head(mean_valid(self.norm(values).transpose(0, 1), mask)))


def take_last(states: Tensor, mask: Tensor | None) -> Tensor:
    """The (B, H) states at each bag's last patch, of (B, L, H); the padding behind it never reaches them."""
    if mask is None:
        return states[:, -1]
    last = mask.long().sum(dim=1) - 1  # (B,)
    return states[torch.arange(len(states), device=states.device), last]
