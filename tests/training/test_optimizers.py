"""What is decayed, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.training.lookahead import Lookahead
from s4mil_monai.training.optimizers import group_parameters


def names_of(group, network):
    ids = {id(p) for p in group["params"]}
    return {name for name, p in network.named_parameters() if id(p) in ids}


def test_time_scales_of_every_s4d_layer_are_not_decayed_and_all_else_is():
    network = S4MIL(3, width=4, state_dim=4, layers=2)
    decayed, spared = group_parameters(network, weight_decay=0.1)
    wanted = {f"blocks.{i}.1.{name}" for i in (0, 1) for name in ("log_dt", "log_A_real", "A_imag")}
    assert names_of(spared, network) == wanted
    assert names_of(decayed, network) == {name for name, _ in network.named_parameters()} - wanted
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_released_codes_way_decays_everything():
    network = S4MIL(3, width=4, state_dim=4)
    (group,) = group_parameters(network, weight_decay=0.1, ssm_weight_decay=True)
    assert names_of(group, network) == {name for name, _ in network.named_parameters()}


def test_network_without_s4d_has_one_group_and_frozen_parameters_none():
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    (group,) = group_parameters(network, weight_decay=0.1)
    assert names_of(group, network) == {"weight"}


def test_decay_moves_what_has_no_gradient_and_leaves_the_time_scales():
    network = S4MIL(3, width=4, state_dim=4)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = Lookahead(torch.optim.Adam(group_parameters(network, weight_decay=0.1), lr=0.01))
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(network.named_parameters())
    assert torch.equal(after["blocks.0.1.log_dt"], before["blocks.0.1.log_dt"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


@pytest.mark.parametrize("finite", [True, False])
def test_lookahead_steps_under_gradient_scaling_and_skips_overflows(finite):
    p = nn.Parameter(torch.tensor([10.0]))
    optimizer = Lookahead(torch.optim.SGD([p], lr=1.0), k=1, alpha=0.5)
    scaler = torch.amp.GradScaler("cpu")
    loss = (p * (1.0 if finite else float("inf"))).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert p.item() == (9.5 if finite else 10.0)  # half of a step of 1
