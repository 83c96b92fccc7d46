"""What a bundle ships for scoring: settings and weights, read as data, checked against each other.

Scoring reads ``configs/metadata.json`` only. The bundle's YAML is code (MONAI imports every ``_target_`` and
evaluates every ``$``), and is left to ``python -m monai.bundle``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s4mil_monai.checksum import sha256_of
from s4mil_monai.errors import BundleError, WeightsError, first_wrong
from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.models.seal import kept_sealed
from s4mil_monai.result import EncoderRecord, ModelRecord, PatchSettings
from s4mil_monai.weights import load_state, read_weights

FITTED_TO_WEIGHTS = (Path("configs") / "calibration.json", Path("configs") / "drift_reference.json")
"""Files of a bundle that are of one model's weights and no other's."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkSettings(_Settings):
    """Arguments of :class:`S4MIL`."""

    in_features: int = Field(gt=0)
    classes: int = Field(ge=2)
    width: int = Field(default=512, gt=0)
    state_dim: int = Field(default=32, ge=2)
    layers: int = Field(default=1, ge=1)
    patch_classes: int | None = Field(default=None, ge=2)
    """Of the multitask form; None for the slide model."""


class WeightsSettings(_Settings):
    """The weights file, relative to the bundle."""

    path: str
    sha256: str


class BundleSettings(_Settings):
    """The ``s4mil`` section of a bundle's ``metadata.json``."""

    classes: tuple[str, ...]
    """Names, in the order of the logits."""
    network: NetworkSettings
    encoder: EncoderRecord
    patches: PatchSettings
    weights: WeightsSettings


@dataclass(frozen=True)
class Bundle:
    """A trained slide model and all it expects of a slide."""

    record: ModelRecord
    settings: BundleSettings
    model: S4MIL


def load_bundle(folder: str | Path) -> Bundle:
    """Load the slide model of a bundle.

    Raises:
        BundleError: The folder is no bundle, or its metadata contradicts itself.
        WeightsError: The weights are missing, damaged or of another size.
    """
    folder = Path(folder)
    record, settings = describe_bundle(folder)
    weights = folder / settings.weights.path
    found = _sha256(weights)
    model = S4MIL(**settings.network.model_dump())
    load_state(SlideLogits(model), read_weights(weights), weights)
    if found != settings.weights.sha256:
        raise WeightsError(
            str(weights),
            "is not the file that metadata.json describes (SHA-256 differs); retrain or restore the bundle",
        )
    return Bundle(record, settings, model.eval().requires_grad_(False))


def describe_bundle(folder: Path) -> tuple[ModelRecord, BundleSettings]:
    """What a bundle's metadata says; its weights are not looked at.

    Raises:
        BundleError: The folder is no bundle, or its metadata contradicts itself.
    """
    metadata = _read_metadata(folder)
    settings = _read_settings(folder, metadata)
    record = ModelRecord(
        bundle=str(metadata.get("name", folder.name)),
        version=str(metadata.get("version", "")),
        sha256=settings.weights.sha256,
        intended_use=str(metadata.get("intended_use", "")),
    )
    return record, settings


def _read_metadata(folder: Path) -> dict:
    path = folder / "configs" / "metadata.json"
    if not path.is_file():
        raise BundleError(str(folder), "is not a bundle: configs/metadata.json is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(str(path), f"is not JSON ({error})") from error


def _read_settings(folder: Path, metadata: dict) -> BundleSettings:
    path = str(folder / "configs" / "metadata.json")
    try:
        settings = BundleSettings.model_validate(metadata.get("s4mil"))
    except ValidationError as error:
        raise BundleError(path, first_wrong(error, within="s4mil")) from error
    if len(settings.classes) != settings.network.classes:
        raise BundleError(path, f"{len(settings.classes)} class names for {settings.network.classes} logits")
    if settings.encoder.width != settings.network.in_features:
        raise BundleError(
            path,
            f"encoder of width {settings.encoder.width} for a network that takes {settings.network.in_features}",
        )
    return settings


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise WeightsError(str(path), "there is no such weights file")
    return sha256_of(path)


def ship_weights(folder: Path, weights: Path, settings: BundleSettings) -> BundleSettings:
    """Put trained weights into a bundle and make its metadata say what they are.

    What was fitted to the weights before, calibration and drift reference, is removed.

    Args:
        folder: The bundle; its ``metadata.json`` is rewritten, and its manifest if that was true.
        weights: State dict of the training's network, as MONAI's ``CheckpointSaver`` writes it.
        settings: What the weights were trained on; the weights' fingerprint is filled in.

    Returns:
        The settings as written.

    Raises:
        WeightsError: The weights do not fit the network of the settings.
        BundleError: The folder is no bundle.
    """
    metadata = _read_metadata(folder)
    network = SlideLogits(S4MIL(**settings.network.model_dump()))
    load_state(network, read_weights(weights), weights)
    with kept_sealed(folder):
        return _write_weights(folder, network, settings, metadata)


def _write_weights(
    folder: Path, network: SlideLogits, settings: BundleSettings, metadata: dict[str, Any]
) -> BundleSettings:
    target = folder / settings.weights.path
    target.parent.mkdir(exist_ok=True)
    for fitted in FITTED_TO_WEIGHTS:
        (folder / fitted).unlink(missing_ok=True)
    torch.save(network.state_dict(), target)
    described = WeightsSettings(path=settings.weights.path, sha256=_sha256(target))
    settings = settings.model_copy(update={"weights": described})
    metadata["s4mil"] = settings.model_dump(mode="json")
    metadata["network_data_format"] = _data_format(settings)
    path = folder / "configs" / "metadata.json"
    path.write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return settings


def _data_format(settings: BundleSettings) -> dict:
    """MONAI's description of the network's input and output."""
    channels = {str(i): name for i, name in enumerate(settings.classes)}
    image = {
        "type": "feature",
        "format": "patch features, channel first, in scan order",
        "num_channels": settings.network.in_features,
        "spatial_shape": ["*"],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {"0": f"features of {settings.encoder.name}"},
    }
    pred = {
        "type": "probabilities",
        "format": "logits of the classes",
        "num_channels": settings.network.classes,
        "spatial_shape": [],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": channels,
    }
    return {"inputs": {"image": image}, "outputs": {"pred": pred}}
