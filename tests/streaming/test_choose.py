"""Which runtime is taken, and what is said of those that are not."""

from __future__ import annotations

import shutil

import pytest
import torch

from s4mil_monai.errors import ExportError, UnknownNameError
from s4mil_monai.models.bundle import load_bundle
from s4mil_monai.models.seal import seal_bundle, verify_bundle
from s4mil_monai.streaming.choose import CPU_CHUNK, open_runtime
from s4mil_monai.streaming.network import StreamedSlideLogits
from tests.streaming.conftest import CHUNK, D, make_bundle

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")


def test_auto_is_pytorch_on_a_cpu_and_needs_no_export(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    chosen = open_runtime(load_bundle(folder), folder / "models")
    assert (chosen.runtime.name, chosen.runtime.shape.chunk, chosen.passed_over) == ("torch", CPU_CHUNK, ())


@without_gpu
def test_engine_without_a_gpu_is_refused_with_what_is_missing(exported):
    with pytest.raises(ExportError, match="TensorRT runs on an NVIDIA GPU, and this machine has none"):
        open_runtime(exported.bundle, exported.models, name="tensorrt")


def test_exported_step_that_was_asked_for_and_is_not_there_says_how_to_make_it(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    with pytest.raises(ExportError, match=r"step_float32\.onnx: is not there; make it with s4mil export"):
        open_runtime(load_bundle(folder), folder / "models", name="onnxruntime")


def test_runtime_that_does_not_exist_is_refused(exported):
    with pytest.raises(UnknownNameError, match="known: auto, torch, onnxruntime, tensorrt"):
        open_runtime(exported.bundle, exported.models, name="cpu")


@pytest.mark.gpu
def test_engine_is_rebuilt_from_the_graph_where_none_fits(exported, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(exported.folder, folder)
    for engine in folder.glob("models/*.engine*"):
        engine.unlink()
    seal_bundle(folder)
    assert open_runtime(load_bundle(folder), folder / "models", device="cuda").runtime.name == "tensorrt"
    assert list(folder.glob("models/*.engine"))
    verify_bundle(folder)


@pytest.mark.gpu
def test_auto_on_a_gpu_without_a_step_is_pytorch_and_says_why(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    chosen = open_runtime(load_bundle(folder), folder / "models", device="cuda")
    assert chosen.runtime.name == "torch"
    assert "tensorrt: " in chosen.passed_over[0]


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_streamed_network_stands_in_for_the_bundles_own(exported, runtime):
    network = StreamedSlideLogits(exported.folder, runtime=runtime)
    image = torch.randn(2, D, 2 * CHUNK + 9)
    with torch.inference_mode():
        wanted = exported.bundle.model(image.transpose(1, 2)).logits
    torch.testing.assert_close(network(image), wanted, atol=1e-5, rtol=1e-5)
