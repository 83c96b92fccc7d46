"""CLAM: the authors' sizes and outputs, and the instance loss by hand."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open

from s4mil_monai.models.clam import (
    ClamMB,
    ClamOutput,
    ClamSB,
    clam_loss,
    clam_mb_authors_names,
    clam_sb_authors_names,
)

BOTH = pytest.mark.parametrize("form", [ClamSB, ClamMB])


def tiny(form, **settings):
    torch.manual_seed(0)
    return form(10, **{"classes": 3, "width": 12, "attention_width": 6} | settings).eval()


def padded_bags() -> tuple[torch.Tensor, torch.Tensor]:
    """Two bags, of 90 and 60 patches, with (B, L) mask."""
    torch.manual_seed(1)
    features, mask = torch.randn(2, 90, 10), torch.ones(2, 90, dtype=torch.bool)
    mask[1, 60:] = False
    features[1, 60:] = 1e4  # padding may hold anything
    return features, mask


@pytest.mark.parametrize(("form", "parameters"), [(ClamSB, 790_791), (ClamMB, 791_048)])
def test_parameter_counts_are_those_of_the_authors_small_size(form, parameters):
    assert sum(p.numel() for p in form(1024, classes=2).parameters()) == parameters


@pytest.mark.parametrize(
    ("form", "name", "names_for"),
    [(ClamSB, "clam_sb", clam_sb_authors_names), (ClamMB, "clam_mb", clam_mb_authors_names)],
)
def test_logits_probabilities_and_attention_are_those_of_the_authors_model(shared, form, name, names_for):
    with safe_open(shared / f"reference/{name}.safetensors", "pt") as file:
        classes = int(file.metadata()["num_classes"])
        model = form(1024, classes=classes).eval()
        model.load_state_dict({o: file.get_tensor(f"state.{theirs}") for o, theirs in names_for(classes).items()})
        output = model(file.get_tensor("input.features"))
        for ours, theirs in [
            (output.logits, "logits"),
            (output.logits.softmax(1), "probabilities"),
            (output.attention_raw[0], "attention_raw"),
        ]:
            torch.testing.assert_close(ours, file.get_tensor(f"expected.{theirs}"), rtol=1e-5, atol=1e-6)


@BOTH
def test_padding_a_bag_does_not_change_its_score_or_instance_loss(form):
    model, (features, mask), labels = tiny(form, subtyping=True), padded_bags(), torch.tensor([0, 2])
    padded = model(features, mask)
    bags = [features[:1], features[1:, :60]]
    alone = [model(bag) for bag in bags]
    torch.testing.assert_close(padded.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=1e-5)
    losses = [model.instance_loss(one, labels[i : i + 1]) for i, one in enumerate(alone)]
    torch.testing.assert_close(model.instance_loss(padded, labels, mask), sum(losses) / 2)


@BOTH
def test_padding_that_overflows_half_precision_does_not_spoil_the_score(form):
    model, features = tiny(form), torch.randn(1, 6, 10)
    features[0, 4:] = 1e6  # infinite as float16
    mask = torch.tensor([[True] * 4 + [False] * 2])
    with torch.autocast("cpu", dtype=torch.float16):
        padded, plain = model(features, mask).logits, model(features[:, :4]).logits
    torch.testing.assert_close(padded, plain, atol=1e-3, rtol=1e-3)


@BOTH
def test_order_of_the_patches_does_not_change_the_score_and_attention_follows_them(form):
    model, features, order = tiny(form), torch.randn(1, 80, 10), torch.randperm(80)
    before, after = model(features), model(features[:, order])
    torch.testing.assert_close(after.logits, before.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(after.attention, before.attention[:, order])


@BOTH
def test_attention_adds_up_to_one_over_the_patches_and_is_zero_at_padding(form):
    features, mask = padded_bags()
    attention = tiny(form)(features, mask).attention
    torch.testing.assert_close(attention.sum(1), torch.ones(2))
    assert not attention[~mask].any()


def test_attention_shown_is_that_of_the_predicted_class():
    output = tiny(ClamMB)(torch.randn(4, 20, 10))
    for bag, predicted in enumerate(output.logits.argmax(1)):
        torch.testing.assert_close(output.attention[bag], output.attention_raw[bag, predicted].softmax(0))


def separator(form, *, subtyping: bool):
    """Instance classifiers that give a patch of height h the logits (0, h log 3): odds of evidence 3^h."""
    model = form(1, classes=2, k_sample=1, subtyping=subtyping, width=1, attention_width=1)
    for head in model.instance_heads:
        torch.nn.init.zeros_(head.bias)
        head.weight.data = torch.tensor([[0.0], [math.log(3)]])
    return model


def bag_of_heights(form) -> ClamOutput:
    """Patches of height 0, 1, 2, 3; class 0 attends most to 1 and least to 2, class 1 (MB) most to 3."""
    scores = torch.tensor([[[0.0, 5.0, -5.0, 1.0], [0.0, 1.0, 2.0, 9.0]]])
    hidden = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])
    return ClamOutput(
        logits=torch.zeros(1, 2), attention_raw=scores[:, :1] if form is ClamSB else scores, hidden=hidden
    )


@pytest.mark.parametrize(
    ("form", "subtyping", "expected"),
    [
        # top: height 1 is evidence with 3/4; bottom: height 2 is none with 1/10
        (ClamSB, False, math.log(4 / 3 * 10) / 2),
        (ClamMB, False, math.log(4 / 3 * 10) / 2),
        # the other class's top: height 1 again, none with 1/4; over two classes
        (ClamSB, True, (math.log(4 / 3 * 10) / 2 + math.log(4)) / 2),
        # its own branch's top: height 3, none with 1/28
        (ClamMB, True, (math.log(4 / 3 * 10) / 2 + math.log(28)) / 2),
    ],
)
def test_instance_loss_is_the_hand_calculation(form, subtyping, expected):
    loss = separator(form, subtyping=subtyping).instance_loss(bag_of_heights(form), torch.tensor([0]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_instance_loss_never_takes_padding():
    """Without patch 1 the most attended is that of height 3, evidence with 27/28."""
    mask = torch.tensor([[True, False, True, True]])
    loss = separator(ClamSB, subtyping=False).instance_loss(bag_of_heights(ClamSB), torch.tensor([0]), mask)
    assert loss.item() == pytest.approx(math.log(28 / 27 * 10) / 2, rel=1e-6)


def test_bag_shorter_than_k_sample_gives_all_its_patches_at_both_ends():
    """One patch of height 0 is evidence with 1/2 and none with 1/2."""
    model = separator(ClamSB, subtyping=False)
    only_first = torch.tensor([[True, False, False, False]])
    model.k_sample = 8
    loss = model.instance_loss(bag_of_heights(ClamSB), torch.tensor([0]), only_first)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


@BOTH
def test_both_losses_together_reach_every_parameter(form):
    model, labels = tiny(form, subtyping=True, dropout=0.25).train(), torch.tensor([0, 2])
    features, mask = padded_bags()
    output = model(features, mask)
    bag_loss = torch.nn.functional.cross_entropy(output.logits, labels)
    clam_loss(bag_loss=bag_loss, instance_loss=model.instance_loss(output, labels, mask)).backward()
    # the softmax does not see the bias of the attention's scores
    still = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7}
    assert still <= {"attend.score.bias"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0], r"one label per bag, \(2,\), got \(1,\)"), ([0, 3], r"classes in \[0, 3\), got \[0, 3\]")],
)
def test_labels_that_fit_no_bag_or_class_are_refused(labels, message):
    model = tiny(ClamSB)
    with pytest.raises(ValueError, match=message):
        model.instance_loss(model(torch.randn(2, 20, 10)), torch.tensor(labels))


def test_weights_and_sample_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\], got 1.5"):
        clam_loss(torch.tensor(1.0), torch.tensor(1.0), bag_weight=1.5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ClamSB(10, k_sample=0)
