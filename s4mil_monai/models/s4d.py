"""The S4D layer: a diagonal state space model for each channel, in three computations that agree.

Letters as in Gu, Gupta, Goel, Ré, "On the Parameterization and Initialization of Diagonal State Space
Models", NeurIPS 2022. For each of H channels, with n = N/2 complex modes (each standing for a conjugate pair):

- ``A`` (H, n) diagonal of the continuous system, ``Re A < 0``;
- ``C`` (H, n) output weights; the input weights ``B`` are 1, absorbed into C;
- ``dt`` (H,) step size; ``D`` (H,) skip;
- ``dA = exp(dt A)`` and ``Cd = C (dA - 1) / A``: the discrete system, zero-order hold (the authors' code;
  the paper's text says bilinear);
- ``K_l = 2 Re Σ_n Cd_n dA_n^l`` (H, L): the kernel, so that ``y = K * u + D u``.

Powers of dA are computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64
"""Patches in a block: a Toeplitz product inside, a state of N/2 complex numbers between."""

Computation = Literal["blocks", "fft", "recurrence"]


class S4D(nn.Module):
    """One S4D layer with its output mixing: ``GLU(W gelu(K * u + D u) + b)``.

    Args:
        width: H, channels in and out.
        state_dim: N, real size of each channel's state; N/2 complex modes.
        dt_min: Shortest step size at the start, log-uniform between the two.
        dt_max: Longest step size at the start.

    Raises:
        ValueError: ``state_dim`` is odd or not positive.
    """

    def __init__(self, width: int, *, state_dim: int = 32, dt_min: float = 1e-3, dt_max: float = 1e-1):
        super().__init__()
        if state_dim < 2 or state_dim % 2:
            raise ValueError(
                f"state_dim counts real numbers of conjugate pairs: even and positive, got {state_dim}"
            )
        modes = state_dim // 2
        self.width, self.state_dim = width, state_dim
        self.log_dt = nn.Parameter(torch.rand(width) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.log_A_real = nn.Parameter(torch.full((width, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(modes).float().repeat(width, 1))  # S4D-Lin
        self.C = nn.Parameter(torch.randn(width, modes, 2) * math.sqrt(0.5))  # (real, imaginary)
        self.D = nn.Parameter(torch.randn(width))
        self.mix = nn.Linear(width, 2 * width)

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, H) → (B, L, H); position l sees positions up to l only."""
        y = F.gelu(self.convolve(u))
        return F.glu(self.mix(y), dim=-1)

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
        """dA and Cd, (H, n) complex128, by zero-order hold."""
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        dA = torch.exp(A * self.log_dt.double().exp().unsqueeze(-1))
        return dA, torch.view_as_complex(self.C.double().contiguous()) * (dA - 1) / A

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
        B, L, H = u.shape
        T = min(BLOCK, L)
        Q = -(-L // T)
        u = F.pad(u, (0, 0, 0, Q * T - L)).view(B, Q, T, H)
        blocks = u.permute(3, 0, 1, 2).reshape(H, B * Q, T)
        toeplitz, inject, decay, emit = self._block_constants(T)
        y = blocks @ toeplitz  # (H, BQ, T), inside the blocks
        if Q > 1:
            ends = (blocks @ inject).view(H, B, Q, 2, -1)  # what each block adds to the state
            before = _states_before(decay, torch.complex(ends[..., 0, :], ends[..., 1, :]))
            pairs = torch.cat((before.real, before.imag), -1).view(H, B * Q, -1)
            y = torch.baddbmm(y, pairs, emit)
        return y.view(H, B, Q * T).permute(1, 2, 0)[:, :L]

    def _block_constants(self, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Float32 constants of a block of T patches.

        Returns:
            Toeplitz operator with the skip on its diagonal (H, T, T), to be multiplied from the right;
            input → state at the block's end (H, T, 2n); decay of the state over a block (H, n) complex64;
            state → output (H, 2n, T).
        """
        dA, Cd = self._discrete()
        decays = powers(dA, T + 1)  # (H, n, T + 1)
        K = 2 * (Cd.unsqueeze(-1) * decays[..., :T]).sum(1).real  # (H, T)
        K = torch.cat((K[:, :1] + self.D.double().unsqueeze(-1), K[:, 1:]), 1)
        toeplitz = F.pad(K, (T - 1, 0)).unfold(1, T, 1).flip(-1)  # [i, j] = K_(i - j)
        inject = decays[..., :T].flip(-1).transpose(1, 2)  # (H, T, n): dA^(T - 1 - j)
        emit = 2 * Cd.unsqueeze(-1) * decays[..., 1:]  # (H, n, T): Cd dA^(i + 1)
        return (
            toeplitz.transpose(1, 2).float(),
            torch.cat((inject.real, inject.imag), -1).float(),
            decays[..., T].to(torch.complex64),
            torch.cat((emit.real, -emit.imag), 1).float(),
        )


def powers(base: Tensor, count: int) -> Tensor:
    """``base^0 … base^(count - 1)`` along a new last axis, by doubling; many times faster than complex ``**``."""
    found = torch.stack((torch.ones_like(base), base), -1)
    while found.shape[-1] < count:
        next_power = (found[..., -1] * base).unsqueeze(-1)
        found = torch.cat((found, found * next_power), -1)
    return found[..., :count]


SCAN_GROUP = 32
"""Blocks scanned one after the other before groups are scanned the same way."""


def _states_before(decay: Tensor, added: Tensor) -> Tensor:
    """State before each block: ``S_0 = 0``, ``S_(q+1) = decay S_q + added_q``.

    Args:
        decay: (H, n) complex, over one block.
        added: (H, B, Q, n) complex.

    Groups of blocks are scanned side by side, then their ends, so Q blocks take about 2 sqrt(Q) steps.
    """
    H, B, Q, n = added.shape
    if Q <= SCAN_GROUP:
        return torch.stack(_scan(decay[:, None], added)[:-1], 2)
    groups = -(-Q // SCAN_GROUP)
    added = F.pad(torch.view_as_real(added), (0, 0, 0, 0, 0, groups * SCAN_GROUP - Q))
    added = torch.view_as_complex(added.contiguous()).view(H, B, groups, SCAN_GROUP, n)
    *inside, ends = _scan(decay[:, None, None], added)  # each (H, B, groups, n)
    carried = _states_before(decay**SCAN_GROUP, ends)  # (H, B, groups, n)
    fading = powers(decay, SCAN_GROUP).transpose(1, 2)  # (H, SCAN_GROUP, n)
    states = torch.stack(inside, 3) + fading[:, None, None] * carried.unsqueeze(3)
    return states.view(H, B, groups * SCAN_GROUP, n)[:, :, :Q]


def _scan(decay: Tensor, added: Tensor) -> list[Tensor]:
    """States before each entry of the next-to-last axis, then the one after the last."""
    states = [torch.zeros_like(added[..., 0, :])]
    for entry in added.unbind(-2):
        states.append(decay * states[-1] + entry)
    return states
