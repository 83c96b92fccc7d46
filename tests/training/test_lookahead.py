"""Lookahead against its definition, by hand."""

from __future__ import annotations

import pytest
import torch

from s4mil_monai.training.lookahead import Lookahead


def run(optimizer, p, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (p * 1.0).sum().backward()  # the gradient is 1 everywhere
        optimizer.step()


def test_slow_weights_go_part_of_the_way_after_k_steps():
    p = torch.nn.Parameter(torch.tensor([10.0]))
    optimizer = Lookahead(torch.optim.SGD([p], lr=1.0), k=4, alpha=0.25)
    run(optimizer, p, 3)
    assert p.item() == 7.0  # three fast steps of 1
    run(optimizer, p, 1)
    assert p.item() == 9.0  # 10 + 0.25 (6 - 10)
    run(optimizer, p, 4)
    assert p.item() == 8.0  # from 9: 9 + 0.25 (5 - 9)


def test_training_goes_on_from_its_state_as_if_it_had_not_stopped():
    def make():
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        return p, Lookahead(torch.optim.Adam([p], lr=0.1), k=3)

    p, optimizer = make()
    run(optimizer, p, 4)
    saved, weights = optimizer.state_dict(), p.detach().clone()
    saved = {**saved, "slow": [slow.clone() for slow in saved["slow"]]}
    run(optimizer, p, 5)

    q, resumed = make()
    q.data.copy_(weights)
    resumed.load_state_dict(saved)
    run(resumed, q, 5)
    assert torch.equal(p, q)


def test_learning_rate_set_on_it_reaches_the_fast_steps():
    p = torch.nn.Parameter(torch.tensor([10.0]))
    optimizer = Lookahead(torch.optim.SGD([p], lr=1.0), k=100)
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    optimizer.param_groups[0]["lr"] = 0.5
    run(optimizer, p, 1)
    assert p.item() == 9.5


@pytest.mark.parametrize("options", [{"k": 0}, {"alpha": 0.0}, {"alpha": 1.5}])
def test_settings_without_sense_are_refused(options):
    with pytest.raises(ValueError, match="k is at least 1 and alpha in"):
        Lookahead(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), **options)
