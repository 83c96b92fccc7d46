"""S4MIL in a form that TorchScript compiles, for MONAI's ``ckpt_export``: the same numbers, constants fixed."""

# No `from __future__ import annotations`: TorchScript reads the types of a class as they stand.
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.s4d import BLOCK, S4D
from s4mil_monai.models.s4mil import S4MIL


class ExportableSlideLogits(SlideLogits):
    """:class:`SlideLogits` of an :class:`S4MIL` that ``torch.jit.script`` can compile; otherwise no different."""

    def __prepare_scriptable__(self) -> nn.Module:
        # What torch.jit.script compiles in place of this module, whose checks and classes it does not know.
        return ScriptedS4MIL(cast(S4MIL, self.model))


class ScriptedS4MIL(nn.Module):
    """Slide logits (B, C) of channel-first features (B, D, L), for inference, with fixed weights.

    Memory grows with L x H; the state goes from block to block in a loop.
    """

    def __init__(self, model: S4MIL):
        super().__init__()
        self.project = model.project
        self.norms = nn.ModuleList(norm for norm, _ in model.layers())
        self.layers = nn.ModuleList(_ScriptedS4D(s4d) for _, s4d in model.layers())
        self.head = model.head

    def forward(self, image: Tensor) -> Tensor:
        values = F.relu(self.project(image.transpose(1, 2)))  # (B, L, H)
        for norm, layer in zip(self.norms, self.layers):  # noqa: B905 - TorchScript knows no strict
            values = layer(norm(values))
        return self.head(values.amax(1))


class _ScriptedS4D(nn.Module):
    """(B, L, H) → (B, L, H), as :class:`S4D` by blocks."""

    inside: Tensor
    inject: Tensor
    decay: Tensor
    emit: Tensor

    def __init__(self, s4d: S4D):
        super().__init__()
        with torch.no_grad():
            constants = s4d.block_constants()
        self.block = BLOCK
        self.register_buffer("inside", constants.inside.clone())  # (H, T, T)
        self.register_buffer("inject", constants.inject.clone())  # (H, T, 2n)
        self.register_buffer("decay", torch.view_as_real(constants.decay).clone())  # (H, n, 2)
        self.register_buffer("emit", constants.emit.clone())  # (H, 2n, T)
        self.mix = s4d.mix

    def forward(self, u: Tensor) -> Tensor:
        B, L, H = u.shape[0], u.shape[1], u.shape[2]
        T = self.block
        Q = (L + T - 1) // T
        rows = F.pad(u, [0, 0, 0, Q * T - L])
        blocks = rows.reshape(B * Q, T, H).permute(2, 0, 1)  # (H, B Q, T)
        added = (blocks @ self.inject).reshape(H, B, Q, -1, 2)
        y = blocks @ self.inside + self._states(added).reshape(H, B * Q, -1) @ self.emit
        y = y.reshape(H, B, Q * T).permute(1, 2, 0)[:, :L]
        return F.glu(self.mix(F.gelu(y)), dim=-1)

    def _states(self, added: Tensor) -> Tensor:
        """States (H, B, Q, n, 2) before each block, of what each block adds."""
        real, imaginary = self.decay[:, None, :, 0], self.decay[:, None, :, 1]  # (H, 1, n)
        state = torch.zeros_like(added[:, :, 0])
        before = [state]
        for q in range(added.shape[2] - 1):
            a, b = state[..., 0], state[..., 1]
            state = torch.stack([real * a - imaginary * b, real * b + imaginary * a], -1) + added[:, :, q]
            before.append(state)
        return torch.stack(before, 2)
