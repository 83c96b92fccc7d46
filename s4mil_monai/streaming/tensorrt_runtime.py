"""The step as a TensorRT engine, replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s4mil_monai.errors import ExportError, MisfitError
from s4mil_monai.streaming.cuda_graph import Buffers, GraphedSlide, make_buffers
from s4mil_monai.streaming.manifest import StepManifest, TensorRTRecord, check_file
from s4mil_monai.streaming.onnx_export import INPUTS, OUTPUTS, STATE, sizes_of
from s4mil_monai.streaming.runtime import Runtime, SlideState, StepShape
from s4mil_monai.streaming.tensorrt_build import current_capability, deserialize, load_library


class TensorRTRuntime(Runtime):
    """Runs an engine on this machine's GPU.

    Args:
        plan: The engine as built.
        library: ``tensorrt`` or ``tensorrt_rtx``.
        precision: Of its products.
        shape: Its sizes.
        path: What errors call it.

    Raises:
        ExportError: TensorRT refuses it.
    """

    name = "tensorrt"

    def __init__(self, plan: bytes, *, library: str, precision: str, shape: StepShape, path: str = "step"):
        self.precision, self.shape, self.path = precision, shape, path
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._engine = deserialize(plan, library)
        if self._engine is None:
            raise ExportError(path, f"{library} does not take it; export it again")
        _check_sizes(self._engine, shape, path)

    def open(self) -> SlideState:
        """Begin a slide, with an execution context of its own; the engine's weights are shared."""
        buffers = make_buffers(self.shape, self.device)
        return GraphedSlide(self.shape, buffers, _launcher(self._engine, buffers, self.path))


def load_engine(path: Path, *, precision: str, model_sha256: str) -> TensorRTRuntime:
    """Load an engine that fits this machine, with its manifest beside it.

    Args:
        path: The ``.engine`` file.
        precision: Of its products.
        model_sha256: Of the weights the engine has to be of.

    Raises:
        ExportError: The file or its manifest is missing or damaged, there is no GPU, or TensorRT refuses it.
        MisfitError: It is of another model, GPU or TensorRT version.
        MissingExtraError: The TensorRT it was built with is not installed.
    """
    plan, manifest = check_file(path, kind="tensorrt", precision=precision, model_sha256=model_sha256)
    built = manifest.tensorrt
    if built is None:
        raise ExportError(str(path), "its manifest does not say what it was built with; export it again")
    check_fit(built, str(path), version=str(load_library(built.library).__version__), here=current_capability())
    return of_manifest(plan, manifest, path)


def of_manifest(plan: bytes, manifest: StepManifest, path: Path) -> TensorRTRuntime:
    """The runtime of an engine that is known to fit."""
    assert manifest.tensorrt is not None
    library = manifest.tensorrt.library
    return TensorRTRuntime(
        plan, library=library, precision=manifest.precision, shape=manifest.shape, path=str(path)
    )


def check_fit(built: TensorRTRecord, path: str, *, version: str, here: str | None) -> None:
    """Refuse an engine that this machine cannot run.

    Args:
        built: What the engine was built with, and for.
        path: What errors call it.
        version: Of the TensorRT that is installed.
        here: Compute capability of this machine's GPU; None without one.

    Raises:
        ExportError: There is no GPU.
        MisfitError: The engine is of another TensorRT version or GPU.
    """
    if version != built.version:
        raise MisfitError(
            path,
            "was built with another TensorRT; export it again",
            found=f"{built.library} {built.version}",
            wanted=version,
        )
    if here is None:
        raise ExportError(path, "TensorRT runs on an NVIDIA GPU, and this machine has none")
    if here not in built.compute_capabilities:
        raise MisfitError(
            path,
            "was built for other GPUs; export it on this machine",
            found=f"compute capability {', '.join(built.compute_capabilities)}",
            wanted=here,
        )


def _check_sizes(engine: Any, shape: StepShape, path: str) -> None:
    """Refuse an engine whose ends are not of the sizes that buffers are made for."""
    for name, wanted in sizes_of(shape).items():
        found = tuple(engine.get_tensor_shape(name))
        if found != wanted:
            raise ExportError(path, f"{name} is {found}, its manifest says {wanted}; export it again")


def _launcher(engine: Any, buffers: Buffers, path: str) -> Callable[[], None]:
    """Enqueues the engine over the buffers, then moves the new state into the old one's place."""
    context = engine.create_execution_context()
    if context is None:
        raise ExportError(path, "the GPU has no memory for it; score fewer slides at once")
    state = dict(zip(STATE, buffers.state, strict=True))
    new = {f"next_{name}": torch.empty_like(tensor) for name, tensor in state.items()}
    bound: dict[str, Tensor] = {
        **state,
        "features": buffers.features,
        "valid": buffers.valid,
        **new,
        "patch_logits": buffers.patch_logits,
        "logits": buffers.logits,
    }
    for name in (*INPUTS, *OUTPUTS):
        if not context.set_tensor_address(name, bound[name].data_ptr()):
            raise ExportError(path, f"has no tensor {name}; export it again")

    def launch() -> None:
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ExportError(path, "TensorRT could not run the step; its log says why")
        for name, tensor in state.items():
            tensor.copy_(new[f"next_{name}"])

    return launch
