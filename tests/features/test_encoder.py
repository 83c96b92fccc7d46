"""Encoders: real weights, strict loading, fingerprints."""

from __future__ import annotations

import urllib.error

import numpy as np
import pytest
import torch
from skimage.data import chelsea, coffee, immunohistochemistry
from torch.nn import functional as F

from s4mil_monai.errors import UnknownNameError, WeightsError
from s4mil_monai.features import encoder as encoders
from s4mil_monai.features.efficientnet_lite0 import EfficientNetLite0, SameConv2d
from s4mil_monai.features.encoder import ENCODERS, load_encoder
from s4mil_monai.features.encoder_runtime import find_processor
from s4mil_monai.weights import read_weights


def normalised(picture: np.ndarray, spec) -> torch.Tensor:
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255
    return (
        (pixels - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.deviation).view(3, 1, 1)
    ).unsqueeze(0)


@pytest.mark.parametrize(
    ("photograph", "classes"), [(chelsea, (281, 282, 285)), (coffee, (967,))], ids=["cat", "espresso"]
)
def test_lite0_with_its_classifier_knows_what_is_on_a_photograph(lite0, photograph, classes):
    """Weights, padding and normalisation are right together, or ImageNet's classes come out wrong."""
    state = read_weights(ENCODERS["efficientnet_lite0"].find_weights())
    picture = photograph()
    height, width = picture.shape[:2]
    square = picture[:, (width - height) // 2 :][:, :height]
    patch = F.interpolate(normalised(square, lite0.spec), size=(224, 224), mode="bilinear", antialias=True)
    probabilities = F.linear(lite0.encode(patch), state["_fc.weight"], state["_fc.bias"]).softmax(1)[0]
    assert probabilities[list(classes)].sum() > 0.8


def test_folding_batch_norms_changes_nothing(lite0):
    plain = EfficientNetLite0().eval()
    state = read_weights(ENCODERS["efficientnet_lite0"].find_weights())
    plain.load_state_dict({key: value for key, value in state.items() if not key.startswith("_fc")})
    patch = normalised(immunohistochemistry()[:256, :256], lite0.spec)
    with torch.inference_mode():
        torch.testing.assert_close(lite0.encode(patch), plain(patch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("side", "pads"), [(256, (0, 1)), (255, (1, 1))])
def test_same_padding_is_tensorflows(side, pads):
    assert SameConv2d(3, 8, 3, stride=2)._pads(side) == pads


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    """A whole ResNet50 under torchvision's parameter names, with random weights."""
    from monai.networks.nets.resnet import ResNet, ResNetBottleneck

    torch.manual_seed(0)
    network = ResNet(
        ResNetBottleneck, [3, 4, 6, 3], [64, 128, 256, 512], spatial_dims=2, conv1_t_size=7, conv1_t_stride=2,
        shortcut_type="B", feed_forward=True, num_classes=1000, bias_downsample=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("resnet") / "resnet50.pth"
    torch.save(network.state_dict(), path)
    return path, network.eval()


def test_resnet50_is_cut_after_the_third_block_and_mean_pooled(resnet_file):
    path, whole = resnet_file
    encoder = load_encoder("resnet50_block3", weights=path)
    patch = torch.randn(2, 3, 256, 256)
    with torch.inference_mode():
        x = whole.maxpool(F.relu(whole.bn1(whole.conv1(patch))))
        wanted = whole.layer3(whole.layer2(whole.layer1(x))).mean((2, 3))
    features = encoder.encode(patch)
    assert features.shape == (2, 1024)
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=1e-4)


def test_fingerprint_is_of_the_values_not_of_the_file(resnet_file, tmp_path):
    path, _ = resnet_file
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if not key.startswith("fc")}, tmp_path / "other.pt")
    first = load_encoder("resnet50_block3", weights=path).fingerprint
    assert load_encoder("resnet50_block3", weights=tmp_path / "other.pt").fingerprint == first
    state["conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "changed.pt")
    assert load_encoder("resnet50_block3", weights=tmp_path / "changed.pt").fingerprint != first


def test_encoder_says_what_runs_it_and_what_it_is_meant_for(lite0):
    assert (lite0.runtime, lite0.precision) == ("torch", "float32")
    for spec in ENCODERS.values():
        assert (spec.patch_side_px, spec.mpp) == (256, 0.5)


@pytest.mark.skipif(not find_processor().has_bfloat16, reason="this processor has no bfloat16")
def test_half_precision_of_real_weights_is_close_and_misses_the_gate_of_auto(lite0):
    """Why ``auto`` never chooses it."""
    half = load_encoder("efficientnet_lite0", precision="bfloat16")
    assert (half.precision, half.fingerprint) == ("bfloat16", lite0.fingerprint)
    patch = normalised(immunohistochemistry()[:256, :256], lite0.spec)
    cosine = F.cosine_similarity(half.encode(patch), lite0.encode(patch)).item()
    assert 0.99 < cosine < 0.9999


def test_unknown_encoder_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="known: resnet50_block3, efficientnet_lite0"):
        load_encoder("resnet18")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"gone\.pth: there is no such weights file"):
        load_encoder("resnet50_block3", weights=tmp_path / "gone.pth")


def test_damaged_weights_are_named(resnet_file, tmp_path):
    path, _ = resnet_file
    damaged = tmp_path / "half.pth"
    damaged.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(WeightsError, match=r"half\.pth: damaged"):
        load_encoder("resnet50_block3", weights=damaged)


def test_weights_of_another_network_are_refused(lite0):
    path = ENCODERS["efficientnet_lite0"].find_weights()
    with pytest.raises(WeightsError, match=r"weights of another network: lacks conv1\.weight"):
        load_encoder("resnet50_block3", weights=path)


def test_weights_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="damaged, or not a weights file"):
        load_encoder("resnet50_block3", weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_download_that_fails_says_how_to_go_on(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(encoders.torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(encoders.torch.hub, "download_url_to_file", offline)
    with pytest.raises(WeightsError, match=r"resnet50-0676ba61\.pth: cannot be downloaded .* --encoder_weights"):
        load_encoder("resnet50_block3")


@pytest.mark.gpu
def test_encoder_gives_the_same_features_on_the_gpu(lite0):
    patch = normalised(immunohistochemistry()[:256, :256], lite0.spec)
    ours = load_encoder("efficientnet_lite0", device="cuda").encode(patch)
    assert F.cosine_similarity(ours, lite0.encode(patch)).item() > 0.9999
