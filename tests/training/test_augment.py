"""Bags change, labels stay with their patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from s4mil_monai.training.augment import FillPatchLabels, RandPatchDropoutd


def item(patches: int) -> dict:
    """Features and patch labels are the patch's number."""
    numbers = torch.arange(patches)
    return {"image": numbers.float().repeat(3, 1), "patch_label": numbers, "slide": "a"}


def drop(share: float, seed: int = 0) -> RandPatchDropoutd:
    return RandPatchDropoutd(["image", "patch_label"], share=share).set_random_state(seed)


def test_patches_left_out_are_the_same_in_features_and_labels_and_the_order_stays():
    found = drop(0.3)(item(1000))
    numbers = found["image"][0]
    assert torch.equal(numbers, found["image"][2])
    assert torch.equal(numbers.long(), found["patch_label"])
    assert (numbers.diff() > 0).all()
    assert len(numbers) == pytest.approx(700, abs=44)  # three deviations of 1000 draws
    assert found["slide"] == "a"


def test_share_of_zero_changes_nothing_and_the_bag_itself_is_never_changed():
    bag = item(10)
    assert drop(0)(bag)["image"] is bag["image"]
    drop(0.5)(bag)
    assert bag["image"].shape == (3, 10)


@pytest.mark.parametrize("seed", range(5))
def test_one_patch_always_stays(seed):
    assert drop(0.999, seed)(item(3))["image"].shape[1] == 1


def test_bags_without_patch_labels_pass():
    bag = item(10)
    del bag["patch_label"]
    assert "patch_label" not in drop(0.5)(bag)


def test_each_call_draws_anew_and_the_seed_repeats_it():
    transform = drop(0.5, seed=7)
    first, second = (transform(item(100))["patch_label"].tolist() for _ in "ab")
    assert first != second
    assert drop(0.5, seed=7)(item(100))["patch_label"].tolist() == first


@pytest.mark.parametrize("share", [-0.1, 1.0, np.nan])
def test_share_without_sense_is_refused(share):
    with pytest.raises(ValueError, match=r"is in \[0, 1\)"):
        drop(share)


def test_missing_patch_labels_are_unknown_and_known_ones_stay():
    bag = item(4)
    assert FillPatchLabels()(bag)["patch_label"].tolist() == [0, 1, 2, 3]
    del bag["patch_label"]
    assert FillPatchLabels()(bag)["patch_label"].tolist() == [-1, -1, -1, -1]
