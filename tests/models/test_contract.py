"""One contract, every model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from s4mil_monai.models.bag_model import BagModel, SlideLogits
from s4mil_monai.models.clam import ClamMB, ClamSB
from s4mil_monai.models.pooled import PooledModel
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.models.sequence import LSTMModel, TransformerModel
from s4mil_monai.models.transmil import TransMIL

D, CLASSES = 24, 3
MODELS: dict[str, Callable[..., BagModel]] = {
    "S4MIL": lambda **k: S4MIL(state_dim=32, **k),
    "S4MIL N=128": lambda **k: S4MIL(state_dim=128, **k),
    "S4MIL multitask": lambda **k: S4MIL(patch_classes=2, **k),
    "CLAM-SB": lambda **k: ClamSB(**k),
    "CLAM-MB": lambda **k: ClamMB(**k),
    "TransMIL": lambda **k: TransMIL(**k),
    "TransMIL multitask": lambda **k: TransMIL(patch_classes=2, **k),
    "transformer": lambda **k: TransformerModel(**k),
    "LSTM": lambda **k: LSTMModel(**k),
    "mean pooling": lambda **k: PooledModel(pooling="mean", **k),
    "max pooling": lambda **k: PooledModel(pooling="max", **k),
}
PARAMETERS = {  # Table 2 of the paper: 1024 inputs, two classes
    "mean pooling": 1_025,
    "max pooling": 1_025,
    "transformer": 1_054_978,
    "LSTM": 789_250,
    "CLAM-SB": 790_791,
    "CLAM-MB": 791_048,
    "TransMIL": 2_672_146,
    "S4MIL N=128": 1_184_258,
    "S4MIL": 1_085_954,
}
ORDER_FREE = ["CLAM-SB", "CLAM-MB", "mean pooling", "max pooling"]


def make(name: str, in_features: int = D, classes: int = CLASSES) -> BagModel:
    if name.startswith("TransMIL"):
        pytest.importorskip("nystrom_attention")
    torch.manual_seed(0)
    return MODELS[name](in_features=in_features, classes=classes).eval()


@pytest.fixture(params=list(MODELS))
def any_model(request) -> BagModel:
    return make(request.param)


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameter_counts_are_those_of_table_2(name, parameters):
    assert sum(p.numel() for p in make(name, 1024, 2).parameters()) == parameters


@pytest.mark.parametrize("length", [1, 2, 50])
def test_outputs_have_the_shapes_of_the_contract(any_model, length):
    output = any_model(torch.randn(2, length, D))
    assert output.logits.shape == (2, CLASSES)
    if output.patch_logits is not None:
        assert output.patch_logits.shape[:2] == (2, length)
    if output.attention is not None:
        assert output.attention.shape == (2, length)
        torch.testing.assert_close(output.attention.sum(1), torch.ones(2))


@torch.no_grad()
def test_padding_a_bag_does_not_change_its_score(any_model):
    features = torch.randn(2, 70, D)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, 40:] = False
    features[1, 40:] = 1e3
    padded = any_model(features, mask)
    torch.testing.assert_close(padded.logits[:1], any_model(features[:1]).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded.logits[1:], any_model(features[1:, :40]).logits, atol=1e-4, rtol=1e-4)
    if padded.attention is not None:
        assert (padded.attention[1, 40:] == 0).all()


@torch.no_grad()
def test_score_of_a_bag_does_not_depend_on_its_neighbours_in_the_batch(any_model):
    features = torch.randn(3, 30, D)
    torch.testing.assert_close(
        any_model(features).logits[:1], any_model(features[:1]).logits, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ORDER_FREE)
@torch.no_grad()
def test_pooled_and_clam_models_do_not_see_the_order_of_patches(name):
    model, features = make(name), torch.randn(1, 60, D)
    shuffled = features[:, torch.randperm(60)]
    torch.testing.assert_close(model(shuffled).logits, model(features).logits, atol=1e-5, rtol=1e-5)


def test_every_parameter_of_the_score_learns(any_model):
    any_model.train()
    any_model(torch.randn(2, 40, D)).logits.square().sum().backward()
    learned = [name for name, p in any_model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    beside = {name for name, _ in any_model.named_parameters() if "instance_heads" in name or "patch_head" in name}
    assert set(learned) >= {name for name, _ in any_model.named_parameters()} - beside - {
        "attend.score.bias",  # a constant added to every score leaves the softmax as it is
        *(name for name, _ in any_model.named_parameters() if "in_proj_bias" in name),
    }


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.zeros(1, 5, D + 1), None, rf"wants features \(B, L, {D}\), got \(1, 5, {D + 1}\)"),
        (torch.zeros(5, D), None, rf"wants features \(B, L, {D}\), got \(5, {D}\)"),
        (torch.zeros(1, 0, D), None, "empty bag"),
        (torch.full((1, 5, D), float("nan")), None, "not finite"),
        (torch.full((1, 5, D), float("-inf")), None, "not finite"),
        (torch.zeros(1, 5, D), torch.ones(1, 4, dtype=torch.bool), r"wanted a mask \(1, 5\), got \(1, 4\)"),
        (torch.zeros(1, 5, D), torch.zeros(1, 5, dtype=torch.bool), "leaves a bag without patches"),
    ],
    ids=["width", "rank", "empty", "nan", "infinity", "mask shape", "mask empty"],
)
def test_bags_that_cannot_be_read_are_refused(any_model, features, mask, message):
    with pytest.raises(ValueError, match=message):
        any_model(features, mask)


def test_channel_first_form_is_one_tensor_for_a_monai_bundle(any_model):
    with torch.no_grad():
        assert SlideLogits(any_model)(torch.randn(2, D, 30)).shape == (2, CLASSES)


@pytest.mark.gpu
@torch.no_grad()
def test_logits_are_the_same_on_the_gpu(any_model):
    features = torch.randn(2, 3000, D)
    ours = any_model(features).logits
    torch.testing.assert_close(any_model.cuda()(features.cuda()).logits.cpu(), ours, atol=1e-3, rtol=1e-3)
