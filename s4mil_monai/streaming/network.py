"""A bundle's slide model at MONAI's seam, run by an exported step instead of by PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from s4mil_monai.models.bundle import load_bundle
from s4mil_monai.streaming.choose import open_runtime
from s4mil_monai.streaming.stream import SlideStream


class StreamedSlideLogits(nn.Module):
    """Channel-first ``(B, D, L)`` features in, ``(B, C)`` slide logits out, as
    :class:`s4mil_monai.models.bag_model.SlideLogits`; no parameters, for they are in the step.

    Args:
        bundle: Folder of the bundle, whose ``models`` holds what ``s4mil export`` wrote.
        runtime: ``tensorrt``, ``onnxruntime``, ``torch`` or ``auto``.
        precision: Of products.

    Raises:
        BundleError: The bundle is damaged.
        ExportError: There is no step that fits the bundle and this machine.
    """

    def __init__(self, bundle: str | Path, *, runtime: str = "tensorrt", precision: str = "float32"):
        super().__init__()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = load_bundle(bundle)
        self.chosen = open_runtime(
            loaded, Path(bundle) / "models", name=runtime, precision=precision, device=device
        )

    @torch.inference_mode()
    def forward(self, image: Tensor) -> Tensor:
        logits = [self._read(features) for features in image.transpose(1, 2)]
        return torch.cat(logits).to(image.device)

    def _read(self, features: Tensor) -> Tensor:
        stream = SlideStream(self.chosen.runtime)
        stream.add(features)
        return stream.finish().logits
