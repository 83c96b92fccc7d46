"""Checkpoints of the original authors: told apart by their parameter names, loaded into our models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s4mil_monai.errors import OutputError, WeightsError
from s4mil_monai.models.bag_model import BagModel
from s4mil_monai.models.clam import ClamMB, ClamSB, clam_mb_authors_names, clam_sb_authors_names
from s4mil_monai.models.s4mil import S4MIL, authors_names
from s4mil_monai.models.transmil import AUTHORS_NAMES, TransMIL
from s4mil_monai.weights import load_state, read_weights
from s4mil_monai.whole_file import write_whole

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class ImportedModel:
    """A model with the parameters of an original checkpoint."""

    kind: str
    """``S4Model``, ``CLAM_SB``, ``CLAM_MB`` or ``TransMIL``: the class in the authors' code."""
    settings: dict[str, Any]
    """Arguments of our model, read off the shapes."""
    model: BagModel


@dataclass(frozen=True)
class _Original:
    """How to recognise a checkpoint and what to build for it."""

    kind: str
    fits: Callable[[State], bool]
    settings: Callable[[State], dict[str, Any]]
    build: Callable[..., BagModel]
    names: Callable[[int], Mapping[str, str]]
    """Number of classes → our parameter names and theirs."""


def import_checkpoint(path: str | Path) -> ImportedModel:
    """Load a checkpoint of the original authors' code.

    Takes the bare state dict those codes save; prefixes that wrappers add (``module.``, ``model.``, ``state.``)
    are taken off. CLAM's ``instance_loss_fn`` parameters, where there are any, are dropped.

    Args:
        path: ``.pt``, ``.pth`` or ``.safetensors``.

    Raises:
        WeightsError: It is missing, damaged, of none of the known models, or incomplete.
    """
    path = Path(path)
    state = _in_one_form(read_weights(path))
    for original in ORIGINALS:
        if original.fits(state):
            return _load(original, state, path)
    known = ", ".join(original.kind for original in ORIGINALS)
    raise WeightsError(
        str(path), f"is a checkpoint of none of {known}; its first parameter is {next(iter(state), None)}"
    )


def _load(original: _Original, state: State, path: Path) -> ImportedModel:
    try:
        settings = original.settings(state)
    except (KeyError, IndexError) as error:
        raise WeightsError(str(path), f"is a {original.kind} that lacks {error}") from error
    model = original.build(**settings)
    theirs_of = original.names(settings["classes"])
    missing = [theirs for theirs in theirs_of.values() if theirs not in state]
    if missing:
        raise WeightsError(str(path), f"is a {original.kind} that lacks {missing[0]}")
    # a convolution of width 1 in the authors' S4Model is a linear layer in ours
    load_state(model, {ours: _squeezed(state[theirs], ours) for ours, theirs in theirs_of.items()}, path)
    return ImportedModel(original.kind, settings, model.eval())


def _squeezed(value: Tensor, ours: str) -> Tensor:
    return value.squeeze(-1) if ours.endswith("mix.weight") and value.ndim == 3 else value


def _in_one_form(state: State) -> dict[str, Tensor]:
    """Without prefixes of wrappers, and with CLAM's attention where it stands in networks with dropout."""
    found = dict(state)
    for prefix in ("state.", "module.", "model."):
        inside = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
        found = inside or found
    found = {key.replace("attention_net.2.", "attention_net.3."): value for key, value in found.items()}
    return {key: value for key, value in found.items() if not key.startswith("instance_loss_fn")}


def _s4_settings(state: State) -> dict[str, Any]:
    width, in_features = state["fc1.0.weight"].shape
    return {
        "in_features": in_features,
        "classes": len(state["fc2.bias"]),
        "width": width,
        "state_dim": 2 * state["s4_block.1.kernel.A_imag"].shape[1],
    }


def _clam_settings(state: State) -> dict[str, Any]:
    width, in_features = state["attention_net.0.weight"].shape
    classes = len({key for key in state if key.startswith("instance_classifiers.") and key.endswith(".bias")})
    attention_width = state["attention_net.3.attention_a.0.bias"].shape[0]
    return {"in_features": in_features, "classes": classes, "width": width, "attention_width": attention_width}


def _transmil_settings(state: State) -> dict[str, Any]:
    return {"in_features": state["_fc1.0.weight"].shape[1], "classes": len(state["_fc2.bias"])}


ORIGINALS = (
    _Original("S4Model", lambda s: "s4_block.1.D" in s, _s4_settings, S4MIL, lambda classes: authors_names()),
    _Original("CLAM_SB", lambda s: "classifiers.weight" in s, _clam_settings, ClamSB, clam_sb_authors_names),
    _Original("CLAM_MB", lambda s: "classifiers.0.weight" in s, _clam_settings, ClamMB, clam_mb_authors_names),
    _Original("TransMIL", lambda s: "_fc2.bias" in s, _transmil_settings, TransMIL, lambda classes: AUTHORS_NAMES),
)


def save_imported(imported: ImportedModel, path: Path) -> None:
    """Write an imported model under our parameter names, its kind and settings in the header.

    Raises:
        OutputError: The file cannot be written.
    """
    header = {"kind": imported.kind, "settings": json.dumps(imported.settings)}
    state = {key: value.contiguous() for key, value in imported.model.state_dict().items()}
    try:
        write_whole(path, lambda part: save_file(state, part, header))
    except (OSError, SafetensorError) as error:
        raise OutputError(str(path), f"cannot be written ({error})") from error


def load_imported(path: str | Path) -> ImportedModel:
    """Read what :func:`save_imported` wrote.

    Raises:
        WeightsError: It is missing, damaged, or no imported model.
    """
    path = Path(path)
    state = read_weights(path)
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    original = next((known for known in ORIGINALS if known.kind == header.get("kind")), None)
    if original is None:
        raise WeightsError(str(path), "does not say which model it is; make it with s4mil import-checkpoint")
    settings = json.loads(header["settings"])
    model = original.build(**settings)
    load_state(model, state, path)
    return ImportedModel(original.kind, settings, model.eval())
