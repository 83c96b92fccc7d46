"""make_bundle(): a bundle of one's own from the folder of a training, ready to score slides with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from s4mil_monai.errors import BundleError, OutputError, TableError, WeightsError
from s4mil_monai.features.store import WantedFeatures, load_bag, mismatch, read_origin
from s4mil_monai.models.bundle import BundleSettings, NetworkSettings, WeightsSettings, ship_weights
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.models.seal import seal_bundle
from s4mil_monai.result import EncoderRecord, PatchSettings
from s4mil_monai.training.places import find_bundle
from s4mil_monai.training.run_folder import plain_settings
from s4mil_monai.weights import read_weights

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What a bundle may be called; the name stands in its configurations."""

_S4MIL = f"{S4MIL.__module__}.{S4MIL.__qualname__}"
_WEIGHTS = "models/model.pt"
_NOT_TAKEN_OVER = {"SHA256SUMS", "models", "docs"}
_RESEARCH = "Research use; not cleared for diagnosis"


def make_bundle(
    training: str | Path, out: str | Path, *, features: str | Path, classes: Sequence[str], mpp: float = 0.5
) -> BundleSettings:
    """Make a sealed bundle of a finished training of S4MIL, slide or multitask.

    The network's sizes are read off the weights; encoder and patches off the feature files.

    Args:
        training: output_dir of the training.
        out: The bundle, a folder that is not there yet; its name is the bundle's.
        features: Folder of the ``.h5`` files that were trained on, all of which are looked at.
        classes: Names of the labels 0, 1, ….
        mpp: µm/px that patches were embedded at.

    Returns:
        What the bundle says of itself.

    Raises:
        BundleError: The training has not ended, is of another model or of standardised features, or ``out`` cannot
            be a bundle's name.
        WeightsError: There are no weights, or they are damaged.
        TableError: The features are none, differ among themselves, or do not fit.
        OutputError: ``out`` is there already.
    """
    training, out = Path(training), Path(out)
    if not NAME.fullmatch(out.name):
        raise BundleError(str(out), "is no name for a bundle; use letters, digits and _ . -")
    if out.exists():
        raise OutputError(str(out), "is there already; give another folder")
    run = _read_finished(training)
    network = read_sizes(training / "model.pt")
    if len(classes) != network.classes:
        raise BundleError(
            str(training), f"was trained on {network.classes} classes; {len(classes)} names were given"
        )
    encoder, patches = _describe_features(Path(features), mpp)
    if encoder.width != network.in_features:
        raise TableError(
            str(features), f"features are {encoder.width} wide, the training's were {network.in_features}"
        )
    settings = BundleSettings(
        classes=tuple(classes),
        network=network,
        encoder=encoder,
        patches=patches,
        weights=WeightsSettings(path=_WEIGHTS, sha256=""),
    )
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        found = _fill(part, out.name, training, run, settings)
        part.rename(out)
    except OSError as error:
        raise OutputError(str(out), f"cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found


def read_sizes(weights: Path) -> NetworkSettings:
    """Arguments of the S4MIL whose weights these are.

    Raises:
        WeightsError: They are damaged, or not those of an S4MIL.
    """
    state = read_weights(weights)
    try:
        return _read_sizes({key.removeprefix("model."): value for key, value in state.items()})
    except (KeyError, ValueError) as error:
        raise WeightsError(str(weights), f"is not an S4MIL (it lacks {error})") from error


def _read_sizes(state: Mapping[str, Tensor]) -> NetworkSettings:
    width, in_features = state["project.weight"].shape
    patch_head = state.get("patch_head.bias")
    return NetworkSettings(
        in_features=in_features,
        classes=len(state["head.bias"]),
        width=width,
        state_dim=2 * state["blocks.0.1.A_imag"].shape[1],
        layers=sum(re.fullmatch(r"blocks\.\d+\.1\.A_imag", key) is not None for key in state),
        patch_classes=None if patch_head is None else len(patch_head),
    )


def _read_finished(training: Path) -> dict[str, Any]:
    """``config.json`` of a training that a bundle can be made of, and under ``metrics`` what it measured."""
    try:
        run = json.loads((training / "config.json").read_text(encoding="utf-8"))
        config = run["config"]
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(str(training), "is not the folder of a training: config.json is missing") from error
    model = (config.get("network_def") or {}).get("model", {})
    if model.get("_target_") != _S4MIL:
        raise BundleError(
            str(training), f"is of {model.get('_target_', 'a forest')}; a bundle scores slides with S4MIL alone"
        )
    unlike = sorted(model.keys() - {"_target_", *NetworkSettings.model_fields})
    if unlike:
        raise BundleError(str(training), f"sets {', '.join(unlike)}, which a bundle has no place for")
    if (config.get("split") or {}).get("standardize"):
        raise BundleError(str(training), "is of standardised features, which are not what a slide's encoder gives")
    try:
        metrics = json.loads((training / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(
            str(training), "has no metrics.json: its training has not ended; start it again"
        ) from error
    return {**run, "metrics": metrics}


def _describe_features(folder: Path, mpp: float) -> tuple[EncoderRecord, PatchSettings]:
    """Encoder and patches of all feature files of a folder."""
    files = sorted(folder.glob("*.h5"))
    if not files:
        raise TableError(str(folder), "has no feature files (.h5)")
    origins = [read_origin(file) for file in files]
    first = origins[0]
    patches = PatchSettings(
        mpp=mpp,
        side_px=first.patch_side_px,
        min_tissue=first.min_tissue,
        overlap_px=first.overlap_px,
        scan_order=first.scan_order,
    )
    for file, origin in zip(files, origins, strict=True):
        wanted = WantedFeatures(
            encoder=first.encoder,
            encoder_sha256=first.encoder_sha256,
            settings=patches,
            encoder_runtime=origin.encoder_runtime,
            encoder_precision=origin.encoder_precision,
        )
        differs = mismatch(origin, wanted)
        if differs is not None:
            raise TableError(str(folder), f"{file.name} is not like {files[0].name} at {mpp} µm/px: {differs}")
    return EncoderRecord(
        name=first.encoder, sha256=first.encoder_sha256, width=load_bag(files[0]).features.shape[1]
    ), patches


def _fill(
    part: Path, name: str, training: Path, run: Mapping[str, Any], settings: BundleSettings
) -> BundleSettings:
    """Write all files of the bundle."""
    kind = "s4mil_slide" if settings.network.patch_classes is None else "s4mil_multitask"
    template = Path(find_bundle(kind))
    _take_over(template, part, kind, name)
    metadata = json.loads((template / "configs" / "metadata.json").read_text(encoding="utf-8"))
    metadata |= {
        "name": name,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"made of the training {training.resolve().name} of {run.get('started', '')[:10]}"},
        "description": f"S4D for multiple instance learning (Fillioux, Boyd et al., MICCAI 2023): "
        f"{', '.join(settings.classes)}.",
        "intended_use": _RESEARCH,
        "authors": "",
        "copyright": "",
    }
    (part / "configs" / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    found = ship_weights(part, training / "model.pt", settings)
    (part / "docs").mkdir()
    (part / "docs" / "README.md").write_text(_write_card(name, kind, training, run, found), encoding="utf-8")
    seal_bundle(part)
    return found


def _take_over(template: Path, part: Path, kind: str, name: str) -> None:
    """Configurations and licence of the bundle that was trained with, which then name the new one."""
    shutil.copytree(
        template,
        part,
        ignore=lambda folder, names: _NOT_TAKEN_OVER & set(names) if Path(folder) == template else (),
    )
    for file in (part / "configs").rglob("*.yaml"):
        file.write_text(file.read_text(encoding="utf-8").replace(kind, name), encoding="utf-8")


def _write_card(name: str, kind: str, training: Path, run: Mapping[str, Any], settings: BundleSettings) -> str:
    network, patches, config = settings.network, settings.patches, run["config"]
    classes = "".join(f"- {number}: {label}\n" for number, label in enumerate(settings.classes))
    metrics = "".join(f"| {key} | {value:.4g} |\n" for key, value in run["metrics"].items() if value is not None)
    chosen = "".join(f"| {key} | {value} |\n" for key, value in sorted(plain_settings(config).items()))
    return f"""# {name}

S4MIL ({kind}), made of the training in `{training.resolve().name}`, started {run.get("started", "")}.

**{_RESEARCH}.**

Classes:

{classes}
Reads features of {settings.encoder.name} ({settings.encoder.width} wide, SHA-256
{settings.encoder.sha256}) of patches of {patches.side_px} px at {patches.mpp} µm/px,
{patches.overlap_px} px overlap, at least {patches.min_tissue:.0%} tissue, {patches.scan_order}. One projection to
{network.width}, {network.layers} S4D layer(s) with N = {network.state_dim}.

On the bags that the training held out (fold {config.get("fold", 0)}):

| metric | value |
|---|--:|
{metrics}
| setting | value |
|---|---|
{chosen}
It has no calibration until `s4mil calibrate` gives it one, and no drift reference until
`s4mil batch reference` does.
"""
