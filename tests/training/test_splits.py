"""Folds that keep patients together, and nothing of validation in training."""

from __future__ import annotations

import numpy as np
import pytest

from s4mil_monai.training.bags import LabelledBag
from s4mil_monai.training.splits import Split, split_bags, standardize_split


def bags(count: int = 40, per_patient: int = 2) -> list[LabelledBag]:
    generator = np.random.default_rng(0)
    made = []
    for i in range(count):
        patient = i // per_patient
        made.append(LabelledBag(f"s{i}", generator.random((4, 2), np.float32), patient % 2, f"p{patient}"))
    return made


def test_no_patient_is_on_both_sides():
    for fold in range(5):
        split = split_bags(bags(), folds=5, fold=fold)
        assert not {bag.patient for bag in split.train} & {bag.patient for bag in split.validation}


def test_every_slide_validates_once():
    validated = [bag.slide for fold in range(5) for bag in split_bags(bags(), folds=5, fold=fold).validation]
    assert sorted(validated) == sorted(bag.slide for bag in bags())


def test_folds_keep_the_classes_balanced():
    for fold in range(5):
        assert sum(bag.label for bag in split_bags(bags(), folds=5, fold=fold).validation) == 4


def test_seed_decides_the_folds():
    def validated(seed):
        return [bag.slide for bag in split_bags(bags(), seed=seed).validation]

    assert validated(0) == validated(0)
    assert validated(0) != validated(1)


def test_standardizing_uses_training_patches_only_and_leaves_constant_features_zero():
    def bag(*rows):
        return LabelledBag("s", np.array(rows, np.float32), 0, "p")

    split = standardize_split(Split([bag([0, 7], [4, 7])], [bag([10, 7])]))
    np.testing.assert_allclose(split.train[0].features, [[-1, 0], [1, 0]])
    np.testing.assert_allclose(split.validation[0].features, [[4, 0]])  # (10 - 2) / 2


def test_fold_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="fold counts from 0 to 4, got 5"):
        split_bags(bags(), fold=5)


def test_more_folds_than_patients_of_a_class_are_refused():
    with pytest.raises(ValueError, match="11 folds need 11 patients of each class; one class has 10"):
        split_bags(bags(), folds=11)
