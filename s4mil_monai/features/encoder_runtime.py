"""What runs an encoder's network: PyTorch, PyTorch compiled, ONNX Runtime, behind one small contract.

A runtime is a function from normalised patches, ``(B, 3, p, p)`` float32 on any device, to features,
``(B, width)`` float32 on the CPU, for any B. All give the same features up to rounding.
"""

from __future__ import annotations

import copy
import logging
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.errors import UnknownNameError, WeightsError, first_line
from s4mil_monai.onnx_graphs import import_onnxruntime, start_session
from s4mil_monai.precision import PRECISIONS, find_precision

logger = logging.getLogger(__name__)

Embed = Callable[[Tensor], Tensor]
"""(B, 3, p, p) normalised float32 patches → (B, width) float32 features on the CPU."""

RUNTIMES = ("torch", "compiled", "onnxruntime")
"""Runtimes by name; ``auto`` chooses among them."""

COMPILED_STEP = 8
"""Patches a step of the compiled network on the CPU, where only a fixed number lets it pack its weights."""


@dataclass(frozen=True)
class Processor:
    """The CPU of this machine."""

    name: str
    has_bfloat16: bool


@cache
def find_processor() -> Processor:
    """Name of the CPU, and whether it multiplies bfloat16; only Linux says so, elsewhere it counts as no."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = f"{facts.get('flags', '')} {facts.get('Features', '')}".split()  # Intel and AMD; Arm
    return Processor(
        name=facts.get("model name") or platform.processor() or platform.machine(),
        has_bfloat16=not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags),
    )


def check_runtime(name: str, *, known: tuple[str, ...] = (*RUNTIMES, "auto"), of: str = "") -> None:
    """Refuse a runtime that is not among the known ones; ``of`` says whose they are."""
    if name not in known:
        raise UnknownNameError(f"encoder runtime{of}", name, known)


def check_precision(precision: str, *, device: torch.device, runtime: str, processor: Processor) -> None:
    """Refuse a precision that the device or the runtime does not compute in.

    Raises:
        UnknownNameError: Lists what it does compute in.
    """
    find_precision(precision)
    if runtime == "onnxruntime":
        known, place = ("float32",), "runtime onnxruntime"
    elif device.type != "cpu":
        known, place = tuple(PRECISIONS), f"device {device.type}"
    else:
        known = ("float32", "bfloat16") if processor.has_bfloat16 else ("float32",)
        place = f"this processor ({processor.name})"
    if precision not in known:
        raise UnknownNameError(f"precision of {place}", precision, known)


def run_torch(network: nn.Module, *, device: torch.device, precision: str = "float32") -> Embed:
    """Run a network as it is, channels last; in half precision under autocast on a GPU, converted on a CPU."""
    ready = _place(network, device, precision)

    def embed(patches: Tensor) -> Tensor:
        return ready(patches).float().cpu()

    return embed


def run_compiled(
    network: nn.Module, *, device: torch.device, patch_side_px: int, precision: str = "float32"
) -> Embed:
    """Run a network compiled by TorchInductor with its weights frozen in.

    It is compiled here, for patches of one side, so that what can fail fails here: that takes some ten seconds.

    Raises:
        RuntimeError: It cannot be compiled, as on a machine without a C++ compiler.
    """
    ready = _place(network, device, precision)
    fixed = device.type == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own imports use what torch deprecates
        compiled = torch.compile(ready, dynamic=False if fixed else None, options={"freezing": True})

    def embed(patches: Tensor) -> Tensor:
        if fixed:
            return torch.cat([_full_step(compiled, part) for part in patches.split(COMPILED_STEP)])
        # torch takes a size of 1 for a constant, which would cost another compilation
        several = patches if len(patches) > 1 else patches.expand(2, -1, -1, -1).contiguous()
        torch._dynamo.mark_dynamic(several, 0)
        return compiled(several)[: len(patches)].float().cpu()

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        embed(torch.zeros(COMPILED_STEP, 3, patch_side_px, patch_side_px))
    return embed


def _full_step(compiled: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
    """Fill a ragged batch up with black patches and give the features of the true ones."""
    missing = COMPILED_STEP - len(patches)
    return compiled(F.pad(patches, (0, 0, 0, 0, 0, 0, 0, missing)))[: len(patches)].float()


class _Placed(nn.Module):
    """A copy of a network on its device, channels last: float32 patches in, features in some precision out."""

    def __init__(self, network: nn.Module, device: torch.device, precision: str):
        super().__init__()
        self._dtype = PRECISIONS[precision]
        self._device = device
        scripted = isinstance(network, torch.jit.ScriptModule)
        # Autocast on a CPU converts weights and activations again and again; a GPU hardly notices.
        self._converts = device.type == "cpu" and not scripted
        dtype = self._dtype if self._converts else torch.float32
        self._network = network if scripted else copy.deepcopy(network)
        self._network.to(device=device, dtype=dtype)
        if not scripted:
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, patches: Tensor) -> Tensor:
        patches = patches.to(self._device, memory_format=torch.channels_last)
        if self._converts:
            return self._network(patches.to(self._dtype))
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self._network(patches)


def _place(network: nn.Module, device: torch.device, precision: str) -> _Placed:
    return _Placed(network, device, precision).eval().requires_grad_(False)


def has_onnxruntime() -> bool:
    """Whether ONNX Runtime can be had, without importing it."""
    return find_spec("onnxruntime") is not None


def run_onnx(model: Path, *, device: torch.device) -> Embed:
    """Run an ONNX model of one input (B, 3, p, p) and one output (B, width), with as many threads as torch has.

    Raises:
        WeightsError: The file is damaged, or no model of patches.
        MissingExtraError: ONNX Runtime is not installed.
    """
    available = tuple(import_onnxruntime().get_available_providers())
    try:
        session = start_session(model, _providers(device, available))
    except Exception as error:
        raise WeightsError(str(model), f"ONNX Runtime cannot load it ({first_line(error)})") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        raise WeightsError(str(model), "wants something else than one float32 input (B, 3, p, p)")
    name, wanted = inputs[0].name, [outputs[0].name]

    def embed(patches: Tensor) -> Tensor:
        return torch.from_numpy(session.run(wanted, {name: patches.cpu().contiguous().numpy()})[0])

    return embed


def _providers(device: torch.device, available: tuple[str, ...]) -> list:
    """Execution providers for a device; where ONNX Runtime was built without CUDA, the CPU has to do."""
    cpu = "CPUExecutionProvider"
    if device.type != "cuda":
        return [cpu]
    if "CUDAExecutionProvider" not in available:
        logger.warning("this ONNX Runtime has no CUDA; the encoder runs on the CPU")
        return [cpu]
    return [("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}), cpu]
