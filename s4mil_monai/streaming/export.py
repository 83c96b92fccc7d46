"""export_step(): a bundle's slide model for another runtime, compared with the model before it is written."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from s4mil_monai import __version__
from s4mil_monai.errors import UnknownNameError
from s4mil_monai.models.bundle import Bundle
from s4mil_monai.precision import Precision, find_precision
from s4mil_monai.streaming.chunk_step import ChunkStep
from s4mil_monai.streaming.manifest import Parity, StepManifest, TensorRTRecord, write_exported
from s4mil_monai.streaming.onnx_export import OPSET, FlatStep, example_inputs, to_onnx
from s4mil_monai.streaming.onnx_runtime import OnnxRuntime
from s4mil_monai.streaming.parity import measure_parity, refuse_if_inexact
from s4mil_monai.streaming.runtime import CHUNK, Runtime, StepShape, shape_of
from s4mil_monai.streaming.tensorrt_build import Engine, Library, build_engine, check_targets, choose_library
from s4mil_monai.streaming.torch_runtime import TorchRuntime

KINDS = ("onnx", "tensorrt", "torchscript")

ENDINGS = {"onnx": ".onnx", "tensorrt": ".engine", "torchscript": ".ts"}


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what it is."""

    path: Path
    manifest: StepManifest


def step_path(folder: Path, kind: str, precision: str, library: str = "") -> Path:
    """Where the step of a bundle lies, by convention: ``models/step_float32.onnx`` and the like."""
    name = f"step_{precision}.{library}" if library else f"step_{precision}"
    return folder / (name + ENDINGS[kind])


def export_step(
    bundle: Bundle,
    out: Path,
    *,
    to: str,
    precision: str = "float32",
    chunk: int = CHUNK,
    library: str | None = None,
    targets: tuple[str, ...] | None = None,
    real_bags: Sequence[Tensor] = (),
) -> list[Exported]:
    """Export the step of a bundle's model.

    Args:
        bundle: The slide or the multitask form.
        out: Folder of the files, such as the bundle's ``models``.
        to: ``onnx``, ``tensorrt`` (writes the graph it is built from as well) or ``torchscript``.
        precision: Of products: ``float32``, ``float16`` or ``bfloat16``.
        chunk: T, patches of a step; a multiple of 64.
        library: ``tensorrt`` or ``tensorrt_rtx``; the first that is installed by default.
        targets: Compute capabilities, as :func:`build_engine` has it.
        real_bags: (n, D) features of slides for the parity gate, beside random ones.

    Returns:
        The files, in the order they were written.

    Raises:
        UnknownNameError: No such kind, precision or library.
        ExportError: The step is too inexact, cannot be built or cannot be written.
        MissingExtraError: A library is not installed.
    """
    if to not in KINDS:
        raise UnknownNameError("form to export to", to, KINDS)
    find_precision(precision)
    if to == "torchscript":
        return [_export_torchscript(bundle, out, precision, chunk, real_bags)]
    chosen = choose_library(library) if to == "tensorrt" else None
    if chosen is not None:
        targets = check_targets(chosen, targets)
    graph = _export_onnx(bundle, out, precision, chunk, real_bags)
    if chosen is None:
        return [graph]
    return [graph, _export_engine(bundle, out, graph, chosen, targets)]


def _export_onnx(bundle: Bundle, out: Path, precision: str, chunk: int, real_bags: Sequence[Tensor]) -> Exported:
    step = ChunkStep(bundle.model, precision=precision)
    content = to_onnx(step, chunk=chunk)
    path = step_path(out, "onnx", precision)
    shape = shape_of(step, chunk)
    by: Literal["torch", "onnxruntime"] = "torch" if precision == "bfloat16" else "onnxruntime"
    runtime: Runtime
    if by == "torch":  # ONNX Runtime's CPU form does not compute in bfloat16: the same step in PyTorch
        runtime = TorchRuntime(bundle.model, chunk=chunk, precision=precision)
    else:
        runtime = OnnxRuntime(content, precision=precision, shape=shape, path=str(path))
    parity = measure_parity(runtime, bundle.model, real_bags=real_bags, by=by)
    return _write(bundle, path, content, kind="onnx", shape=shape, precision=precision, parity=parity, opset=OPSET)


def _export_engine(
    bundle: Bundle, out: Path, graph: Exported, library: Library, targets: tuple[str, ...] | None
) -> Exported:
    engine = build_engine(graph.path.read_bytes(), library=library, targets=targets)
    path = step_path(out, "tensorrt", graph.manifest.precision, library)
    manifest = engine_manifest(graph.manifest, engine)
    write_exported(path, engine.plan, manifest)
    return Exported(path, manifest)


def engine_manifest(graph: StepManifest, engine: Engine) -> StepManifest:
    """The manifest of an engine built from a graph; its parity is the graph's until a GPU runs it."""
    return graph.model_copy(
        update={
            "kind": "tensorrt",
            "file_sha256": hashlib.sha256(engine.plan).hexdigest(),
            "tensorrt": TensorRTRecord(
                library=engine.library,
                version=engine.version,
                compute_capabilities=engine.compute_capabilities,
                onnx_sha256=graph.file_sha256,
            ),
        }
    )


def _export_torchscript(
    bundle: Bundle, out: Path, precision: str, chunk: int, real_bags: Sequence[Tensor]
) -> Exported:
    step = ChunkStep(bundle.model, precision=precision)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and traced shapes are meant to be fixed
        traced = torch.jit.trace(FlatStep(step).eval(), example_inputs(step, chunk), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    scripted = cast(Callable[..., tuple[Tensor, ...]], traced)
    runtime = TorchRuntime(bundle.model, chunk=chunk, precision=precision, scripted=scripted)
    parity = measure_parity(runtime, bundle.model, real_bags=real_bags, by="torch")
    path = step_path(out, "torchscript", precision)
    return _write(
        bundle, path, file.getvalue(), kind="torchscript", shape=runtime.shape, precision=precision, parity=parity
    )


def _write(
    bundle: Bundle,
    path: Path,
    content: bytes,
    *,
    kind: Literal["onnx", "torchscript"],
    shape: StepShape,
    precision: str,
    parity: Parity,
    opset: int | None = None,
) -> Exported:
    """Write a step that keeps the bound."""
    refuse_if_inexact(parity, precision=precision, path=str(path))
    manifest = StepManifest(
        kind=kind,
        file_sha256=hashlib.sha256(content).hexdigest(),
        bundle=bundle.record.bundle,
        version=bundle.record.version,
        model_sha256=bundle.record.sha256,
        precision=cast(Precision, precision),
        shape=shape,
        opset=opset,
        parity=parity,
        software=_software(),
    )
    write_exported(path, content, manifest)
    return Exported(path, manifest)


def _software() -> dict[str, str]:
    found = {"s4mil_monai": __version__, "torch": torch.__version__}
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
