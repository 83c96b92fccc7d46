"""From slides and a table of labels to a model of one's own that scores slides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import onnx
import pytest
import torch
from monai.bundle import ConfigWorkflow
from pandas import read_csv

from s4mil_monai.cli.main import main
from s4mil_monai.features.store import load_bag
from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.bundle import load_bundle
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.models.seal import verify_bundle
from s4mil_monai.result import read_result
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.training.new_bundle import read_sizes
from s4mil_monai.weights import load_state, read_weights
from tests.conftest import tissue_picture
from tests.features.test_encoder_file import colour_mean_onnx, describe
from tests.training.test_train_bundle import TINY, train


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory) -> Path:
    """Six slides, their features with labels, and a training on them."""
    folder = tmp_path_factory.mktemp("laboratory")
    (folder / "slides").mkdir()
    rows = ["slide,label"]
    for number in range(6):
        write_pyramid(tissue_picture(seed=number), folder / "slides" / f"s{number}.tif", mpp=0.5)
        rows.append(f"s{number},{number % 2}")
    assert call("embed", folder / "slides", "--out", folder / "features", "--runtime", "torch") == 0
    (folder / "features" / "labels.csv").write_text("\n".join(rows) + "\n")
    fit(folder / "training", folder / "features")
    return folder


def fit(out: Path, features: Path, **settings) -> Path:
    options = {"split::folds": 3, "dataset_dir": str(features), **TINY, **settings}
    return train(out, "features", epochs=1, **options)


@pytest.fixture(scope="module")
def made(laboratory) -> Path:
    out = laboratory / "lung.1"
    options = ("--features", laboratory / "features", "--classes", "normal, tumour")
    assert call("bundle", laboratory / "training", "--out", out, *options) == 0
    return out


def test_it_scores_a_slide_with_the_weights_that_were_trained(laboratory, made, tmp_path):
    slide = laboratory / "slides" / "s3.tif"
    assert call("score", slide, "--bundle", made, "--out", tmp_path) == 0
    result = read_result(tmp_path / "s3" / "result.json")
    network = SlideLogits(S4MIL(1280, width=8, state_dim=4)).eval()
    load_state(network, read_weights(laboratory / "training" / "model.pt"), made)
    features = torch.from_numpy(load_bag(laboratory / "features" / "s3.h5").features)
    expected = network(features.T[None])[0].softmax(0)
    assert result.probabilities == pytest.approx(expected.tolist(), abs=1e-5)
    assert result.classes == ("normal", "tumour")
    assert result.model.bundle == "lung.1"


def test_monais_command_predicts_with_it_and_not_with_the_one_it_was_trained_with(laboratory, made, tmp_path):
    config, meta = (str(made / "configs" / name) for name in ("inference.yaml", "metadata.json"))
    options = {"bundle_root": str(made), "dataset_dir": str(laboratory / "features"), "output_dir": str(tmp_path)}
    workflow = ConfigWorkflow(config, meta, logging_file=False, workflow_type="inference", **options)
    workflow.initialize()
    workflow.run()
    rows = read_csv(tmp_path / "predictions.csv").set_index("slide")
    assert call("score", laboratory / "slides" / "s4.tif", "--bundle", made, "--out", tmp_path / "o") == 0
    probabilities = read_result(tmp_path / "o" / "s4" / "result.json").probabilities
    np.testing.assert_allclose(rows.loc["s4", ["p_0", "p_1"]].astype(float), probabilities, atol=1e-5)


def test_it_is_sealed_and_no_configuration_names_the_bundle_it_was_made_with(made):
    verify_bundle(made)
    for file in (made / "configs").rglob("*.yaml"):
        assert "s4mil_slide" not in file.read_text(), file
    assert (made / "configs" / "models" / "clam_sb.yaml").is_file()
    card = (made / "docs" / "README.md").read_text()
    assert "not cleared for diagnosis" in card
    assert "- 1: tumour" in card
    assert "demonstration" not in json.dumps(json.loads((made / "configs" / "metadata.json").read_text()))


def test_a_multitask_training_becomes_a_multitask_bundle(laboratory, tmp_path):
    training = tmp_path / "training"
    shutil.copytree(laboratory / "training", training)
    torch.manual_seed(3)
    network = SlideLogits(S4MIL(1280, width=8, state_dim=6, layers=2, classes=3, patch_classes=4))
    torch.save(network.state_dict(), training / "model.pt")
    out = tmp_path / "multi"
    options = ("--features", laboratory / "features", "--classes", "a,b,c")
    assert call("bundle", training, "--out", out, *options) == 0
    sizes = load_bundle(out).settings.network
    assert sizes.model_dump() == {
        "in_features": 1280, "classes": 3, "width": 8, "state_dim": 6, "layers": 2, "patch_classes": 4,
    }  # fmt: skip
    assert "@_meta_::s4mil::network::patch_classes" in (out / "configs" / "inference.yaml").read_text()


def test_a_model_on_a_sites_own_encoder_scores_where_its_file_is_given(laboratory, tmp_path, capsys):
    onnx.save(colour_mean_onnx(), tmp_path / "model.onnx")
    encoder, slide = describe(tmp_path / "model.onnx"), laboratory / "slides" / "s0.tif"
    features = tmp_path / "features"
    for number in range(6):
        options = ("--encoder", encoder, "--mpp", 0.5, "--out", features)
        assert call("embed", laboratory / "slides" / f"s{number}.tif", *options) == 0
    shutil.copy(laboratory / "features" / "labels.csv", features)
    fit(tmp_path / "training", features)
    options = ("--out", tmp_path / "own", "--features", features, "--classes", "a,b")
    assert call("bundle", tmp_path / "training", *options) == 0
    score = ("score", slide, "--bundle", tmp_path / "own", "--out", tmp_path / "o")
    assert call(*score, "--encoder", encoder) == 0
    assert read_result(tmp_path / "o" / "s0" / "result.json").encoder.name == "colour_mean"
    capsys.readouterr()
    assert call(*score) != 0
    assert "colour_mean" in capsys.readouterr().err


def refusal(capsys, laboratory, training, *, out=None, classes="a,b", features=None) -> str:
    out = out or laboratory / "refused"
    features = features or laboratory / "features"
    before = out.exists()
    code = call("bundle", training, "--out", out, "--features", features, "--classes", classes)
    (line,) = capsys.readouterr().err.splitlines()
    assert code in (1, 2)
    assert out.exists() == before
    assert not list(out.parent.glob(".*.part"))
    return line


def test_what_no_bundle_can_be_made_of_is_refused_in_one_line(laboratory, made, tmp_path, capsys):
    training = laboratory / "training"
    capsys.readouterr()
    assert "is there already" in refusal(capsys, laboratory, training, out=made)
    assert "no name for a bundle" in refusal(capsys, laboratory, training, out=tmp_path / "it's")
    assert "2 classes; 3 names" in refusal(capsys, laboratory, training, classes="a,b,c")
    assert "different names" in refusal(capsys, laboratory, training, classes="a,a")
    assert "not the folder of a training" in refusal(capsys, laboratory, laboratory / "features")
    assert "no feature files" in refusal(capsys, laboratory, training, features=laboratory / "slides")


def test_a_training_that_has_not_ended_or_that_slides_cannot_be_scored_with_is_refused(
    laboratory, tmp_path, capsys
):
    capsys.readouterr()
    unfinished = shutil.copytree(laboratory / "training", tmp_path / "unfinished")
    (unfinished / "metrics.json").unlink()
    assert "has not ended" in refusal(capsys, laboratory, unfinished)
    for key, value, said in (
        (("network_def", "model", "_target_"), "s4mil_monai.models.clam.ClamSB", "ClamSB"),
        (("network_def", "model", "discretization"), "bilinear", "discretization"),
        (("split", "standardize"), True, "standardised"),
    ):
        other = shutil.copytree(laboratory / "training", tmp_path / said)
        run = json.loads((other / "config.json").read_text())
        inside = run["config"]
        for name in key[:-1]:
            inside = inside[name]
        inside[key[-1]] = value
        (other / "config.json").write_text(json.dumps(run))
        assert said in refusal(capsys, laboratory, other)
    (unfinished / "metrics.json").write_text("{}")
    torch.save({"a": torch.zeros(1)}, unfinished / "model.pt")
    assert "not an S4MIL" in refusal(capsys, laboratory, unfinished)


def test_features_that_differ_or_are_of_another_resolution_are_refused(laboratory, tmp_path, capsys):
    capsys.readouterr()
    features = shutil.copytree(laboratory / "features", tmp_path / "features")
    with h5py.File(features / "s5.h5", "r+") as file:
        file.attrs["scan_order"] = "hilbert"
    line = refusal(capsys, laboratory, laboratory / "training", features=features)
    assert "s5.h5 is not like s0.h5" in line
    assert "scan order: hilbert" in line


@pytest.mark.parametrize("sizes", [{"width": 8, "state_dim": 2}, {"width": 6, "state_dim": 4, "layers": 3}])
def test_sizes_are_read_off_the_weights(tmp_path, sizes):
    torch.save(SlideLogits(S4MIL(5, classes=3, **sizes)).state_dict(), tmp_path / "model.pt")
    found = read_sizes(tmp_path / "model.pt").model_dump()
    assert found == {"in_features": 5, "classes": 3, "layers": 1, "patch_classes": None, **sizes}
