"""The small file beside every exported step that says what it is, and the check of one against the other."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s4mil_monai.errors import ExportError, MisfitError
from s4mil_monai.precision import Precision
from s4mil_monai.streaming.runtime import StepShape
from s4mil_monai.streaming.tensorrt_build import Library
from s4mil_monai.whole_file import write_whole


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Parity(_Record):
    """How far the exported step's logits are from those of the model in float32."""

    by: Literal["onnxruntime", "torch", "tensorrt"]
    """What ran the step: ``torch`` for a precision that ONNX Runtime's CPU form does not compute in."""
    random_bags: int
    real_bags: int
    patches: int
    """Of all bags."""
    winners: float
    """Smallest share of channels whose maximum is given to the same patch, in a bag."""
    logits: float
    """Largest difference of a slide's logit, as a share of the largest logit, or of 1 where that is smaller."""
    patch_logits: float
    """The same of a patch's logit."""
    bound: float
    """What both had to keep."""


class TensorRTRecord(_Record):
    """What an engine was built with, and for."""

    library: Library
    version: str
    compute_capabilities: tuple[str, ...]
    """Such as ``8.9``."""
    onnx_sha256: str
    """Of the graph it was built from."""


class StepManifest(_Record):
    """What an exported step is."""

    format: Literal["s4mil.step/1"] = "s4mil.step/1"
    kind: Literal["onnx", "tensorrt", "torchscript"]
    file_sha256: str
    bundle: str
    version: str
    """Of the bundle."""
    model_sha256: str
    """Of the bundle's weights file."""
    precision: Precision
    """Of products."""
    shape: StepShape
    opset: int | None = Field(default=None, ge=1)
    """Of ONNX; None for TorchScript."""
    tensorrt: TensorRTRecord | None = None
    parity: Parity
    software: dict[str, str]
    """Versions by name."""


def manifest_path(path: Path) -> Path:
    """Where the manifest of an exported step lies."""
    return path.with_name(path.name + ".json")


def write_exported(path: Path, content: bytes, manifest: StepManifest) -> None:
    """Write an exported step and its manifest; each has its name when it is whole, the step last.

    Between the two the old step does not fit the new manifest, and is refused.

    Raises:
        ExportError: They cannot be written.
    """
    try:
        for left_behind in path.parent.glob(f".{path.name}.*.part"):  # by an export that was killed
            left_behind.unlink(missing_ok=True)
        write_whole(manifest_path(path), manifest.model_dump_json(indent=1) + "\n")
        write_whole(path, content)
    except OSError as error:
        raise ExportError(str(path), f"cannot be written ({error.strerror})") from error


def read_manifest(path: Path) -> StepManifest:
    """The manifest of an exported step.

    Raises:
        ExportError: The step or its manifest is missing, or the manifest is damaged.
    """
    if not path.is_file():
        raise ExportError(str(path), "is not there; make it with s4mil export")
    try:
        return StepManifest.model_validate_json(_read(manifest_path(path)))
    except ValidationError as error:
        raise ExportError(
            str(manifest_path(path)), "is damaged, or of another version; export it again"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ExportError(str(path), "is not there; make it with s4mil export") from error
    except OSError as error:
        raise ExportError(str(path), f"cannot be read ({error.strerror})") from error


def check_file(path: Path, *, kind: str, precision: str, model_sha256: str) -> tuple[bytes, StepManifest]:
    """Content and manifest of an exported step, once it is known to be whole and of the model.

    Args:
        path: The step.
        kind: ``onnx``, ``tensorrt`` or ``torchscript``.
        precision: Of its products.
        model_sha256: Of the weights file it has to be of.

    Raises:
        ExportError: The step or its manifest is missing or damaged, or it is of another kind.
        MisfitError: It is of another precision or model.
    """
    manifest = read_manifest(path)
    content = _read(path)  # once: what was checked is what is loaded
    if hashlib.sha256(content).hexdigest() != manifest.file_sha256:
        raise ExportError(str(path), "is damaged (its SHA-256 is not that of its manifest); export it again")
    if manifest.kind != kind:
        raise ExportError(str(path), f"is {manifest.kind} by its manifest, not {kind}; export it again")
    if manifest.precision != precision:
        raise MisfitError(
            str(path), "is of another precision; export it again", found=manifest.precision, wanted=precision
        )
    if manifest.model_sha256 != model_sha256:
        raise MisfitError(
            str(path),
            "is the step of another model; export it again",
            found=f"weights {manifest.model_sha256[:12]}… ({manifest.bundle} {manifest.version})",
            wanted=f"{model_sha256[:12]}…",
        )
    return content, manifest
