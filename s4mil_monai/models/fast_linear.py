"""A linear layer by the fastest route the machine has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fast_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` for (B, L, D) → (B, L, E).

    On the CPU in float32 it runs as a 1x1 convolution on a channels-last view, without a copy: oneDNN's
    convolution takes half the time of ``F.linear``, which goes through MKL, on AMD processors.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
        return layer(x)
    image = x.transpose(1, 2).unsqueeze(-1)  # (B, D, L, 1), channels last in memory
    weight = layer.weight[..., None, None].to(memory_format=torch.channels_last)  # else the result is not
    return F.conv2d(image, weight, layer.bias).squeeze(-1).transpose(1, 2)
