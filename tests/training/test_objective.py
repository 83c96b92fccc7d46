"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from s4mil_monai.training.objective import UNKNOWN, MultitaskLoss, SlideLoss


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
