"""Lookahead: k fast steps of an optimizer, then a step of the slow weights towards them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Lookahead(Optimizer):
    """Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS 2019.

    Args:
        optimizer: Takes the fast steps.
        k: Fast steps for each slow one. The paper of S4MIL names Lookahead without its settings; these are
            its authors' defaults.
        alpha: Share of the way the slow weights go.
    """

    def __init__(self, optimizer: Optimizer, *, k: int = 5, alpha: float = 0.5):
        if k < 1 or not 0 < alpha <= 1:
            raise ValueError(f"k is at least 1 and alpha in (0, 1], got k={k}, alpha={alpha}")
        self.optimizer, self.k, self.alpha = optimizer, k, alpha
        self.fast_steps = 0
        self._slow = [p.detach().clone() for p in self._parameters()]
        super().__init__([{"params": self._parameters()}], {})
        self.param_groups = optimizer.param_groups  # schedulers and handlers see the real learning rates
        self.state = defaultdict(dict)

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a fast step, and after every k-th the slow one."""
        loss = self.optimizer.step(closure)
        self.fast_steps += 1
        if self.fast_steps % self.k == 0:
            for slow, fast in zip(self._slow, self._parameters(), strict=True):
                slow.lerp_(fast, self.alpha)
                fast.copy_(slow)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on where one stopped."""
        return {"optimizer": self.optimizer.state_dict(), "slow": self._slow, "fast_steps": self.fast_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a :meth:`state_dict` was taken."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups = self.optimizer.param_groups
        self._slow = [slow.clone() for slow in state_dict["slow"]]
        self.fast_steps = state_dict["fast_steps"]
