"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.clam import ClamSB, clam_loss
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.training.objective import (
    UNKNOWN,
    ClamInTraining,
    ClamObjective,
    MultitaskInTraining,
    MultitaskLoss,
    MultitaskObjective,
    SlideLoss,
)


def test_slide_loss_is_minus_the_log_of_the_true_classs_probability():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    # probabilities of the true classes: 3/4 and 1/2
    wanted = -(math.log(0.75) + math.log(0.5)) / 2
    assert SlideLoss()(logits, torch.tensor([1, 0])).item() == pytest.approx(wanted)


def test_released_codes_loss_takes_the_softmax_twice():
    logits = torch.tensor([[-50.0, 50.0]])  # as sure and right as can be
    labels = torch.tensor([1])
    assert SlideLoss()(logits, labels).item() == pytest.approx(0, abs=1e-6)
    assert SlideLoss(repo_compat=True)(logits, labels).item() == pytest.approx(-math.log(math.e / (math.e + 1)))


def test_multitask_loss_adds_five_times_the_mean_over_labelled_patches():
    logits, labels = torch.zeros(1, 2), torch.tensor([1])  # log 2
    patch_logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [9.0, 0.0]]])
    patch_labels = torch.tensor([[1, 0, UNKNOWN]])
    wanted = math.log(2) + 5 * -(math.log(0.75) + math.log(0.5)) / 2
    assert MultitaskLoss()(logits, patch_logits, labels, patch_labels).item() == pytest.approx(wanted)


def test_bag_without_patch_labels_counts_with_its_slide_alone():
    logits, labels = torch.zeros(2, 2), torch.tensor([1, 0])
    patch_logits = torch.zeros(2, 3, 2)
    patch_labels = torch.full((2, 3), UNKNOWN)
    loss = MultitaskLoss()
    assert loss(logits, patch_logits, labels, patch_labels).item() == pytest.approx(math.log(2))
    patch_labels[1] = 0  # one bag of two labelled: half of log 2, five times
    assert loss(logits, patch_logits, labels, patch_labels).item() == pytest.approx(math.log(2) * 3.5)


def test_class_weights_are_felt_in_a_batch_of_one_bag():
    loss = SlideLoss(class_weights=[0.5, 3.0])
    # PyTorch's own weighted mean would give log 2 for both
    assert loss(torch.zeros(1, 2), torch.tensor([1])).item() == pytest.approx(3 * math.log(2))
    assert loss(torch.zeros(2, 2), torch.tensor([0, 1])).item() == pytest.approx(3.5 / 2 * math.log(2))
    assert not loss.state_dict()  # no part of a checkpoint


def test_multitask_network_in_training_hands_its_loss_both_logits():
    torch.manual_seed(0)
    network = SlideLogits(S4MIL(3, width=4, state_dim=4, patch_classes=2))
    image, labels, patch_labels = torch.randn(1, 3, 5), torch.tensor([1]), torch.tensor([[0, 1, 1, UNKNOWN, 0]])
    output = network.model(image.transpose(1, 2))
    wanted = MultitaskLoss()(output.logits, output.patch_logits, labels, patch_labels)
    found = MultitaskObjective(MultitaskLoss())(MultitaskInTraining(network)(image, patch_labels), labels)
    assert found.item() == pytest.approx(wanted.item())


def test_bag_without_patch_labels_gives_every_parameter_a_gradient_of_zero_at_least():
    network = SlideLogits(S4MIL(3, width=4, state_dim=4, patch_classes=2))  # else several processes wait for ever
    output = MultitaskInTraining(network)(torch.randn(1, 3, 5), torch.full((1, 5), UNKNOWN))
    MultitaskObjective(MultitaskLoss())(output, torch.tensor([1])).backward()
    assert network.model.patch_head.weight.grad.abs().sum() == 0
    assert all(p.grad is not None for p in network.parameters())


def test_clam_in_training_is_the_papers_sum_of_both_losses():
    torch.manual_seed(0)
    model = ClamSB(3, width=4, attention_width=4, k_sample=2)
    image, labels = torch.randn(1, 3, 9), torch.tensor([1])
    output = model(image.transpose(1, 2))
    wanted = clam_loss(SlideLoss()(output.logits, labels), model.instance_loss(output, labels), 0.6)
    found = ClamObjective(SlideLoss(), bag_weight=0.6)(ClamInTraining(SlideLogits(model))(image, labels), labels)
    assert found.item() == pytest.approx(wanted.item())
