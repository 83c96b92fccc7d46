"""open_runtime(): the runtime of a bundle's aggregator, by name or the best that is there."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from s4mil_monai.errors import ExportError, S4MilError, UnknownNameError, first_line
from s4mil_monai.models.bundle import Bundle
from s4mil_monai.models.seal import kept_sealed
from s4mil_monai.streaming.export import engine_manifest, step_path
from s4mil_monai.streaming.manifest import Parity, check_file, write_exported
from s4mil_monai.streaming.onnx_runtime import load_onnx
from s4mil_monai.streaming.parity import measure_parity, refuse_if_inexact
from s4mil_monai.streaming.runtime import CHUNK, Runtime
from s4mil_monai.streaming.tensorrt_build import Library, build_engine, choose_library, current_capability
from s4mil_monai.streaming.tensorrt_runtime import TensorRTRuntime, load_engine, of_manifest
from s4mil_monai.streaming.torch_runtime import TorchRuntime

logger = logging.getLogger(__name__)

RUNTIMES = ("auto", "torch", "onnxruntime", "tensorrt")

CPU_CHUNK = 512
"""Patches of a step in PyTorch on a CPU: it ends a few milliseconds after the last patch."""


@dataclass(frozen=True)
class ChosenRuntime:
    """A runtime, and why better ones were not taken."""

    runtime: Runtime
    passed_over: tuple[str, ...] = ()


def open_runtime(
    bundle: Bundle,
    folder: Path,
    *,
    name: str = "auto",
    precision: str = "float32",
    device: str | torch.device = "cpu",
) -> ChosenRuntime:
    """Load what runs the aggregator.

    ``auto`` is a TensorRT engine where there is a GPU and the engine fits it, or can be rebuilt from the exported
    graph; else PyTorch, which is the fastest on a CPU.

    Args:
        bundle: The slide model.
        folder: Of exported steps, such as the bundle's ``models``.
        name: ``auto``, ``torch``, ``onnxruntime`` or ``tensorrt``.
        precision: Of products.
        device: Where PyTorch computes.

    Raises:
        UnknownNameError: No such runtime.
        ExportError: The exported step is missing, damaged or too inexact, or there is no GPU for it.
        MisfitError: It is of another model, or of another GPU or version and cannot be rebuilt.
        MissingExtraError: A library is not installed.
    """
    if name not in RUNTIMES:
        raise UnknownNameError("aggregator runtime", name, RUNTIMES)
    if name == "onnxruntime":
        path = step_path(folder, "onnx", precision)
        return ChosenRuntime(load_onnx(path, precision=precision, model_sha256=bundle.record.sha256))
    if name == "tensorrt":
        return ChosenRuntime(_open_tensorrt(bundle, folder, precision, device))
    on_gpu = torch.device(device).type == "cuda"
    passed_over: tuple[str, ...] = ()
    if name == "auto" and on_gpu:
        try:
            return ChosenRuntime(_open_tensorrt(bundle, folder, precision, device))
        except (S4MilError, RuntimeError) as error:  # torch's errors of CUDA are RuntimeErrors
            passed_over = (f"tensorrt: {first_line(error)}",)
            logger.info("the aggregator runs in PyTorch, %s", passed_over[0])
    chunk = CHUNK if on_gpu else CPU_CHUNK
    return ChosenRuntime(TorchRuntime(bundle.model, chunk=chunk, precision=precision, device=device), passed_over)


def _open_tensorrt(bundle: Bundle, folder: Path, precision: str, device: str | torch.device) -> TensorRTRuntime:
    """An engine that fits the GPU, as it is or rebuilt, compared there with the model."""
    library = choose_library()
    path = step_path(folder, "tensorrt", precision, library)
    wanted = torch.device(device)
    on = torch.cuda.device(wanted) if wanted.type == "cuda" and torch.cuda.is_available() else nullcontext()
    with on:
        try:
            runtime = load_engine(path, precision=precision, model_sha256=bundle.record.sha256)
        except ExportError as error:
            if current_capability() is None:
                raise
            return _rebuild(bundle, folder, precision, library, error)
        _compare(runtime, bundle, path)
    return runtime


def _compare(runtime: TensorRTRuntime, bundle: Bundle, path: Path) -> Parity:
    parity = measure_parity(runtime, bundle.model, by="tensorrt")
    refuse_if_inexact(parity, precision=runtime.precision, path=str(path))
    return parity


def _rebuild(bundle: Bundle, folder: Path, precision: str, library: Library, why: ExportError) -> TensorRTRuntime:
    """Build an engine for this GPU from the exported graph; it is kept where it can be written."""
    graph_path = step_path(folder, "onnx", precision)
    try:
        graph, manifest = check_file(
            graph_path, kind="onnx", precision=precision, model_sha256=bundle.record.sha256
        )
    except ExportError as missing:
        raise ExportError(why.path, f"{why.reason}; it cannot be rebuilt: {missing}") from why
    engine = build_engine(graph, library=library)
    built = engine_manifest(manifest, engine)
    path = step_path(folder, "tensorrt", precision, library)
    runtime = of_manifest(engine.plan, built, path)
    measured = built.model_copy(update={"parity": _compare(runtime, bundle, path)})
    try:
        with kept_sealed(folder.parent):
            write_exported(path, engine.plan, measured)
    except (ExportError, OSError) as error:
        logger.warning("the engine was rebuilt and is used, but not kept: %s", error)
    return runtime
