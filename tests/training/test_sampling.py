"""Weights and shares of classes of unequal size."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.data import Dataset

from s4mil_monai.training.bags import LabelledBag
from s4mil_monai.training.sampling import build_sampler, weigh_classes


def bags(*labels: int) -> list[LabelledBag]:
    return [LabelledBag(f"s{i}", np.zeros((1, 1), np.float32), label, f"s{i}") for i, label in enumerate(labels)]


class Numbers(Dataset):
    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def drawn(sampler, epochs: int) -> list[list[int]]:
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def test_every_class_weighs_the_same_and_a_bag_one_on_average():
    assert weigh_classes(bags(0, 0, 0, 1), classes=2) == pytest.approx([4 / 6, 2.0])  # 3 x 4/6 = 1 x 2 = 4 / 2


def test_class_without_a_bag_is_refused():
    with pytest.raises(ValueError, match="class 1 has no bag to train on"):
        weigh_classes(bags(0, 2), classes=3)


def test_each_bag_is_read_once_an_epoch_in_an_order_of_the_epoch_and_the_seed():
    labels = bags(*[0] * 10)
    first, second = drawn(build_sampler(Numbers(10), labels, seed=3), 2)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert drawn(build_sampler(Numbers(10), labels, seed=3), 2) == [first, second]
    assert drawn(build_sampler(Numbers(10), labels, seed=4), 1) != [first]


def test_two_processes_read_bag_by_bag_what_one_reads_two_by_two():
    labels = bags(*[0] * 10)
    (alone,) = drawn(build_sampler(Numbers(10), labels), 1)
    (left,), (right,) = (drawn(build_sampler(Numbers(10), labels, replicas=2, rank=rank), 1) for rank in (0, 1))
    assert [bag for pair in zip(left, right, strict=True) for bag in pair] == alone


def test_balanced_sampling_draws_the_rare_class_as_often_as_the_other():
    labels = bags(*[0] * 90, *[1] * 10)
    epochs = drawn(build_sampler(Numbers(100), labels, balanced=True), 20)
    share = np.mean([labels[i].label for epoch in epochs for i in epoch])
    assert share == pytest.approx(0.5, abs=0.034)  # 2000 draws: three deviations
