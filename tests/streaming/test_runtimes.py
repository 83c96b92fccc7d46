"""One contract, every runtime."""

from __future__ import annotations

import pytest
import torch

from s4mil_monai.models.s4mil import S4MILOutput
from s4mil_monai.streaming.choose import open_runtime
from s4mil_monai.streaming.manifest import check_file
from s4mil_monai.streaming.runtime import Runtime
from s4mil_monai.streaming.stream import SlideStream
from s4mil_monai.streaming.torch_runtime import TorchRuntime
from tests.streaming.conftest import CHUNK, D, ExportedBundle


def open_named(exported: ExportedBundle, name: str) -> Runtime:
    model = exported.bundle.model
    if name == "torch":
        return TorchRuntime(model, chunk=CHUNK)
    if name == "torch on the GPU":
        return TorchRuntime(model, chunk=CHUNK, device="cuda")
    if name == "torchscript":
        path = exported.models / "step_float32.ts"
        check_file(path, kind="torchscript", precision="float32", model_sha256=exported.sha256)
        return TorchRuntime(model, chunk=CHUNK, scripted=torch.jit.load(path))
    return open_runtime(exported.bundle, exported.models, name=name).runtime


RUNTIMES = [
    "torch",
    "onnxruntime",
    pytest.param("torchscript", marks=pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")),
    pytest.param("torch on the GPU", marks=pytest.mark.gpu),
    pytest.param("tensorrt", marks=pytest.mark.gpu),
]


@pytest.fixture(params=RUNTIMES)
def runtime(request, exported) -> Runtime:
    return open_named(exported, request.param)


def whole(exported: ExportedBundle, bag: torch.Tensor) -> S4MILOutput:
    with torch.inference_mode():
        return exported.bundle.model(bag.unsqueeze(0))


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_output_is_that_of_the_whole_model(runtime, exported, length):
    bag = torch.randn(length, D, generator=torch.Generator().manual_seed(length))
    stream = SlideStream(runtime)
    for piece in bag.split(50):
        stream.add(piece)
    found, wanted = stream.finish(), whole(exported, bag)
    for name in ("logits", "patch_logits", "pooled"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.winners, wanted.winners)


def test_two_slides_at_once_do_not_disturb_each_other(runtime, exported):
    bags = [torch.randn(2 * CHUNK + 3, D), torch.randn(CHUNK, D)]
    streams = [SlideStream(runtime) for _ in bags]
    for stream, bag in zip(streams, bags, strict=True):
        stream.add(bag[:100])
    for stream, bag in zip(streams, bags, strict=True):
        stream.add(bag[100:])
    for stream, bag in zip(streams, bags, strict=True):
        torch.testing.assert_close(stream.finish().logits, whole(exported, bag).logits, atol=1e-5, rtol=1e-5)


def test_runtime_says_what_it_is(runtime, exported):
    assert runtime.precision == "float32"
    assert runtime.shape.chunk == CHUNK
    assert (runtime.shape.in_features, runtime.shape.layers, runtime.shape.classes) == (D, 2, 3)
    assert runtime.shape.patch_classes == (exported.bundle.settings.network.patch_classes or 3)


def test_batch_without_patches_changes_nothing(runtime, exported):
    """As where all patches of a batch are damaged; here also just after a full chunk, and at the end."""
    bag = torch.randn(CHUNK, D)
    stream = SlideStream(runtime)
    for piece in (bag[:0], bag, bag[:0]):
        stream.add(piece)
    torch.testing.assert_close(stream.finish().logits, whole(exported, bag).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_features_of_another_precision_and_with_gradients_are_read(runtime, exported, dtype):
    bag = torch.randn(40, D).to(dtype)
    stream = SlideStream(runtime)
    stream.add(bag.clone().requires_grad_())
    torch.testing.assert_close(stream.finish().logits, whole(exported, bag.float()).logits, atol=1e-5, rtol=1e-5)
