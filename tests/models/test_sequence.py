"""LSTM and transformer: the paper's sizes, blind to padding, and no L x L matrix."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from s4mil_monai.models.bag_model import mean_valid
from s4mil_monai.models.sequence import LSTMModel, TransformerModel, take_last

MODELS = {"lstm": LSTMModel, "transformer": TransformerModel}
LENGTHS = (90, 40)


@pytest.fixture(params=MODELS)
def tiny(request):
    torch.manual_seed(0)
    return MODELS[request.param](10, classes=3, width=12).eval()


@pytest.mark.parametrize("length", [1, 7])
def test_every_bag_gets_one_logit_per_class(tiny, length):
    assert tiny(torch.randn(2, length, 10)).logits.shape == (2, 3)


def test_lstm_is_its_own_equations_stepped_patch_by_patch():
    torch.manual_seed(0)
    model, features = LSTMModel(10, classes=3, width=12).eval(), torch.randn(1, 30, 10)
    step = torch.nn.LSTMCell(12, 12)
    step.load_state_dict({name.removesuffix("_l0"): value for name, value in model.lstm.state_dict().items()})
    state = None
    for patch in torch.relu(model.project(features[0])):
        state = step(patch[None], state)
    torch.testing.assert_close(model(features).logits, model.head(state[0]), atol=1e-6, rtol=1e-5)


def test_lstm_knows_the_order_of_the_patches_and_the_transformer_does_not():
    torch.manual_seed(0)
    features = torch.randn(1, 30, 10)
    lstm, transformer = (model(10, width=12).eval() for model in (LSTMModel, TransformerModel))
    assert not torch.allclose(lstm(features).logits, lstm(features.flip(1)).logits, atol=1e-3)
    torch.testing.assert_close(
        transformer(features).logits, transformer(features.flip(1)).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_transformer_holds_no_matrix_of_every_patch_with_every_patch(training, masked):
    length = 2048
    model = TransformerModel(10).train(training)
    features, mask = torch.randn(1, length, 10), torch.arange(length)[None] < length - 5
    with torch.set_grad_enabled(training), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model(features, mask if masked else None)
    largest_bytes = max(event.self_cpu_memory_usage for event in seen.events())
    assert 0 < largest_bytes < length * length * 4  # float32, a single head


def test_transformer_layers_start_from_different_weights():
    first, second = (layer.linear1.weight for layer in TransformerModel(10).layers)
    assert not torch.equal(first, second)


def test_last_state_and_mean_are_those_of_the_valid_patches():
    values = torch.tensor([[[1.0], [3.0], [8.0]], [[5.0], [100.0], [100.0]]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert take_last(values, mask).tolist() == [[8.0], [5.0]]
    assert mean_valid(values, mask).tolist() == [[4.0], [5.0]]  # (1 + 3 + 8) / 3 and 5 / 1


def test_every_parameter_learns_from_a_padded_batch(tiny):
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tiny.train()(torch.randn(2, max(LENGTHS), 10), mask).logits.logsumexp(1).sum().backward()
    for name, parameter in tiny.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
