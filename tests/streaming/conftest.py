"""Small slide models, and one export of each that all tests share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.bundle import (
    Bundle,
    BundleSettings,
    NetworkSettings,
    WeightsSettings,
    load_bundle,
    ship_weights,
)
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.result import EncoderRecord, PatchSettings
from s4mil_monai.streaming.export import export_step

D, CHUNK = 24, 128
FORMS = {"slide": None, "multitask": 3}


def make_model(*, layers: int = 1, state_dim: int = 8, patch_classes: int | None = None, seed: int = 0) -> S4MIL:
    torch.manual_seed(seed)
    model = S4MIL(D, classes=3, width=16, state_dim=state_dim, layers=layers, patch_classes=patch_classes)
    return model.eval().requires_grad_(False)


def make_bundle(folder: Path, *, patch_classes: int | None = None, seed: int = 0) -> Path:
    """A bundle of random weights with two layers; its features are of no real encoder."""
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps({"name": folder.name, "version": "1.0"}))
    network = NetworkSettings(
        in_features=D, classes=3, width=16, state_dim=8, layers=2, patch_classes=patch_classes
    )
    torch.manual_seed(seed)
    torch.save(SlideLogits(S4MIL(**network.model_dump())).state_dict(), folder / "trained.pt")
    settings = BundleSettings(
        classes=("a", "b", "c"),
        network=network,
        encoder=EncoderRecord(name="none", sha256="0" * 64, width=D),
        patches=PatchSettings(),
        weights=WeightsSettings(path="models/model.pt", sha256=""),
    )
    ship_weights(folder, folder / "trained.pt", settings)
    return folder


@dataclass(frozen=True)
class ExportedBundle:
    """A bundle and its folder."""

    folder: Path
    bundle: Bundle

    @property
    def models(self) -> Path:
        return self.folder / "models"

    @property
    def sha256(self) -> str:
        return self.bundle.record.sha256


@pytest.fixture(scope="session", params=list(FORMS))
def exported(request, tmp_path_factory) -> ExportedBundle:
    """A bundle whose ``models`` holds its step as ONNX graph, TensorRT for RTX engine and TorchScript."""
    folder = make_bundle(tmp_path_factory.mktemp("streaming") / request.param, patch_classes=FORMS[request.param])
    bundle = load_bundle(folder)
    export_step(bundle, folder / "models", to="tensorrt", chunk=CHUNK, library="tensorrt_rtx")
    export_step(bundle, folder / "models", to="torchscript", chunk=CHUNK)
    return ExportedBundle(folder, bundle)
