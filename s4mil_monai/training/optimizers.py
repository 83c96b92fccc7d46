"""Which parameters of a network are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn

from s4mil_monai.models.s4d import S4D

SSM_PARAMETERS = ("log_dt", "log_A_real", "A_imag")
"""Of an S4D layer: they set its time scales, which decay would pull to arbitrary ones (``A`` to -1, ``dt`` to 1).

The authors' released code marks the same three for no decay, and then ignores the mark.
"""


def group_parameters(
    network: nn.Module, *, weight_decay: float, ssm_weight_decay: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: all that decay, and the :data:`SSM_PARAMETERS`, which do not.

    Args:
        network: Any network; one without S4D layers has a single group.
        weight_decay: Of the first group.
        ssm_weight_decay: Decay the SSM's parameters like all others, as the authors' released code does.
    """
    spared = set() if ssm_weight_decay else _ssm_parameters(network)
    wanted = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in wanted if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in wanted if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _ssm_parameters(network: nn.Module) -> set[int]:
    layers = [module for module in network.modules() if isinstance(module, S4D)]
    return {id(getattr(layer, name)) for layer in layers for name in SSM_PARAMETERS}
