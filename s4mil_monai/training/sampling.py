"""Classes of unequal size: weights in the loss, or bags drawn in equal shares."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import cast

import numpy as np
from monai.data.samplers import DistributedSampler, DistributedWeightedRandomSampler
from torch.utils.data import Dataset

from s4mil_monai.training.bags import Bag


def weigh_classes(bags: Sequence[Bag], *, classes: int) -> list[float]:
    """Weight of each class, ``n / (C n_c)``: every class weighs the same in all, and a bag 1 on average.

    Raises:
        ValueError: A class has no bag.
    """
    counts = np.bincount([bag.label for bag in bags], minlength=classes)
    if not counts.all():
        raise ValueError(f"class {int(counts.argmin())} has no bag to train on; weights need one of each")
    return (len(bags) / (classes * counts)).tolist()


def build_sampler(
    dataset: Dataset,
    bags: Sequence[Bag],
    *,
    balanced: bool = False,
    seed: int = 0,
    replicas: int = 1,
    rank: int = 0,
) -> DistributedSampler:
    """The order of the training bags in each epoch, one share of it for each process.

    With one process too it is the distributed sampler: its order depends on the seed and the epoch alone, so two
    processes that read a bag each see the bags that one process sees two by two.

    Args:
        dataset: Of the same bags.
        bags: Training bags.
        balanced: Draw with replacement, every class equally often; else each bag once an epoch.
        seed: Of the order.
        replicas: Number of processes.
        rank: Which of them this is.
    """
    assert len(cast(Sized, dataset)) == len(bags)
    if not balanced:
        return DistributedSampler(dataset, num_replicas=replicas, rank=rank, seed=seed)
    counts = np.bincount([bag.label for bag in bags])
    weights = [1 / counts[bag.label] for bag in bags]
    return DistributedWeightedRandomSampler(dataset, weights, num_replicas=replicas, rank=rank, seed=seed)
