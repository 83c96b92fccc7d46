"""The S4D layer: a diagonal state space model for each channel, in three computations that agree.

Letters as in Gu, Gupta, Goel, Ré, "On the Parameterization and Initialization of Diagonal State Space
Models", NeurIPS 2022. For each of H channels, with n = N/2 complex modes (each standing for a conjugate pair):

- ``A`` (H, n) diagonal of the continuous system, ``Re A < 0``;
- ``C`` (H, n) output weights; the input weights ``B`` are 1, absorbed into C;
- ``dt`` (H,) step size; ``D`` (H,) skip;
- ``dA = exp(dt A)`` and ``Cd = C (dA - 1) / A``: the discrete system by zero-order hold, as the authors' code has
  it; the paper's text says bilinear, ``dA = (1 + dt A / 2) / (1 - dt A / 2)``, ``Cd = C dt / (1 - dt A / 2)``;
- ``K_l = 2 Re Σ_n Cd_n dA_n^l`` (H, L): the kernel, so that ``y = K * u + D u``.

Powers of dA are computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.models.fast_linear import fast_linear

BLOCK = 64
"""Patches in a block: a Toeplitz product inside, a state of N/2 complex numbers between."""

Computation = Literal["blocks", "fft", "recurrence"]
Discretization = Literal["zoh", "bilinear"]


class S4D(nn.Module):
    """One S4D layer with its output mixing: ``GLU(W gelu(K * u + D u) + b)``.

    Args:
        width: H, channels in and out.
        state_dim: N, real size of each channel's state; N/2 complex modes.
        dt_min: Shortest step size at the start, log-uniform between the two.
        dt_max: Longest step size at the start.
        discretization: ``zoh`` (zero-order hold, the authors' released code) or ``bilinear`` (the paper's text).

    Raises:
        ValueError: ``state_dim`` is odd or not positive, or the discretization is neither of the two.
    """

    def __init__(
        self,
        width: int,
        *,
        state_dim: int = 32,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        discretization: Discretization = "zoh",
    ):
        super().__init__()
        if state_dim < 2 or state_dim % 2:
            raise ValueError(
                f"state_dim counts real numbers of conjugate pairs: even and positive, got {state_dim}"
            )
        if discretization not in get_args(Discretization):
            raise ValueError(f"discretization is one of {get_args(Discretization)}, got {discretization!r}")
        modes = state_dim // 2
        self.discretization = discretization
        self.width, self.state_dim = width, state_dim
        self.log_dt = nn.Parameter(torch.rand(width) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.log_A_real = nn.Parameter(torch.full((width, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(modes).float().repeat(width, 1))  # S4D-Lin
        self.C = nn.Parameter(torch.randn(width, modes, 2) * math.sqrt(0.5))  # (real, imaginary)
        self.D = nn.Parameter(torch.randn(width))
        self.mix = nn.Linear(width, 2 * width)

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, H) → (B, L, H); position l sees positions up to l only."""
        return self.mix_channels(self.convolve(u))

    def mix_channels(self, y: Tensor) -> Tensor:
        """(B, L, H) → (B, L, H): ``GLU(W gelu(y) + b)``."""
        return F.glu(fast_linear(self.mix, F.gelu(y)), dim=-1)

    def convolve(self, u: Tensor, *, computation: Computation = "blocks") -> Tensor:
        """(B, L, H) → ``K * u + D u`` (B, L, H), by one of three computations that agree.

        ``blocks`` has the least memory and is the fastest on long bags; ``fft`` is the textbook's;
        ``recurrence`` is the definition, one patch at a time.
        """
        return {"blocks": self._by_blocks, "fft": self._by_fft, "recurrence": self._by_recurrence}[computation](u)

    def kernel(self, L: int) -> Tensor:
        """K (H, L) in float32, without ever holding (H, N/2, L) numbers: powers factor into blocks."""
        dA, Cd = self._discrete()
        T = min(BLOCK, L)
        inside = powers(dA, T + 1)  # (H, n, T + 1)
        before = Cd.unsqueeze(-1) * powers(inside[..., T], -(-L // T))  # (H, n, Q)
        before, inside = before.transpose(1, 2), inside[..., :T]
        K = 2 * (before.real @ inside.real - before.imag @ inside.imag)  # (H, Q, T)
        return K.flatten(1)[:, :L].float()

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """dA and Cd, (H, n) complex128."""
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        C = torch.view_as_complex(self.C.double().contiguous())
        dt = self.log_dt.double().exp().unsqueeze(-1)
        if self.discretization == "bilinear":
            half = A * dt / 2
            return (1 + half) / (1 - half), C * dt / (1 - half)
        dA = torch.exp(A * dt)
        return dA, C * (dA - 1) / A

    def _by_fft(self, u: Tensor) -> Tensor:
        L = u.shape[1]
        u_hat = torch.fft.rfft(u.transpose(1, 2), n=2 * L)  # (B, H, L + 1)
        K_hat = torch.fft.rfft(self.kernel(L), n=2 * L)  # (H, L + 1)
        y = torch.fft.irfft(u_hat * K_hat, n=2 * L)[..., :L]
        return y.transpose(1, 2) + u * self.D

    def _by_recurrence(self, u: Tensor) -> Tensor:
        dA, Cd = self._discrete()
        state = torch.zeros(u.shape[0], *dA.shape, dtype=dA.dtype, device=u.device)
        y = []
        for u_l in u.unbind(1):  # (B, H)
            state = dA * state + u_l.unsqueeze(-1)
            y.append(2 * (Cd * state).sum(-1).real)
        return torch.stack(y, 1).to(u.dtype) + u * self.D

    def _by_blocks(self, u: Tensor) -> Tensor:
        return convolve_blocks(u, self.block_constants(min(BLOCK, u.shape[1])))[0]

    def block_constants(self, T: int = BLOCK) -> BlockConstants:
        """Constants of a block of T patches, computed in float64 and rounded once."""
        dA, Cd = self._discrete()
        decays = powers(dA, T + 1)  # (H, n, T + 1)
        emit = 2 * Cd.unsqueeze(-1) * decays[..., 1:]  # (H, n, T): Cd dA^(i + 1)
        first = 2 * Cd.real.sum(1, keepdim=True) + self.D.double().unsqueeze(-1)
        K = torch.cat((first, emit[..., :-1].real.sum(1)), 1).float()  # (H, T), the skip at its start
        toeplitz = F.pad(K, (T - 1, 0)).unfold(1, T, 1).flip(-1)  # [i, j] = K_(i - j)
        inject = decays[..., :T].to(torch.complex64).flip(-1)  # (H, n, T): dA^(T - 1 - j)
        return BlockConstants(
            inside=toeplitz.transpose(1, 2).contiguous(),
            inject=torch.view_as_real(inject.transpose(1, 2).contiguous()).flatten(2),
            decay=decays[..., T].to(torch.complex64),
            emit=_real_rows(emit.to(torch.complex64)),
        )


def _real_rows(emit: Tensor) -> Tensor:
    """(H, n, T) complex weights → (H, 2n, T) rows for real and imaginary part of each state: Re(e s) is linear."""
    rows = torch.view_as_real(emit).permute(0, 1, 3, 2)  # (H, n, 2, T)
    return (rows * torch.tensor([1.0, -1.0], device=emit.device).view(2, 1)).flatten(1, 2)


class BlockConstants(NamedTuple):
    """What a block of T patches does to its input and to the state, in real arithmetic.

    A state's real and imaginary parts lie side by side, so that 2n real and n complex numbers are one memory.
    """

    inside: Tensor
    """(H, T, T): input → output inside the block, the skip on its diagonal; multiplied from the right."""
    inject: Tensor
    """(H, T, 2n): input → what it adds to the state at the block's end."""
    decay: Tensor
    """(H, n) complex64: factor of the state over a block."""
    emit: Tensor
    """(H, 2n, T): state before the block → output inside it."""


def convolve_blocks(u: Tensor, constants: BlockConstants, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Convolve a piece of a sequence, given the state its past left behind.

    Args:
        u: (B, L, H).
        constants: Of blocks of T patches.
        state: (H, B, n) complex before the piece; None is the empty past.

    Returns:
        ``K * u + D u`` (B, L, H), and the state after the piece. The state is that after the last whole block:
        only a piece whose length is a multiple of T can be followed by another.
    """
    B, L, H = u.shape
    T, n = constants.inside.shape[1], constants.decay.shape[1]
    Q = -(-L // T)
    rows = F.pad(u, (0, 0, 0, Q * T - L)) if Q * T > L else u
    blocks = transpose(rows.reshape(B * Q * T, H)).view(H, B * Q, T)
    # under autocast the product is of half precision; the state never is
    added = torch.view_as_complex((blocks @ constants.inject).float().view(H, B, Q, n, 2))
    before, after = _states(constants.decay, added, state)
    pairs = torch.view_as_real(before).reshape(H, B * Q, 2 * n)
    y = torch.baddbmm(blocks @ constants.inside, pairs, constants.emit)
    return transpose(y.view(H, B * Q * T)).view(B, Q * T, H)[:, :L], after


def turned(x: Tensor) -> Tensor:
    """(M, N) → (N, M), contiguous, without a gradient; ``copy_`` goes tile by tile, ``contiguous`` does not."""
    return x.new_empty((x.shape[1], x.shape[0])).copy_(x.t())


class _Transpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return turned(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return turned(grad)


def transpose(x: Tensor) -> Tensor:
    """(M, N) → (N, M), contiguous, and so is its gradient.

    The gradient of ``x.t().contiguous()`` is a strided view, which the batched products of the backward pass take
    apart channel by channel, in hundreds of copies.
    """
    return _Transpose.apply(x)


def powers(base: Tensor, count: int) -> Tensor:
    """``base^0 … base^(count - 1)`` along a new last axis; many times faster than complex ``**``.

    Powers up to about the root of ``count`` by doubling, then all products of small and large ones.
    """
    if count <= 16:
        return _powers_by_doubling(base, count)
    step = math.isqrt(count - 1) + 1
    small = _powers_by_doubling(base, step + 1)
    large = _powers_by_doubling(small[..., step], -(-count // step))
    return (large.unsqueeze(-1) * small[..., None, :step]).flatten(-2)[..., :count]


def _powers_by_doubling(base: Tensor, count: int) -> Tensor:
    found = torch.stack((torch.ones_like(base), base), -1)
    while found.shape[-1] < count:
        next_power = (found[..., -1] * base).unsqueeze(-1)
        found = torch.cat((found, found * next_power), -1)
    return found[..., :count]


SCAN_GROUP = 32
"""Blocks scanned one after the other before groups are scanned the same way."""


def _states(decay: Tensor, added: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each block and after the last: ``S_(q+1) = decay S_q + added_q``.

    Args:
        decay: (H, n) complex, over one block.
        added: (H, B, Q, n) complex.
        start: (H, B, n) complex, before the first block; zero if None.

    Returns:
        (H, B, Q, n) and (H, B, n). Groups of blocks are scanned side by side, then their ends, so Q blocks take
        about 2 sqrt(Q) steps.
    """
    H, B, Q, n = added.shape
    if Q <= SCAN_GROUP:
        return _scan(decay[:, None], added, start)
    groups = -(-Q // SCAN_GROUP)
    padded = F.pad(torch.view_as_real(added), (0, 0, 0, 0, 0, groups * SCAN_GROUP - Q))
    grouped = torch.view_as_complex(padded.contiguous()).view(H, B, groups, SCAN_GROUP, n)
    inside, ends = _scan(decay[:, None, None], grouped, None)  # (H, B, groups, ..., n)
    carried, _ = _states(decay**SCAN_GROUP, ends, start)  # (H, B, groups, n)
    fading = powers(decay, SCAN_GROUP).transpose(1, 2)  # (H, SCAN_GROUP, n)
    before = inside + fading[:, None, None] * carried.unsqueeze(3)
    before = before.view(H, B, groups * SCAN_GROUP, n)[:, :, :Q]
    return before, decay[:, None] * before[:, :, -1] + added[:, :, -1]


def _scan(decay: Tensor, added: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each entry of the next-to-last axis, and the one after the last."""
    states = [torch.zeros_like(added[..., 0, :]) if start is None else start]
    for entry in added.unbind(-2):
        states.append(torch.addcmul(entry, decay, states[-1]))
    return torch.stack(states[:-1], -2), states[-1]
