"""TransMIL: the authors' size and outputs, and bags that do not disturb one another."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from s4mil_monai.models.transmil import AUTHORS_NAMES, TransLayer, TransMIL, attend_few, fill_square

pytest.importorskip("nystrom_attention")


def tiny(**settings) -> TransMIL:
    torch.manual_seed(0)
    return TransMIL(10, **{"classes": 3, "width": 16} | settings).eval()


def padded_bags() -> tuple[torch.Tensor, torch.Tensor]:
    """Two bags, of 90 and 60 patches, with (B, L) mask."""
    torch.manual_seed(1)
    features, mask = torch.randn(2, 90, 10), torch.ones(2, 90, dtype=torch.bool)
    mask[1, 60:] = False
    features[1, 60:] = 1e4  # padding may hold anything
    return features, mask


def test_parameter_count_is_that_of_the_authors():
    assert sum(p.numel() for p in TransMIL(1024, classes=2).parameters()) == 2_672_146


def test_logits_and_probabilities_are_those_of_the_authors_model(shared):
    with safe_open(shared / "reference/transmil.safetensors", "pt") as file:
        model = TransMIL(1024, classes=int(file.metadata()["num_classes"])).eval()
        model.load_state_dict({o: file.get_tensor(f"state.{theirs}") for o, theirs in AUTHORS_NAMES.items()})
        logits = model(file.get_tensor("input.features")).logits
        torch.testing.assert_close(logits, file.get_tensor("expected.logits"), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            logits.softmax(1), file.get_tensor("expected.probabilities"), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("patches", [1, 2, 3, 4, 5, 10, 16, 17])
def test_square_is_the_next_one_and_repeats_only_the_first_patches(patches):
    square = fill_square(torch.arange(patches).unsqueeze(1)).flatten().tolist()
    side = next(s for s in range(1, 6) if s * s >= patches)
    assert square == [*range(patches), *range(side * side - patches)]


@pytest.mark.parametrize("patches", [1, 2, 3, 5, 9])
def test_bag_of_any_length_has_a_finite_score(patches):
    assert tiny()(torch.randn(1, patches, 10)).logits.isfinite().all()


def test_multitask_form_has_one_row_of_logits_per_patch_and_plain_form_none():
    features = torch.randn(2, 30, 10)
    output = tiny(patch_classes=4)(features)
    assert output.logits.shape == (2, 3)
    assert output.patch_logits.shape == (2, 30, 4)
    assert tiny()(features).patch_logits is None


def test_slide_and_patch_losses_together_reach_every_parameter():
    model, (features, mask) = tiny(patch_classes=2).train(), padded_bags()
    output = model(features, mask)
    slide_loss = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 2]))
    (slide_loss + output.patch_logits[mask].logsumexp(1).mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_width_that_eight_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of 8, the number of heads, got 20"):
        TransMIL(10, width=20)


@pytest.mark.parametrize("tokens", [1, 2, 26, 37, 255])
def test_few_tokens_get_what_the_library_computes_with_all_its_landmarks(tokens):
    torch.manual_seed(tokens)
    attention = TransLayer(512, dropout=0.0).attention.double()
    with torch.no_grad():
        attention.to_qkv.weight.mul_(3)  # attention that is far from even
    inputs = torch.randn(2, tokens, 512, dtype=torch.float64)
    outputs, gradients = [], []
    for attend in (attention, lambda x: attend_few(attention, x)):
        attention.zero_grad()
        outputs.append(attend(inputs))
        outputs[-1].square().sum().backward()
        gradients.append(attention.to_qkv.weight.grad.clone())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
