"""The slide model: the paper's size, the authors' outputs, exact reasons."""

from __future__ import annotations

import pytest
import torch

from s4mil_monai.models.s4d import convolve_blocks
from s4mil_monai.models.s4mil import S4MIL, SEGMENT


def tiny(layers: int = 1, classes: int = 3) -> S4MIL:
    torch.manual_seed(0)
    return S4MIL(10, classes=classes, width=12, state_dim=4, layers=layers).eval()


def test_padding_a_bag_does_not_change_its_score():
    model, features = tiny(), torch.randn(2, 90, 10)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1, 60:] = False
    features[1, 60:] = 1e4  # padding may hold anything
    padded = model(features, mask)
    torch.testing.assert_close(padded.logits[0], model(features[:1]).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.logits[1], model(features[1:, :60]).logits[0], atol=1e-5, rtol=1e-5)
    assert padded.winners[1].max() < 60


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_contributions_and_bias_add_up_to_the_logits(layers):
    model, features = tiny(layers), torch.randn(1, 200, 10)
    output = model(features)
    parts = model.take_apart(output)
    torch.testing.assert_close(
        (parts.bias + parts.contributions.sum(0)).float(), output.logits[0], atol=1e-5, rtol=1e-5
    )


def test_patches_that_won_nothing_can_be_anything_below_the_maximum():
    """The patches named as deciding are all that the score rests on."""
    model, features = tiny(), torch.randn(1, 50, 10)
    output = model(features)
    values = model.blocks(torch.relu(model.project(features)))
    deciding = model.take_apart(output).patches
    torch.testing.assert_close(model.head(values[:, deciding].max(1).values), output.logits, atol=1e-6, rtol=1e-6)


def test_patch_logits_are_the_score_of_a_slide_whose_every_maximum_is_that_patch():
    model, features = tiny(), torch.randn(1, 1, 10)
    output = model(features)
    torch.testing.assert_close(output.patch_logits[:, 0], output.logits)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 63, 64, 65, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 100])
def test_reading_in_segments_gives_what_reading_at_once_gives(layers, length):
    model, features = tiny(layers), torch.randn(2, length, 10)
    at_once = model(features)  # gradients are wanted
    with torch.no_grad():
        in_segments = model(features)
    assert in_segments.patch_logits.shape == (2, length, 3)
    for name in ("logits", "patch_logits", "pooled"):
        torch.testing.assert_close(getattr(in_segments, name), getattr(at_once, name), atol=1e-5, rtol=1e-5)
    gathered = at_once.pooled.new_empty(2, 12)
    values = model.blocks(torch.relu(model.project(features)))
    for bag in range(2):
        gathered[bag] = values[bag, in_segments.winners[bag], torch.arange(12)].detach()
    torch.testing.assert_close(gathered, at_once.pooled, atol=1e-5, rtol=1e-5)  # a winner holds the maximum


def test_padding_does_not_matter_when_read_in_segments():
    model = tiny()
    features = torch.randn(2, SEGMENT + 500, 10)
    mask = torch.ones(2, SEGMENT + 500, dtype=torch.bool)
    mask[1, 700:] = False
    features[1, 700:] = 1e4
    with torch.inference_mode():
        padded = model(features, mask)
        alone = model(features[1:, :700])
    torch.testing.assert_close(padded.logits[1:], alone.logits, atol=1e-5, rtol=1e-5)
    assert padded.winners[1].max() < 700


def test_multitask_form_scores_patches_by_a_layer_of_their_own():
    torch.manual_seed(0)
    model = S4MIL(10, classes=2, width=12, state_dim=4, patch_classes=5)
    output = model(torch.randn(1, 30, 10))
    assert output.patch_logits.shape == (1, 30, 5)
    output.patch_logits.sum().backward()
    assert model.patch_head.weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None


def test_bilinear_discretization_is_another_model_that_agrees_for_short_steps():
    torch.manual_seed(0)
    held = S4MIL(10, width=12, state_dim=4).eval()
    bilinear = S4MIL(10, width=12, state_dim=4, discretization="bilinear").eval()
    bilinear.load_state_dict(held.state_dict())
    features = torch.randn(1, 40, 10)
    assert (held(features).logits - bilinear(features).logits).abs().max() > 1e-5
    for model in (held, bilinear):  # a step so short that both are Euler's
        model.load_state_dict({**held.state_dict(), "blocks.0.1.log_dt": torch.full((12,), -12.0)})
    torch.testing.assert_close(held(features).logits, bilinear(features).logits, atol=1e-5, rtol=1e-4)


def test_unknown_discretization_is_refused():
    with pytest.raises(ValueError, match="discretization is one of"):
        S4MIL(10, discretization="euler")


@pytest.mark.parametrize("gradients", [False, True], ids=["segments", "whole"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_products_keep_a_float32_state_and_nearly_the_score(device, gradients):
    torch.manual_seed(0)
    model = S4MIL(64, width=128, state_dim=32).eval().to(device)
    features = torch.randn(1, 3000, 64, device=device)
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    with torch.set_grad_enabled(gradients):
        exact = model(features).logits
        with torch.autocast(device, dtype):
            half = model(features)
            _, state = convolve_blocks(features.new_ones(1, 128, 128), model.layers()[0][1].block_constants())
    assert state.dtype == torch.complex64
    assert half.logits.dtype == dtype  # the products were of half precision
    assert (half.logits.float() - exact).abs().max() < 0.02 * exact.abs().max() + 0.02
