"""What is exported: a graph any library reads, an engine that builds, and a manifest that is true."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from s4mil_monai.errors import ExportError, FeatureFileError, MisfitError, MissingExtraError, UnknownNameError
from s4mil_monai.features.store import save_bag
from s4mil_monai.models.bundle import load_bundle
from s4mil_monai.streaming import export as export_module
from s4mil_monai.streaming.chunk_step import ChunkStep
from s4mil_monai.streaming.export import export_step
from s4mil_monai.streaming.manifest import TensorRTRecord, check_file, manifest_path, read_manifest
from s4mil_monai.streaming.onnx_export import INPUTS, OPSET, OUTPUTS, to_onnx
from s4mil_monai.streaming.onnx_runtime import load_onnx
from s4mil_monai.streaming.parity import Parity, measure_parity, refuse_if_inexact
from s4mil_monai.streaming.real_bags import load_real_bags
from s4mil_monai.streaming.tensorrt_build import (
    build_engine,
    check_targets,
    choose_library,
    deserialize,
    load_library,
)
from s4mil_monai.streaming.tensorrt_runtime import check_fit, load_engine
from s4mil_monai.streaming.torch_runtime import TorchRuntime
from tests.features.test_store import make_bag
from tests.streaming.conftest import CHUNK, D, ExportedBundle, make_bundle, make_model


@pytest.fixture
def copied(exported, tmp_path) -> ExportedBundle:
    """The same files, to be damaged."""
    folder = tmp_path / "bundle"
    shutil.copytree(exported.folder, folder)
    return ExportedBundle(folder, load_bundle(folder))


def test_graph_has_fixed_shapes_named_ends_and_no_custom_operators(exported):
    graph = onnx.load(exported.models / "step_float32.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", OPSET)]
    assert {node.domain for node in graph.graph.node} == {""}
    assert tuple(entry.name for entry in graph.graph.input) == INPUTS
    assert tuple(entry.name for entry in graph.graph.output) == OUTPUTS
    for entry in (*graph.graph.input, *graph.graph.output):
        assert all(side.dim_value > 0 for side in entry.type.tensor_type.shape.dim), entry.name


def test_graph_computes_without_complex_numbers_and_without_a_transform(exported):
    operators = {node.op_type for node in onnx.load(exported.models / "step_float32.onnx").graph.node}
    assert not operators & {"DFT", "STFT", "Loop", "Scan", "If"}


def test_manifest_says_what_the_file_is_and_how_exact(exported):
    path = exported.models / "step_float32.onnx"
    manifest = read_manifest(path)
    assert manifest.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (manifest.model_sha256, manifest.opset, manifest.kind) == (exported.sha256, OPSET, "onnx")
    parity = manifest.parity
    assert (parity.by, parity.random_bags, parity.real_bags, parity.bound) == ("onnxruntime", 5, 0, 1e-5)
    assert max(parity.logits, parity.patch_logits) <= 1e-5


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_tensorrt_for_rtx_builds_an_engine_from_every_graph(exported, precision):
    graph = to_onnx(ChunkStep(exported.bundle.model, precision=precision), chunk=CHUNK)
    engine = build_engine(graph, library="tensorrt_rtx", targets=("8.6", "8.9", "12.0"))
    assert (engine.library, engine.compute_capabilities) == ("tensorrt_rtx", ("8.6", "8.9", "12.0"))
    assert len(engine.plan) > 10_000


def test_one_engine_serves_several_kinds_of_gpu_and_says_which(exported):
    manifest = check_file(
        exported.models / "step_float32.tensorrt_rtx.engine",
        kind="tensorrt",
        precision="float32",
        model_sha256=exported.sha256,
    )[1]
    graph = exported.models / "step_float32.onnx"
    assert manifest.tensorrt.compute_capabilities == ("8.6", "8.9", "12.0")
    assert manifest.tensorrt.onnx_sha256 == hashlib.sha256(graph.read_bytes()).hexdigest()
    assert manifest.parity == read_manifest(graph).parity  # the graph's, until a GPU runs the engine


def test_target_that_tensorrt_for_rtx_lacks_is_refused(exported):
    graph = (exported.models / "step_float32.onnx").read_bytes()
    with pytest.raises(ExportError, match=r"no compute capability 9\.0, only .*8\.9"):
        build_engine(graph, library="tensorrt_rtx", targets=("9.0",))


@pytest.mark.parametrize("target", ["89", "8.9.1", "eight"])
def test_target_that_is_no_compute_capability_is_refused(target):
    with pytest.raises(ExportError, match=f"no compute capability {target}, only"):
        check_targets("tensorrt_rtx", (target,))


def test_graph_that_is_damaged_builds_no_engine(exported, capfd):
    graph = (exported.models / "step_float32.onnx").read_bytes()
    with pytest.raises(ExportError, match="tensorrt_rtx cannot read the ONNX graph"):
        build_engine(graph[: len(graph) // 2], library="tensorrt_rtx", targets=("8.9",))


def test_tensorrt_itself_is_missed_by_name_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("s4mil_monai.streaming.tensorrt_build.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"s4mil-monai\[tensorrt\]"):
        choose_library("tensorrt")
    with pytest.raises(UnknownNameError, match="unknown TensorRT library 'trt'"):
        choose_library("trt")


class Skewed(torch.nn.Module):
    """A step whose logits are off by a stated amount."""

    def __init__(self, step: ChunkStep, by: float):
        super().__init__()
        self.step, self.by = step, by

    def forward(self, *inputs):
        output = self.step(*inputs)
        return (*output.state, output.patch_logits, output.logits + self.by)


@pytest.mark.parametrize("by, accepted", [(0.0, True), (1e-3, False), (float("nan"), False)])
def test_gate_refuses_a_step_whose_logits_are_off(by, accepted):
    model = make_model()
    runtime = TorchRuntime(model, chunk=CHUNK, scripted=Skewed(ChunkStep(model), by))
    parity = measure_parity(runtime, model, by="torch")
    assert (parity.logits <= parity.bound) == accepted
    if accepted:
        refuse_if_inexact(parity, precision="float32", path="step.onnx")
    else:
        with pytest.raises(ExportError, match=r"step\.onnx: its logits differ by .* at most 1e-05 is accepted"):
            refuse_if_inexact(parity, precision="float32", path="step.onnx")


class Forgetful(torch.nn.Module):
    """A step that gives every maximum to the first patch."""

    def __init__(self, step: ChunkStep):
        super().__init__()
        self.step = step

    def forward(self, *inputs):
        state, patch_logits, logits = self.step(*inputs)
        return (*state._replace(winners=torch.zeros_like(state.winners)), patch_logits, logits)


def test_gate_refuses_a_step_that_names_other_patches():
    model = make_model()
    runtime = TorchRuntime(model, chunk=CHUNK, scripted=Forgetful(ChunkStep(model)))
    parity = measure_parity(runtime, model, by="torch")
    assert max(parity.logits, parity.patch_logits) <= parity.bound
    with pytest.raises(ExportError, match="maxima of a bag to other patches than the model"):
        refuse_if_inexact(parity, precision="float32", path="step.onnx")


def test_step_of_another_precision_than_its_name_says_is_refused(copied):
    with pytest.raises(MisfitError, match=r"of another precision; .* found float32, wanted float16"):
        load_onnx(copied.models / "step_float32.onnx", precision="float16", model_sha256=copied.sha256)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": {}},
        {"shape": {"chunk": 0}},
        {"shape": {"chunk": 65}},
        {"precision": "int8"},
        {"tensorrt": {"library": "this"}},
    ],
    ids=str,
)
def test_manifest_that_was_tampered_with_is_refused_and_imports_nothing(copied, change):
    path = copied.models / "step_float32.tensorrt_rtx.engine"
    content = json.loads(manifest_path(path).read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) and value else value
    manifest_path(path).write_text(json.dumps(content))
    with pytest.raises(ExportError, match="is damaged, or of another version"):
        load_engine(path, precision="float32", model_sha256=copied.sha256)


def test_manifest_of_other_sizes_than_its_graph_is_refused(copied):
    path = copied.models / "step_float32.onnx"
    content = json.loads(manifest_path(path).read_text())
    content["shape"]["modes"] += 1
    manifest_path(path).write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"ssm is \(2, 16, 2, 4\), which its manifest does not say"):
        load_onnx(path, precision="float32", model_sha256=copied.sha256)


def test_what_a_killed_export_left_behind_is_removed_by_the_next(tmp_path):
    bundle = load_bundle(make_bundle(tmp_path / "bundle"))
    left = tmp_path / "out" / ".step_float32.ts.99.part"
    left.parent.mkdir()
    left.write_bytes(b"half")
    export_step(bundle, left.parent, to="torchscript", chunk=CHUNK)
    assert {path.name for path in left.parent.iterdir()} == {"step_float32.ts", "step_float32.ts.json"}


def test_tensorrt_that_does_not_load_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "tensorrt_rtx.py").write_text("raise ImportError('libfoo.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    with pytest.raises(ExportError, match=r"tensorrt_rtx: does not load \(libfoo\.so: cannot open\)"):
        load_library("tensorrt_rtx")
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)


def test_refused_export_writes_nothing(tmp_path, monkeypatch):
    bundle = load_bundle(make_bundle(tmp_path / "bundle"))
    inexact = Parity(
        by="torch", random_bags=5, real_bags=0, patches=9, winners=1.0, logits=1.0, patch_logits=0.0, bound=1e-5
    )
    monkeypatch.setattr(export_module, "measure_parity", lambda *args, **options: inexact)
    with pytest.raises(ExportError, match=r"differ by 1\.0e\+00"):
        export_step(bundle, tmp_path / "out", to="torchscript", chunk=CHUNK)
    assert not (tmp_path / "out").exists()


def test_real_bags_are_compared_too(exported, tmp_path):
    bag = make_bag(70, D)
    features = tmp_path / "features"
    encoder = exported.bundle.settings.encoder
    save_bag(features / "a.h5", replace(bag, origin=replace(bag.origin, encoder_sha256=encoder.sha256)))
    real = load_real_bags(features, exported.bundle)
    runtime = load_onnx(exported.models / "step_float32.onnx", precision="float32", model_sha256=exported.sha256)
    parity = measure_parity(runtime, exported.bundle.model, real_bags=real, by="onnxruntime")
    assert (parity.real_bags, [tuple(found.shape) for found in real]) == (1, [(70, D)])
    save_bag(features / "b.h5", bag)
    with pytest.raises(FeatureFileError, match=r"b\.h5: holds features of"):
        load_real_bags(features, exported.bundle)
    with pytest.raises(FeatureFileError, match="holds no feature files"):
        load_real_bags(tmp_path / "nothing", exported.bundle)


def damage_start_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def damage_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [damage_start_only, damage_one_bit])
def test_damaged_graph_is_refused_before_anything_reads_it(copied, damage):
    path = copied.models / "step_float32.onnx"
    damage(path)
    with pytest.raises(ExportError, match=r"step_float32\.onnx: is damaged"):
        load_onnx(path, precision="float32", model_sha256=copied.sha256)


def test_step_without_its_manifest_or_with_a_damaged_one_is_refused(copied):
    path = copied.models / "step_float32.onnx"
    manifest_path(path).write_text('{"format": "s4mil.step/9"}')
    with pytest.raises(ExportError, match=r"\.json: is damaged, or of another version"):
        load_onnx(path, precision="float32", model_sha256=copied.sha256)
    manifest_path(path).unlink()
    with pytest.raises(ExportError, match=r"\.json: is not there; make it with s4mil export"):
        load_onnx(path, precision="float32", model_sha256=copied.sha256)


def test_step_of_another_model_is_refused_with_both(copied):
    with pytest.raises(MisfitError, match=r"is the step of another model; .* wanted aaaaaaaaaaaa") as caught:
        load_onnx(copied.models / "step_float32.onnx", precision="float32", model_sha256="a" * 64)
    assert caught.value.found.startswith(f"weights {copied.sha256[:12]}")


def test_engine_is_no_graph(copied):
    with pytest.raises(ExportError, match="is tensorrt by its manifest, not onnx"):
        load_onnx(
            copied.models / "step_float32.tensorrt_rtx.engine", precision="float32", model_sha256=copied.sha256
        )


BUILT = TensorRTRecord(
    library="tensorrt_rtx", version="1.7.1", compute_capabilities=("8.6", "8.9"), onnx_sha256="0" * 64
)


def test_engine_fits_a_gpu_it_was_built_for():
    check_fit(BUILT, "a.engine", version="1.7.1", here="8.9")


@pytest.mark.parametrize(
    "version, here, message",
    [
        ("1.8.0", "8.9", r"another TensorRT; export it again: found tensorrt_rtx 1\.7\.1, wanted 1\.8\.0"),
        ("1.7.1", "9.0", r"other GPUs; .*: found compute capability 8\.6, 8\.9, wanted 9\.0"),
        ("1.7.1", None, "this machine has none"),
    ],
)
def test_engine_of_another_version_or_gpu_is_refused_with_what_would_fit(version, here, message):
    with pytest.raises(ExportError, match=message):
        check_fit(BUILT, "a.engine", version=version, here=here)


@pytest.mark.gpu
def test_half_of_an_engine_is_not_taken(exported, capfd):
    plan = (exported.models / "step_float32.tensorrt_rtx.engine").read_bytes()
    assert deserialize(plan[: len(plan) // 2], "tensorrt_rtx") is None


def test_engine_that_was_cut_is_refused_before_tensorrt_sees_it(copied):
    path = copied.models / "step_float32.tensorrt_rtx.engine"
    damage_start_only(path)
    with pytest.raises(ExportError, match=r"\.engine: is damaged"):
        load_engine(path, precision="float32", model_sha256=copied.sha256)


@pytest.mark.parametrize("to, precision", [("onnxx", "float32"), ("onnx", "int8")])
def test_form_and_precision_that_do_not_exist_are_refused(exported, tmp_path, to, precision):
    with pytest.raises(UnknownNameError, match="known: "):
        export_step(exported.bundle, tmp_path, to=to, precision=precision)
