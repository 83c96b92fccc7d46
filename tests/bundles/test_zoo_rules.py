"""The rules of MONAI's model zoo, and of MONAI's bundle specification, over every bundle here."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.scripts import ckpt_export, verify_metadata, verify_net_in_out

from s4mil_monai.features.store import load_bag, save_bag
from s4mil_monai.models.bundle import load_bundle
from s4mil_monai.streaming.export import export_step
from tests.features.test_store import make_bag
from tests.training.test_train_bundle import ONE_THREAD, command

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
NAMES = ["s4mil_multitask", "s4mil_slide", "wsi_patch_embedding"]
SLIDE_MODELS = ["s4mil_multitask", "s4mil_slide"]
CONFIGS = [(name, "inference") for name in NAMES] + [
    (name, config) for name in SLIDE_MODELS for config in ("train", "evaluate", "inference")
]
REQUIRED_TEXT = (
    "version",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "task",
    "description",
    "authors",
    "copyright",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
    pytest.mark.filterwarnings("ignore:No hash value provided:UserWarning"),
]


def metadata(name: str) -> dict:
    return json.loads((BUNDLES / name / "configs" / "metadata.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """Feature files that the shipped slide models take, with labels."""
    folder = tmp_path_factory.mktemp("features")
    settings = metadata("s4mil_slide")["s4mil"]
    encoder, patches = settings["encoder"], settings["patches"]
    for i in range(6):
        bag = make_bag(5 + i, encoder["width"])
        origin = replace(
            bag.origin, encoder=encoder["name"], encoder_sha256=encoder["sha256"], patch_mpp=patches["mpp"],
            patch_side_px=patches["side_px"], scan_order=patches["scan_order"], overlap_px=0,
        )  # fmt: skip
        values = np.abs(np.random.default_rng(i).normal(size=bag.features.shape)).astype(np.float32)
        save_bag(folder / f"s{i}.h5", replace(bag, features=values, origin=origin))
    rows = "".join(f"s{i},{i % 2},p{i // 2}\n" for i in range(6))
    (folder / "labels.csv").write_text("slide,label,patient\n" + rows)
    return folder


def workflow(name: str, config: str, **overrides) -> ConfigWorkflow:
    kind = "train" if config == "train" else "infer"
    file = str(BUNDLES / name / "configs" / f"{config}.yaml")
    return ConfigWorkflow(file, workflow_type=kind, logging_file=False, **overrides)


@pytest.mark.parametrize("name", NAMES)
def test_bundle_has_the_files_the_zoo_wants(name):
    folder = BUNDLES / name
    for file in (
        "LICENSE",
        "configs/metadata.json",
        "models/model.pt",
        "configs/inference.yaml",
        "docs/README.md",
    ):
        assert (folder / file).is_file(), file
    assert "Apache License" in (folder / "LICENSE").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_no_file_in_git_is_too_large_for_the_zoo(name):
    for path in (BUNDLES / name).rglob("*"):
        assert not path.is_file() or path.stat().st_size < 25e6, f"{path}: belongs into large_files.yml"


@pytest.mark.parametrize("name", NAMES)
def test_metadata_says_what_the_schema_wants(name):
    found = metadata(name)
    assert found["name"] == name
    assert found["schema"].endswith("meta_schema_20240725.json")
    assert all(isinstance(found[key], str) and found[key] for key in REQUIRED_TEXT)
    assert found["version"] in found["changelog"]
    packages = found["required_packages_version"]
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in packages.items())
    for entry in (
        found["network_data_format"]["inputs"]["image"],
        found["network_data_format"]["outputs"]["pred"],
    ):
        assert isinstance(entry["type"], str)
        assert isinstance(entry["format"], str)
        assert isinstance(entry["num_channels"], int)
        assert isinstance(entry["spatial_shape"], list)
        assert isinstance(entry["value_range"], list)
        assert isinstance(entry["is_patch_data"], bool)
        assert isinstance(entry["channel_def"], dict)


@pytest.mark.parametrize("name", NAMES)
def test_metadata_passes_monais_own_schema(name, shared):
    schema = shared / "reference" / "meta_schema_20240725.json"
    verify_metadata(str(BUNDLES / name / "configs" / "metadata.json"), filepath=str(schema))


@pytest.mark.parametrize("name", SLIDE_MODELS)
def test_weights_are_those_the_metadata_describes(name):
    settings = metadata(name)["s4mil"]
    content = (BUNDLES / name / settings["weights"]["path"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == settings["weights"]["sha256"]
    inputs = metadata(name)["network_data_format"]["inputs"]["image"]
    assert inputs["num_channels"] == settings["network"]["in_features"] == settings["encoder"]["width"]


@pytest.mark.parametrize("name, config", sorted(set(CONFIGS)))
def test_workflow_has_the_properties_monai_asks_for(name, config, features, tissue_slide, tmp_path):
    data = {"wsi_patch_embedding": tissue_slide}.get(name, features)
    options = {} if config == "train" else {"dataset_dir": str(data)}
    quiet = {"quiet": True} if config == "train" else {}
    found = workflow(name, config, output_dir=str(tmp_path), **options, **quiet)
    found.initialize()
    assert found.check_properties() == []
    found.finalize()


@pytest.mark.parametrize("name", NAMES)
def test_network_takes_and_gives_what_the_metadata_says(name):
    folder = BUNDLES / name
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(folder / "configs" / "metadata.json"),
        config_file=str(folder / "configs" / "inference.yaml"),
        bundle_root=str(folder),
    )


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_exports_to_torchscript_and_gives_the_same_numbers(name, tmp_path):
    folder = BUNDLES / name
    config, meta = str(folder / "configs" / "inference.yaml"), str(folder / "configs" / "metadata.json")
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(folder / "models" / "model.pt"),
        config_file=config,
        meta_file=meta,
        bundle_root=str(folder),
    )
    parser = ConfigParser()
    parser.read_config(config)
    parser.read_meta(meta)
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    image = metadata(name)["network_data_format"]["inputs"]["image"]
    shape = [70 if side == "*" else side for side in image["spatial_shape"]]
    batch = torch.rand(2, image["num_channels"], *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            torch.jit.load(tmp_path / "model.ts")(batch), network(batch), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", SLIDE_MODELS)
def test_evaluation_writes_predictions_and_metrics_of_labelled_features(name, features, tmp_path):
    evaluation = workflow(name, "evaluate", dataset_dir=str(features), output_dir=str(tmp_path), fold=2)
    evaluation.initialize()
    evaluation.run()
    rows = pd.read_csv(tmp_path / "predictions.csv")
    assert list(rows.columns) == ["model", "fold", "slide", "patient", "label", "p_0", "p_1"]
    assert rows["slide"].tolist() == [f"s{i}" for i in range(6)]
    assert rows["patient"].tolist() == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert rows["label"].tolist() == [0, 1] * 3
    assert (rows["fold"] == 2).all()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["accuracy"] == pytest.approx(((rows["p_1"] > rows["p_0"]) == rows["label"]).mean())
    assert 0 <= metrics["auroc"] <= 1


@pytest.mark.parametrize("name", SLIDE_MODELS)
def test_evaluation_refuses_features_of_another_resolution_than_the_models(name, features, tmp_path):
    for file in features.glob("*.h5"):
        bag = load_bag(file)
        save_bag(tmp_path / file.name, replace(bag, origin=replace(bag.origin, patch_mpp=2.0)))
    shutil.copy(features / "labels.csv", tmp_path)
    evaluation = workflow(name, "evaluate", dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    evaluation.initialize()
    with pytest.raises(RuntimeError) as refused:
        evaluation.run()
    wanted = "trained with patch_mpp 0.5, and features have 2 for line 2 (s0), line 3 (s1)"
    assert wanted in _first_cause(refused.value)


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def test_inference_is_a_command_and_agrees_with_evaluation(features, tmp_path):
    file = BUNDLES / "s4mil_slide" / "configs" / "inference.yaml"
    settings = {"config_file": str(file), "dataset_dir": str(features), "output_dir": "wrong"}
    (tmp_path / "args.json").write_text(json.dumps(settings))
    arguments = [*command()[:-1], "--args_file=args.json", f"--output_dir={tmp_path / 'scored'}"]
    finished = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=ONE_THREAD)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = pd.read_csv(tmp_path / "scored" / "predictions.csv")
    assert rows["label"].isna().all()
    evaluation = workflow(
        "s4mil_slide", "evaluate", dataset_dir=str(features), output_dir=str(tmp_path / "evaluated")
    )
    evaluation.initialize()
    evaluation.run()
    wanted = pd.read_csv(tmp_path / "evaluated" / "predictions.csv")
    np.testing.assert_allclose(rows[["p_0", "p_1"]], wanted[["p_0", "p_1"]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SLIDE_MODELS)
def test_exported_step_runs_through_the_bundle_and_agrees_with_pytorch(name, features, tmp_path):
    """TensorRT's overlay, with its ONNX graph in ONNX Runtime; the overlay itself runs where there is a GPU."""
    bundle = shutil.copytree(BUNDLES / name, tmp_path / name)
    export_step(load_bundle(bundle), bundle / "models", to="onnx", chunk=64)
    scored = {}
    for overlays, options in (([], {}), (["inference_trt"], {"runtime": "onnxruntime"})):
        files = [str(bundle / "configs" / f"{stem}.yaml") for stem in ("inference", *overlays)]
        out = tmp_path / "-".join(["out", *overlays])
        inference = ConfigWorkflow(
            files, workflow_type="infer", logging_file=False, bundle_root=str(bundle), dataset_dir=str(features),
            output_dir=str(out), **options,
        )  # fmt: skip
        inference.initialize()
        assert inference.check_properties() == []
        inference.run()
        scored[len(overlays)] = pd.read_csv(out / "predictions.csv")
    np.testing.assert_allclose(scored[0][["p_0", "p_1"]], scored[1][["p_0", "p_1"]], rtol=1e-4, atol=1e-6)


def test_one_part_of_a_split_is_evaluated_with_the_overlays_of_the_training(features, tmp_path):
    files = [str(BUNDLES / "s4mil_slide" / "configs" / f"{name}.yaml") for name in ("evaluate", "features")]
    options = {"dataset_dir": str(features), "output_dir": str(tmp_path), "fold": 1, "split::folds": 3}
    evaluation = ConfigWorkflow(
        files, workflow_type="infer", logging_file=False, evaluated="$@split.validation", **options
    )
    evaluation.initialize()
    evaluation.run()
    rows = pd.read_csv(tmp_path / "predictions.csv")
    assert rows["patient"].nunique() == 1  # of three


@pytest.mark.parametrize("path", sorted(BUNDLES.rglob("*.yaml")), ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_configuration_instantiates_nothing_but_this_package_and_the_libraries_it_names(path):
    def targets(value) -> list[str]:
        if isinstance(value, dict):
            here = [value["_target_"]] if "_target_" in value else []
            return here + [found for entry in value.values() for found in targets(entry)]
        return [found for entry in value for found in targets(entry)] if isinstance(value, list) else []

    for target in targets(yaml.safe_load(path.read_text(encoding="utf-8"))):
        assert target.split(".")[0] in {"s4mil_monai", "monai", "ignite", "torch"}, target
