"""Encoders that a site brings: a small YAML beside an ONNX or TorchScript file.

    name: uni_like
    file: model.onnx            # .onnx, or TorchScript as .ts or .pt; relative to the YAML
    sha256: 9f86d081…           # of that file
    width: 1024
    patch_side_px: 224
    mpp: 0.5
    mean: [0.485, 0.456, 0.406]
    deviation: [0.229, 0.224, 0.225]
    licence: CC-BY-NC-ND-4.0    # optional, as is the next
    data: {weights.bin: 60303a…}  # files that the ONNX file keeps its weights in, with the SHA-256 of each

What trust it needs. An ONNX file is data: a graph of known operators. A TorchScript file is a program that
PyTorch's interpreter runs; it can compute and allocate whatever it likes, though it calls no Python. Only run one
that comes from where you think it comes from: the checksum is required, so that it is the file somebody vouched
for.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path, PurePath
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from s4mil_monai.checksum import sha256_of
from s4mil_monai.errors import WeightsError, first_wrong
from s4mil_monai.extras import require
from s4mil_monai.features.encoder_runtime import Embed, run_onnx, run_torch

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0)]

PROBE = 2
"""Patches of the batch that a model is tried with."""


class EncoderFile(BaseModel):
    """The YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    file: str = Field(pattern=r"(?i)\.(onnx|ts|pt)$")
    """Relative to the YAML."""
    sha256: Sha256
    width: int = Field(gt=0)
    """Features of a patch."""
    patch_side_px: int = Field(ge=16)
    mpp: float = Field(gt=0)
    """µm/px the encoder was trained on."""
    mean: tuple[Share, Share, Share]
    """Of each channel, after division by 255."""
    deviation: tuple[Deviation, Deviation, Deviation]
    licence: str | None = None
    data: dict[str, Sha256] = {}
    """Files beside an ONNX file that hold its weights, with their SHA-256; names relative to that file."""


def is_encoder_file(name: str) -> bool:
    """Whether an encoder's name is a YAML file."""
    return name.lower().endswith((".yaml", ".yml"))


def read_encoder_file(path: Path) -> EncoderFile:
    """Read and check the YAML; the model it names is not looked at.

    Raises:
        WeightsError: It is missing, no YAML, or lacks or has something else.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(str(path), "there is no such encoder file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(str(path), f"cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise WeightsError(str(path), f"is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise WeightsError(str(path), "is no table of settings: name, file, sha256, width, …")
    try:
        return EncoderFile.model_validate(content)
    except ValidationError as error:
        raise WeightsError(str(path), first_wrong(error)) from error


def fingerprint_model(settings: EncoderFile) -> str:
    """SHA-256 of the model file; where it keeps weights in other files, over the SHA-256 of all of them."""
    if not settings.data:
        return settings.sha256
    return hashlib.sha256("\n".join([settings.sha256, *sorted(settings.data.values())]).encode()).hexdigest()


def open_model(yaml_path: Path, settings: EncoderFile, *, device: torch.device, precision: str) -> Embed:
    """Load the model of an encoder file and try it with a small batch.

    Raises:
        WeightsError: The model is missing, another file than described, damaged, or of another width or side.
        MissingExtraError: ONNX Runtime is not installed.
    """
    path = yaml_path.parent / settings.file
    check_sha256(path, settings.sha256)
    if path.suffix.lower() == ".onnx":
        check_external_data(path, settings.data)
        embed = run_onnx(path, device=device)
    else:
        embed = run_torch(_load_torchscript(path), device=device, precision=precision)
    _try(embed, path, settings)
    return embed


def check_sha256(path: Path, sha256: str) -> None:
    """Refuse a file that is missing or another one than was described."""
    if not path.is_file():
        raise WeightsError(str(path), "there is no such model file")
    found = sha256_of(path)
    if found != sha256:
        raise WeightsError(
            str(path), f"is another file than described (SHA-256 {found[:12]}…, wanted {sha256[:12]}…)"
        )


def check_external_data(path: Path, described: dict[str, str]) -> None:
    """Refuse an ONNX file that reads others which lie elsewhere or are not described.

    The file's own checksum says nothing of what it reads besides; an entry may name any file of the machine.

    Raises:
        WeightsError: Names the file that is read.
        MissingExtraError: ``onnx`` is not installed.
    """
    for location in sorted(_external_locations(path)):
        pure = PurePath(location)
        if pure.is_absolute() or ".." in pure.parts or not _lies_in(path.parent / pure, path.parent):
            raise WeightsError(str(path), f"reads {location!r}, outside its folder")
        if location not in described:
            raise WeightsError(str(path), f"keeps weights in {location!r}; give its SHA-256 under data:")
        check_sha256(path.parent / location, described[location])


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _external_locations(path: Path) -> set[str]:
    """Files that an ONNX model reads its tensors from."""
    onnx = require("onnx", extra="onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise WeightsError(str(path), "damaged, or not an ONNX model") from error
    return {
        entry.value
        for message in _messages(model)
        if isinstance(message, onnx.TensorProto)
        for entry in message.external_data
        if entry.key == "location"
    }


def _messages(message: Any) -> Any:
    """A protobuf message and every one inside it: tensors hide in attributes, subgraphs and functions too."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                yield from _messages(inner)


def _load_torchscript(path: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch prefers torch.export; sites have these files
        try:
            return torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise WeightsError(str(path), "damaged, or not a TorchScript file") from error


@torch.inference_mode()
def _try(embed: Embed, path: Path, settings: EncoderFile) -> None:
    """Refuse a model that does not turn patches of its side into float features of its width."""
    side = settings.patch_side_px
    try:
        features = embed(torch.zeros(PROBE, 3, side, side))
    except Exception as error:
        reason = " ".join(str(error).split())[-200:]
        raise WeightsError(str(path), f"does not take patches of {side} px ({reason})") from error
    if not isinstance(features, Tensor) or features.dtype != torch.float32 or features.ndim != 2:
        found = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else type(features)
        raise WeightsError(str(path), f"gives {found}, wanted float32 (patches, {settings.width})")
    if features.shape != (PROBE, settings.width):
        raise WeightsError(
            str(path), f"gives {features.shape[1]} features a patch, the YAML says {settings.width}"
        )
