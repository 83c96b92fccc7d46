"""Reading weights without running code from them, loading them strictly, and telling them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from s4mil_monai.errors import WeightsError


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file.

    Raises:
        WeightsError: There is no such file, or it is damaged.
    """
    if not path.is_file():
        raise WeightsError(str(path), "there is no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(str(path), "damaged, or not a weights file; copy or download it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(str(path), "holds no table of parameters (state dict)")
    return dict(state)


def load_state(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load parameters, refusing any that are missing, left over or of another shape.

    Raises:
        WeightsError: Names what does not fit.
    """
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in wanted]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, wanted {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    for what, keys in (("lacks", missing), ("has also", extra), ("size differs:", shapes)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise WeightsError(str(path), f"weights of another network: {what} {keys[0]}{more}")
    network.load_state_dict(state, strict=False)


def fingerprint_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):
            continue  # counts training steps, changes nothing
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
