"""A linear layer whose weights are packed once for the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PackedLinear(nn.Module):
    """``x W^T + b``, or its positive part, for (T, D) → (T, E), by the fastest route there is.

    On the CPU in float32 the weights are packed for oneDNN at the first call, which halves the time of
    ``F.linear`` on AMD processors. The operator is one that PyTorch's compiler uses and does not promise to keep;
    without it, and while a graph is exported, the plain product takes its place.

    Args:
        weight: W (E, D); copied.
        bias: b (E,); copied.
        dtype: Of weights, input and output.
        relu: Whether negative outputs are set to zero.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, *, relu: bool = False):
        super().__init__()
        self.relu = relu
        self.register_buffer("weight", weight.detach().to(dtype, copy=True))
        self.register_buffer("bias", bias.detach().to(dtype, copy=True))
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._can_pack(x):
            if self._packed is None:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, len(x))
            after = "relu" if self.relu else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, after, [], "")
        y = F.linear(x, self.weight, self.bias)
        return F.relu(y) if self.relu else y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # oneDNN's own form cannot be copied; it is made anew

    def _apply(self, fn, recurse: bool = True):
        self._packed = None  # of weights that are about to move
        return super()._apply(fn, recurse)

    def _can_pack(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == torch.float32
            and not is_recording()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and torch.backends.mkldnn.is_available()
        )


def is_recording() -> bool:
    """Whether the step is being exported or compiled, and not computed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
