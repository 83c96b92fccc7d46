"""ChunkStep: the slide model as one step over T patches, with nothing kept between steps but a small state.

The S4D is causal and the head is a maximum, so the past of a slide is its SSM state and the running maximum of
each channel. The step is exact: any number of steps gives the numbers of :class:`S4MIL` on the whole bag. As it is
exported it has real arithmetic and static shapes, so one graph serves slides of every length.

Inside a step, blocks of 64 patches are convolved by a Toeplitz product for each channel, and a state of n complex
numbers goes from block to block. Constants are computed in float64 and rounded once.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.models.s4d import BLOCK, S4D, BlockConstants, turned
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.precision import find_precision
from s4mil_monai.streaming.packed_linear import PackedLinear, is_recording

LOWEST = torch.finfo(torch.float32).min
"""Running maximum before the first patch; finite, for infinity times zero would poison half precision."""


class ChunkState(NamedTuple):
    """All that is known of a slide's past: small, of fixed size, on one device."""

    ssm: Tensor
    """(layers, H, 2, n) float32: real and imaginary parts of the S4D states."""
    running_max: Tensor
    """(H,) float32: largest value of each channel so far."""
    winners: Tensor
    """(H,) int32: the patch that has it, counted from the start of the slide."""
    start: Tensor
    """(1,) int32: patches read so far."""


def first_state(*, layers: int, width: int, modes: int, device: torch.device | None = None) -> ChunkState:
    """The state before the first patch."""
    return ChunkState(
        ssm=torch.zeros(layers, width, 2, modes, device=device),
        running_max=torch.full((width,), LOWEST, device=device),
        winners=torch.zeros(width, dtype=torch.int32, device=device),
        start=torch.zeros(1, dtype=torch.int32, device=device),
    )


class ChunkOutput(NamedTuple):
    """What a step gives."""

    state: ChunkState
    patch_logits: Tensor
    """(T, P) float32; arbitrary where a patch is not valid."""
    logits: Tensor
    """(C,) float32: the slide's score, were this its end."""


class ChunkStep(nn.Module):
    """One step of a slide model over T patches.

    Args:
        model: The slide or the multitask form, with 1 or more S4D layers; its weights are copied.
        precision: Of products and activations: ``float32``, ``float16`` or ``bfloat16``. State, maxima and logits
            are float32 always.

    Raises:
        UnknownNameError: No such precision.
    """

    def __init__(self, model: S4MIL, *, precision: str = "float32"):
        super().__init__()
        self.precision, self.dtype = precision, find_precision(precision)
        self.in_features, self.classes = model.in_features, model.classes
        self.project = PackedLinear(model.project.weight, model.project.bias, self.dtype, relu=True)
        self.layers = nn.ModuleList(_ChunkLayer(norm, s4d, self.dtype) for norm, s4d in model.layers())
        self.head = copy.deepcopy(model.head)
        self.patch_head = copy.deepcopy(model.head if model.patch_head is None else model.patch_head)
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """H, channels inside."""
        return self.head.in_features

    @property
    def patch_classes(self) -> int:
        """P, of the patch logits."""
        return self.patch_head.out_features

    @property
    def modes(self) -> int:
        """n, complex modes of each channel."""
        return self.layers[0].modes  # type: ignore[return-value]

    def first_state(self) -> ChunkState:
        """The state before the first patch."""
        device = self.head.weight.device
        return first_state(layers=len(self.layers), width=self.width, modes=self.modes, device=device)

    def forward(
        self, ssm: Tensor, running_max: Tensor, winners: Tensor, start: Tensor, features: Tensor, valid: Tensor
    ) -> ChunkOutput:
        """Read T more patches.

        Args:
            ssm: As in :class:`ChunkState`, and so the next three.
            running_max: (H,).
            winners: (H,).
            start: (1,).
            features: (T, D) float32, T a multiple of 64; anything finite where not valid.
            valid: (T,) bool; false only at the end of a slide's last step.
        """
        values = self.project(features.to(self.dtype))  # (T, H)
        states = []
        for layer, state in zip(self.layers, ssm.unbind(0), strict=True):
            values, after = layer(values, state)
            states.append(after)
        values = values.float()
        count = valid.sum(0, keepdim=True, dtype=torch.int32)  # (1,)
        found, place = first_maximum(values, count)
        state = ChunkState(
            ssm=torch.stack(states),
            running_max=torch.maximum(found, running_max),
            winners=torch.where(found > running_max, start + place, winners),
            start=start + count,
        )
        return ChunkOutput(state, self.patch_head(values), self.head(state.running_max))


class _ChunkLayer(nn.Module):
    """Layer norm and S4D over T patches, given the state their past left behind."""

    gain: Tensor
    shift: Tensor
    inside: Tensor
    inject: Tensor
    decay: Tensor
    turn: Tensor
    emit: Tensor

    def __init__(self, norm: nn.LayerNorm, s4d: S4D, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.modes = dtype, s4d.state_dim // 2
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.register_buffer("gain", norm.weight.detach().to(dtype, copy=True))
        self.register_buffer("shift", norm.bias.detach().to(dtype, copy=True))
        with torch.no_grad():
            for name, constant in _real_constants(s4d.block_constants(BLOCK), dtype).items():
                self.register_buffer(name, constant)
        self.value, self.gate = (
            PackedLinear(weight, bias, dtype)
            for weight, bias in zip(s4d.mix.weight.chunk(2), s4d.mix.bias.chunk(2), strict=True)
        )

    def forward(self, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(T, H) and the (H, 2, n) state before → (T, H) and the state after."""
        normed = F.layer_norm(values, self.shape, self.gain, self.shift, self.eps)
        T, H = normed.shape
        blocks = turned(normed).view(H, T // BLOCK, BLOCK)
        added = (blocks @ self.inject).float().view(H, T // BLOCK, 2, self.modes)
        before, after = self._scan(added, state)
        convolved = torch.baddbmm(blocks @ self.inside, before.flatten(2).to(self.dtype), self.emit)
        mixed = turned(F.gelu(convolved).view(H, T))
        return self.gate(mixed).sigmoid_().mul_(self.value(mixed)), after

    def _scan(self, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """States (H, Q, 2, n) before each of Q blocks, and the one after the last: ``S' = dA^64 S + added``."""
        if is_recording():
            return self._scan_in_real_arithmetic(added, state)
        decay = torch.complex(self.decay[:, 0], self.turn[:, 1])  # (H, n)
        entries = torch.complex(added[:, :, 0], added[:, :, 1])  # (H, Q, n)
        states = entries.new_empty((entries.shape[1] + 1, *decay.shape))
        states[0] = torch.complex(state[:, 0], state[:, 1])
        for q, entry in enumerate(entries.unbind(1)):
            torch.addcmul(entry, decay, states[q], out=states[q + 1])
        before = states[:-1].transpose(0, 1)
        return torch.stack((before.real, before.imag), 2), torch.stack((states[-1].real, states[-1].imag), 1)

    def _scan_in_real_arithmetic(self, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a graph that has no complex numbers."""
        before = []
        for entry in added.unbind(1):
            before.append(state)
            # complex product in real arithmetic: flip exchanges real and imaginary part
            state = torch.addcmul(torch.addcmul(entry, self.decay, state), self.turn, state.flip(1))
        return torch.stack(before, 1), state


def _real_constants(constants: BlockConstants, dtype: torch.dtype) -> dict[str, Tensor]:
    """Constants of a block with all real parts before all imaginary parts, as a step keeps its state."""
    H, T, pairs = constants.inject.shape
    n = pairs // 2
    real, imaginary = constants.decay.real, constants.decay.imag
    return {
        "inside": constants.inside.to(dtype),  # (H, T, T)
        "inject": constants.inject.view(H, T, n, 2).transpose(2, 3).reshape(H, T, 2 * n).to(dtype),
        "decay": real.unsqueeze(1).contiguous(),  # (H, 1, n)
        "turn": torch.stack((-imaginary, imaginary), 1),  # (H, 2, n)
        "emit": constants.emit.view(H, n, 2, T).transpose(1, 2).reshape(H, 2 * n, T).to(dtype),
    }


def first_maximum(values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each column over the first rows, and the first row that has it.

    The maxima of blocks are found first, and places are sought in the winning block alone: ``max`` with indices
    over all rows takes many times as long, and masking every row costs a pass of its own.

    Args:
        values: (T, H), T a multiple of 64.
        count: (1,) int32, how many rows are valid, at least 1.

    Returns:
        (H,) and (H,) int32.
    """
    T, H = values.shape
    blocks = values.view(T // BLOCK, BLOCK, H)
    rows = torch.arange(T, device=values.device, dtype=torch.int32).view(T // BLOCK, BLOCK)
    last = (count - 1) // BLOCK  # (1,) the block in which the valid rows end
    last_rows = blocks.index_select(0, last).squeeze(0)  # (64, H)
    end = torch.where(rows.index_select(0, last).view(BLOCK, 1) < count, last_rows, LOWEST).amax(0)
    whole = torch.where(rows[:, -1:] < count, blocks.amax(1), LOWEST)  # (Q, H)
    of_blocks = torch.where(rows[:, :1] == last * BLOCK, end, whole)
    block = of_blocks.argmax(0)  # (H,)
    candidates = blocks.gather(0, block.view(1, 1, H).expand(1, BLOCK, H)).squeeze(0)  # (64, H)
    place = block * BLOCK + torch.arange(BLOCK, device=values.device).unsqueeze(1)  # (64, H)
    return of_blocks.amax(0), (block * BLOCK + torch.where(place < count, candidates, LOWEST).argmax(0)).int()
