"""ONNX → TensorRT engine, by one path for TensorRT 10 and 11 and for TensorRT for RTX.

TensorRT builds on the GPU it is for. TensorRT for RTX also builds without one, for the compute capabilities it is
told; it has those of GeForce and workstation cards, not those of an H100 or H200.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

from s4mil_monai.errors import ExportError, MissingExtraError, UnknownNameError, first_line
from s4mil_monai.extras import require

Library = Literal["tensorrt", "tensorrt_rtx"]

LIBRARIES: tuple[Library, ...] = get_args(Library)
"""In the order they are taken."""

TARGET = re.compile(r"\d+\.\d")

RTX_TARGETS = ("8.6", "8.9", "12.0")
"""Compute capabilities an engine of TensorRT for RTX is built for, where nothing else is said: Ampere, Ada and
Blackwell cards. 7.5 is left out: it takes neither float32 products nor bfloat16."""


@dataclass(frozen=True)
class Engine:
    """A built engine."""

    plan: bytes
    library: Library
    version: str
    compute_capabilities: tuple[str, ...]
    """Such as ``8.9``."""


def find_libraries() -> tuple[Library, ...]:
    """The TensorRT libraries that are installed, without importing them."""
    return tuple(name for name in LIBRARIES if find_spec(name) is not None)


def choose_library(name: str | None = None) -> Library:
    """The library of a name, or the first that is installed.

    Raises:
        UnknownNameError: There is no TensorRT library of this name.
        MissingExtraError: It is not installed, or none is.
    """
    if name is not None and name not in LIBRARIES:
        raise UnknownNameError("TensorRT library", name, LIBRARIES)
    found: list[Library] = [library for library in find_libraries() if name in (None, library)]
    if not found:
        either = "tensorrt (or tensorrt_rtx, of the extra rtx)"
        raise MissingExtraError(module=name or either, extra=_extra_of(name or "tensorrt"))
    return found[0]


def current_capability() -> str | None:
    """Compute capability of this machine's GPU; None where there is none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def build_engine(onnx_model: bytes, *, library: Library, targets: tuple[str, ...] | None = None) -> Engine:
    """Build an engine from an exported step.

    Precision is that of the graph, by its casts (strongly typed). TF32 is cleared: float32 means float32.

    Args:
        onnx_model: The graph.
        library: ``tensorrt`` or ``tensorrt_rtx``.
        targets: Compute capabilities to build for, TensorRT for RTX only; by default this machine's GPU, and
            without one :data:`RTX_TARGETS`.

    Raises:
        ExportError: No GPU where one is needed, an unknown target, or the library refuses the graph.
    """
    trt = load_library(library)
    wanted = check_targets(library, targets)
    builder = trt.Builder(_logger(library))
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, _logger(library))
    if not parser.parse(onnx_model):
        raise ExportError("step", f"{library} cannot read the ONNX graph ({_first_error(parser)})")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if library == "tensorrt_rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else it cannot be captured in a CUDA graph
        config.num_compute_capabilities = len(wanted)
        for place, target in enumerate(wanted):
            config.set_compute_capability(_rtx_capability(trt, target), place)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError("step", f"{library} {trt.__version__} cannot build an engine of it; its log says why")
    return Engine(bytes(plan), library, str(trt.__version__), wanted)


def load_library(library: str) -> Any:
    """Import a TensorRT library.

    Raises:
        MissingExtraError: It is not installed.
        ExportError: It is installed but does not load.
    """
    try:
        return require(library, extra=_extra_of(library))
    except (ImportError, OSError) as error:
        raise ExportError(library, f"does not load ({first_line(error)}); install it again") from error


def _extra_of(library: str) -> str:
    return "rtx" if library == "tensorrt_rtx" else "tensorrt"


@cache
def _logger(library: str) -> Any:
    """The one logger: the library keeps the first it is given and ignores others."""
    trt = load_library(library)
    return trt.Logger(trt.Logger.ERROR)


def deserialize(plan: bytes, library: str) -> Any:
    """The engine of a plan, or None where the library does not take it."""
    return load_library(library).Runtime(_logger(library)).deserialize_cuda_engine(plan)


def _strongly_typed(trt: Any) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always so where there is no flag
    return 0 if flag is None else 1 << int(flag)


def check_targets(library: Library, targets: tuple[str, ...] | None) -> tuple[str, ...]:
    """The compute capabilities to build for, as :func:`build_engine` has it.

    Raises:
        ExportError: No GPU where one is needed, or an unknown target.
    """
    here = current_capability()
    if library == "tensorrt":
        if here is None:
            raise ExportError("step", "TensorRT builds on the GPU it is for, and this machine has none")
        if targets not in (None, (here,)):
            raise ExportError("step", f"TensorRT builds for this machine's GPU ({here}) only, not for {targets}")
        return (here,)
    wanted = targets or (RTX_TARGETS if here is None else (here,))
    for target in wanted:
        _rtx_capability(load_library(library), target)
    return tuple(dict.fromkeys(wanted))


def _rtx_capability(trt: Any, target: str) -> Any:
    name = "SM" + target.replace(".", "", 1) if TARGET.fullmatch(target) else target
    if name not in trt.ComputeCapability.__members__:
        known = sorted(key[2:-1] + "." + key[-1] for key in trt.ComputeCapability.__members__ if key[2:].isdigit())
        raise ExportError("step", f"TensorRT for RTX has no compute capability {target}, only {', '.join(known)}")
    return trt.ComputeCapability.__members__[name]


def _first_error(parser: Any) -> str:
    return str(parser.get_error(0)).splitlines()[0] if parser.num_errors else "no reason given"
