"""Runtimes: the same features from each, refused precisions, falling back without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s4mil_monai.errors import UnknownNameError, WeightsError
from s4mil_monai.features import encoder_runtime
from s4mil_monai.features.encoder import PublishedEncoder, _start_or_fall_back, _Starter, load_encoder
from s4mil_monai.features.encoder_cache import export_onnx
from s4mil_monai.features.encoder_runtime import (
    COMPILED_STEP,
    Processor,
    check_precision,
    find_processor,
    run_compiled,
    run_onnx,
    run_torch,
)
from tests.features.test_encoder_file import colour_mean_onnx

CPU = torch.device("cpu")
SIDE_PX = 32
OLD, NEW = Processor("Old One", has_bfloat16=False), Processor("New One", has_bfloat16=True)

needs_bfloat16 = pytest.mark.skipif(not find_processor().has_bfloat16, reason="this processor has no bfloat16")


class Small(nn.Module):
    """(B, 3, p, p) → (B, 16), with what encoders have: strides, batch norm, addition, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(patches)))
        return torch.relu(self.block(x) + x).mean(dim=(2, 3))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def runtimes(network, tmp_path_factory):
    """Every runtime of the small network."""
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    export_onnx(network, path, patch_side_px=SIDE_PX)
    return {
        "torch": run_torch(network, device=CPU),
        "compiled": run_compiled(network, device=CPU, patch_side_px=SIDE_PX),
        "onnxruntime": run_onnx(path, device=CPU),
    }


@pytest.mark.parametrize("runtime", encoder_runtime.RUNTIMES)
@pytest.mark.parametrize("count", [1, COMPILED_STEP, 2 * COMPILED_STEP + 3])
@torch.inference_mode()
def test_every_runtime_gives_the_features_of_the_network_for_any_number_of_patches(
    network, runtimes, runtime, count
):
    patches = torch.randn(count, 3, SIDE_PX, SIDE_PX)
    features = runtimes[runtime](patches)
    assert (features.dtype, features.device) == (torch.float32, CPU)
    torch.testing.assert_close(features, network(patches), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("runtime", encoder_runtime.RUNTIMES)
@torch.inference_mode()
def test_a_patch_has_the_same_features_in_any_company(runtimes, runtime):
    patches = torch.randn(COMPILED_STEP + 1, 3, SIDE_PX, SIDE_PX)
    together = runtimes[runtime](patches)
    torch.testing.assert_close(runtimes[runtime](patches[-1:]), together[-1:], atol=1e-6, rtol=1e-5)


@needs_bfloat16
@torch.inference_mode()
def test_half_precision_is_rounded_and_leaves_the_network_as_it_was(network):
    patches = torch.randn(4, 3, SIDE_PX, SIDE_PX)
    exact = network(patches)
    half = run_torch(network, device=CPU, precision="bfloat16")(patches)
    assert half.dtype == torch.float32
    assert 1e-5 < (half - exact).abs().max() < 0.05  # eight bits of mantissa
    torch.testing.assert_close(network(patches), exact, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("device", "runtime", "precision", "processor"),
    [
        ("cpu", "torch", "float32", OLD),
        ("cpu", "compiled", "bfloat16", NEW),
        ("cuda", "torch", "bfloat16", OLD),
        ("cuda", "auto", "float16", OLD),
        ("cuda", "onnxruntime", "float32", OLD),
    ],
)
def test_precisions_that_the_device_computes_in_are_accepted(device, runtime, precision, processor):
    check_precision(precision, device=torch.device(device), runtime=runtime, processor=processor)


@pytest.mark.parametrize(
    ("device", "runtime", "precision", "processor", "says"),
    [
        ("cpu", "torch", "bfloat16", OLD, r"of this processor \(Old One\) 'bfloat16'; known: float32$"),
        ("cpu", "torch", "float16", NEW, r"of this processor \(New One\) 'float16'; known: float32, bfloat16$"),
        ("cuda", "onnxruntime", "float16", NEW, "of runtime onnxruntime 'float16'; known: float32$"),
        ("cpu", "torch", "int8", NEW, "precision 'int8'; known: float32, bfloat16, float16$"),
    ],
)
def test_precisions_that_it_does_not_are_refused_with_those_it_does(device, runtime, precision, processor, says):
    with pytest.raises(UnknownNameError, match=says):
        check_precision(precision, device=torch.device(device), runtime=runtime, processor=processor)


def test_unknown_runtime_lists_the_known_ones():
    known = "known: torch, compiled, onnxruntime, auto"
    with pytest.raises(UnknownNameError, match=f"unknown encoder runtime 'tensorflow'; {known}"):
        load_encoder("efficientnet_lite0", runtime="tensorflow")


def test_an_encoder_that_cannot_be_compiled_runs_as_it_is_and_says_so(network, monkeypatch, caplog, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._inductor.config as inductor
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    spec = PublishedEncoder(
        name="small", width=16, mean=(0, 0, 0), deviation=(1, 1, 1), patch_side_px=48, mpp=None,
        build=Small, find_weights=Path, unused=(),
    )  # fmt: skip
    used, embed = _start_or_fall_back(_Starter(spec, network, "f" * 64, CPU, "float32"), "compiled")
    assert used == "torch"
    assert "small cannot be compiled here, it runs as it is" in caplog.text
    patches = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(embed(patches), network(patches), atol=1e-5, rtol=1e-5)


def test_damaged_onnx_is_named(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"bad\.onnx: ONNX Runtime cannot load it"):
        run_onnx(tmp_path / "bad.onnx", device=CPU)


def test_onnxruntime_without_cuda_runs_on_the_cpu_and_says_so(caplog):
    cuda = torch.device("cuda", 1)
    assert encoder_runtime._providers(cuda, ("CPUExecutionProvider",)) == ["CPUExecutionProvider"]
    assert "has no CUDA" in caplog.text
    both = encoder_runtime._providers(cuda, ("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert both == [
        ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 0}),
        "CPUExecutionProvider",
    ]


def test_onnxruntime_does_not_report_to_its_maker(tmp_path):
    """Its official builds keep an identifier and a queue of events in the cache folder, and send them."""
    onnx.save(colour_mean_onnx(), tmp_path / "model.onnx")
    program = (
        "import sys, torch; from pathlib import Path; from s4mil_monai.features.encoder_runtime import run_onnx;"
        "run_onnx(Path(sys.argv[1]), device=torch.device('cpu'))(torch.zeros(1, 3, 32, 32))"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "model.onnx")],
        check=True,
        env={**environment, "HOME": str(home), "XDG_CACHE_HOME": str(home)},
        cwd=Path(__file__).parents[2],
    )
    assert list(home.rglob("*onnxruntime*")) == []


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("float16", 1e-2), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("runtime", ["torch", "compiled"])
@torch.inference_mode()
def test_gpu_gives_the_same_features_in_every_precision(network, runtime, precision, tolerance):
    cuda = torch.device("cuda")
    if runtime == "torch":
        embed = run_torch(network, device=cuda, precision=precision)
    else:
        embed = run_compiled(network, device=cuda, patch_side_px=SIDE_PX, precision=precision)
    for count in (1, 5):
        patches = torch.randn(count, 3, SIDE_PX, SIDE_PX)
        features = embed(patches.cuda())
        assert (features.dtype, features.device) == (torch.float32, CPU)
        assert F.cosine_similarity(features, network(patches)).min() > 1 - tolerance
