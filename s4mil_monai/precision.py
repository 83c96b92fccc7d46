"""The precisions that products are computed in."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from s4mil_monai.errors import UnknownNameError

Precision = Literal["float32", "bfloat16", "float16"]

PRECISIONS: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Precision)}
"""Of products and activations, by name."""


def find_precision(name: str) -> torch.dtype:
    """The precision of a name.

    Raises:
        UnknownNameError: Lists the known ones.
    """
    if name not in PRECISIONS:
        raise UnknownNameError("precision", name, tuple(PRECISIONS))
    return PRECISIONS[name]
