"""What a bundle ships: loaded strictly, contradictions named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from s4mil_monai.errors import BundleError, WeightsError
from s4mil_monai.models.bundle import load_bundle

SHIPPED = Path(__file__).resolve().parents[2] / "bundles" / "s4mil_slide"


@pytest.fixture
def copy(bundle, tmp_path):
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def edit(folder: Path, change) -> None:
    path = folder / "configs" / "metadata.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


def test_bundle_gives_the_model_its_metadata_describes(bundle):
    loaded = load_bundle(bundle)
    assert loaded.record.bundle == "tiny"
    assert loaded.settings.classes == ("normal", "tumour")
    assert loaded.model(torch.zeros(1, 3, 1280)).logits.shape == (1, 2)


def test_shipped_bundle_loads_and_metadata_matches_its_weights():
    loaded = load_bundle(SHIPPED)
    assert loaded.settings.network.in_features == loaded.settings.encoder.width == 1280
    metadata = json.loads((SHIPPED / "configs" / "metadata.json").read_text())
    image = metadata["network_data_format"]["inputs"]["image"]
    assert (image["num_channels"], image["spatial_shape"]) == (1280, ["*"])
    assert metadata["version"] in metadata["changelog"]


def test_shipped_weights_were_made_for_the_packaged_encoder(lite0):
    assert load_bundle(SHIPPED).settings.encoder.sha256 == lite0.fingerprint


def test_folder_without_metadata_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle: configs/metadata\.json is missing"):
        load_bundle(tmp_path)


def test_missing_weights_are_named(copy):
    (copy / "models" / "model.pt").unlink()
    with pytest.raises(WeightsError, match=r"model\.pt: there is no such weights file"):
        load_bundle(copy)


def test_damaged_weights_are_named(copy):
    path = copy / "models" / "model.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(WeightsError, match=r"model\.pt: damaged"):
        load_bundle(copy)


def test_weights_of_another_size_say_which_parameter(copy):
    edit(copy, lambda m: m["s4mil"]["network"].update(width=32))
    with pytest.raises(
        WeightsError, match=r"size differs: model\.project\.weight is \(16, 1280\), wanted \(32, 1280\)"
    ):
        load_bundle(copy)


def test_exchanged_weights_are_noticed(copy):
    path = copy / "models" / "model.pt"
    state = torch.load(path, weights_only=True)
    state["model.head.bias"] += 1
    torch.save(state, path)
    with pytest.raises(WeightsError, match=r"is not the file that metadata\.json describes"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("s4mil"), "s4mil"),
        (lambda m: m["s4mil"].update(classes=["one"]), "1 class names for 2 logits"),
        (
            lambda m: m["s4mil"]["encoder"].update(width=1024),
            "encoder of width 1024 for a network that takes 1280",
        ),
        (lambda m: m["s4mil"]["patches"].update(colour="red"), r"s4mil\.patches\.colour: Extra inputs"),
        (lambda m: m["s4mil"]["patches"].update(mpp=-1), r"s4mil\.patches\.mpp: Input should be greater than 0"),
    ],
)
def test_metadata_that_contradicts_itself_is_refused_with_the_place(copy, change, message):
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        load_bundle(copy)


def test_shipped_metadata_is_what_monais_newest_schema_asks_for(shared):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((shared / "reference" / "meta_schema_20240725.json").read_text())
    metadata = json.loads((SHIPPED / "configs" / "metadata.json").read_text())
    jsonschema.validate(metadata, schema)
    assert metadata["schema"].endswith("meta_schema_20240725.json")
