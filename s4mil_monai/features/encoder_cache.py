"""What encoders keep between runs: exported models, and which runtime was the fastest.

Everything here can be deleted at any time. What is missing, damaged or of other versions is made again; a folder
that cannot be written only means that nothing is kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from s4mil_monai.checksum import sha256_of
from s4mil_monai.onnx_graphs import export_graph
from s4mil_monai.whole_file import write_whole

logger = logging.getLogger(__name__)

OPSET = 18


def cache_folder() -> Path:
    """``s4mil_monai`` under ``XDG_CACHE_HOME`` or ``~/.cache``; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "s4mil_monai"


@contextmanager
def exported_model(
    network: nn.Module, *, name: str, fingerprint: str, patch_side_px: int, folder: Path | None = None
) -> Iterator[Path]:
    """Give a network as an ONNX file of one input (B, 3, p, p) of any B: the kept one, or a new one.

    The SHA-256 of the file is part of its name, so that a damaged one is noticed.

    Args:
        network: With its weights, on the CPU.
        name: Of the encoder.
        fingerprint: Of the weights.
        patch_side_px: Side of the patches it will see.
        folder: Where models are kept; by default under :func:`cache_folder`.

    Raises:
        MissingExtraError: The exporter is not installed.
        RuntimeError: The network cannot be exported.
    """
    folder = folder if folder is not None else cache_folder() / "onnx"
    stem = f"{name}-{fingerprint[:16]}-{patch_side_px}-torch{torch.__version__}"
    kept = _find_kept(folder, stem)
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="s4mil-onnx-") as scratch:
        made = Path(scratch) / f"{name}.onnx"
        export_onnx(network, made, patch_side_px=patch_side_px)
        content = made.read_bytes()
        target = folder / f"{stem}-{hashlib.sha256(content).hexdigest()}.onnx"
        try:
            write_whole(target, content)
        except OSError as error:
            logger.info("%s: the exported encoder is not kept (%s)", folder, error)
        yield made


def _find_kept(folder: Path, stem: str) -> Path | None:
    """The file of a stem whose content is what its name says; others are removed."""
    for path in sorted(folder.glob(f"{stem}-*.onnx")):
        try:
            if sha256_of(path) == path.stem.removeprefix(f"{stem}-"):
                return path
            path.unlink()
        except OSError:
            continue
    return None


def export_onnx(network: nn.Module, path: Path, *, patch_side_px: int) -> None:
    """Write a network as ONNX, for patches of one side and any number.

    Raises:
        MissingExtraError: The exporter is not installed.
        RuntimeError: The network cannot be exported.
    """
    export_graph(
        network,
        (torch.zeros(2, 3, patch_side_px, patch_side_px),),
        f=path,
        input_names=["patches"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("patches", min=1)},),
        opset_version=OPSET,
        external_data=False,
    )
