"""Which bags train and which validate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from s4mil_monai.training.bags import Bag, as_items


@dataclass(frozen=True)
class Split:
    """Bags to train on, to choose the best epoch by, and, where there are any, to report on."""

    train: Sequence[Bag]
    validation: Sequence[Bag]
    test: Sequence[Bag] = ()

    @property
    def in_features(self) -> int:
        """Features of a patch."""
        return self.train[0].features.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 1 + max(bag.label for part in (self.train, self.validation, self.test) for bag in part)

    @property
    def train_items(self) -> Sequence[dict[str, Any]]:
        """Training bags for a MONAI dataset."""
        return as_items(self.train)

    @property
    def validation_items(self) -> Sequence[dict[str, Any]]:
        """Validation bags for a MONAI dataset."""
        return as_items(self.validation)


def split_bags(
    bags: Sequence[Bag], *, folds: int = 5, fold: int = 0, seed: int = 0, standardize: bool = False
) -> Split:
    """Take one of ``folds`` stratified, patient-grouped folds for validation and the rest for training.

    Args:
        bags: All bags.
        folds: How many folds.
        fold: Which one validates, counted from 0.
        seed: Of the shuffle.
        standardize: Give each feature mean 0 and deviation 1 over the training patches, for features made by
            hand; what an encoder gives needs none of it.

    Raises:
        ValueError: ``fold`` is not one of the folds, or a class has fewer patients than folds.
    """
    if not 0 <= fold < folds:
        raise ValueError(f"fold counts from 0 to {folds - 1}, got {fold}")
    labels = np.array([bag.label for bag in bags])
    patients = np.array([bag.patient for bag in bags])
    smallest = min(len(set(patients[labels == label])) for label in set(labels.tolist()))
    if smallest < folds:
        raise ValueError(f"{folds} folds need {folds} patients of each class; one class has {smallest}")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    train, validation = list(splitter.split(labels, labels, patients))[fold]
    split = Split([bags[i] for i in train], [bags[i] for i in validation])
    return standardize_split(split) if standardize else split


def standardize_split(split: Split) -> Split:
    """Give each feature mean 0 and deviation 1 over the training patches; constant features become 0."""
    patches = np.concatenate([bag.features for bag in split.train]).astype(np.float64)
    mean, deviation = patches.mean(0), patches.std(0)
    deviation[deviation == 0] = 1

    def scaled(bags: Sequence[Bag]) -> list[Bag]:
        loaded = (bag.loaded() for bag in bags)
        return [replace(bag, features=((bag.features - mean) / deviation).astype(np.float32)) for bag in loaded]

    return Split(scaled(split.train), scaled(split.validation), scaled(split.test))
