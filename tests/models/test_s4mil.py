"""The slide model: the paper's size, the authors' outputs, exact reasons."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.s4mil import S4MIL


@pytest.mark.parametrize(("state_dim", "parameters"), [(32, 1_085_954), (128, 1_184_258)])
def test_parameter_counts_are_those_of_table_2(state_dim, parameters):
    assert sum(p.numel() for p in S4MIL(1024, state_dim=state_dim).parameters()) == parameters


def tiny(layers: int = 1, classes: int = 3) -> S4MIL:
    torch.manual_seed(0)
    return S4MIL(10, classes=classes, width=12, state_dim=4, layers=layers).eval()


def authors_parameters(file) -> dict[str, torch.Tensor]:
    """The authors' names on ours."""
    names = {
        "project.weight": "fc1.0.weight",
        "project.bias": "fc1.0.bias",
        "blocks.0.0.weight": "s4_block.0.weight",
        "blocks.0.0.bias": "s4_block.0.bias",
        "blocks.0.1.D": "s4_block.1.D",
        "blocks.0.1.mix.weight": "s4_block.1.output_linear.0.weight",
        "blocks.0.1.mix.bias": "s4_block.1.output_linear.0.bias",
        "head.weight": "fc2.weight",
        "head.bias": "fc2.bias",
    } | {f"blocks.0.1.{name}": f"s4_block.1.kernel.{name}" for name in ("log_dt", "log_A_real", "A_imag", "C")}
    state = {ours: file.get_tensor(f"state.{theirs}") for ours, theirs in names.items()}
    state["blocks.0.1.mix.weight"] = state["blocks.0.1.mix.weight"].squeeze(-1)  # a convolution of width 1
    return state


@pytest.mark.parametrize("name", ["s4model_tiny", "s4model_state32"])
def test_logits_and_probabilities_are_those_of_the_authors_model(shared, name):
    with safe_open(shared / f"reference/{name}.safetensors", "pt") as file:
        about = {key: int(value) for key, value in file.metadata().items() if value.isdigit()}
        model = S4MIL(
            about["input_dim"],
            classes=about["num_classes"],
            width=about["model_dim"],
            state_dim=about["state_dim"],
        )
        model.load_state_dict(authors_parameters(file))
        logits = model(file.get_tensor("input.features")).logits
        torch.testing.assert_close(logits, file.get_tensor("expected.logits"), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            logits.softmax(1), file.get_tensor("expected.probabilities"), rtol=1e-5, atol=1e-6
        )


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


def test_channel_first_form_gives_the_logits_as_one_tensor():
    model, features = tiny(), torch.randn(2, 30, 10)
    torch.testing.assert_close(SlideLogits(model)(features.transpose(1, 2)), model(features).logits)


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.zeros(1, 5, 9), None, r"wants features \(B, L, 10\), got \(1, 5, 9\)"),
        (torch.zeros(5, 10), None, r"wants features \(B, L, 10\), got \(5, 10\)"),
        (torch.zeros(1, 0, 10), None, "empty bag"),
        (torch.zeros(1, 5, 10), torch.ones(1, 4, dtype=torch.bool), r"wanted a mask \(1, 5\), got \(1, 4\)"),
        (torch.zeros(1, 5, 10), torch.zeros(1, 5, dtype=torch.bool), "leaves a bag without patches"),
        (torch.full((1, 5, 10), float("nan")), None, "not finite"),
    ],
    ids=["width", "rank", "empty", "mask shape", "mask empty", "nan"],
)
def test_bags_that_cannot_be_read_are_refused(features, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny()(features, mask)


@pytest.mark.gpu
def test_logits_are_the_same_on_the_gpu():
    model, features = tiny(), torch.randn(1, 3000, 10)
    ours = model(features).logits
    torch.testing.assert_close(model.cuda()(features.cuda()).logits.cpu(), ours, atol=1e-4, rtol=1e-4)
