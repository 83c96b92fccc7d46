"""What the score would be without some patches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from s4mil_monai.ablation import PatchChoiceError, patches_in_region, read_scored, score_without, top_patches
from s4mil_monai.errors import FeatureFileError, MisfitError, OutputError
from s4mil_monai.features.store import load_bag, save_bag
from s4mil_monai.models.bundle import load_bundle
from s4mil_monai.scoring import load_scorer, score_to_folder
from s4mil_monai.streaming.torch_runtime import TorchRuntime


@pytest.fixture(scope="module")
def loaded(bundle):
    return load_bundle(bundle)


@pytest.fixture(scope="module")
def folder(tissue_slide, bundle, tmp_path_factory):
    return score_to_folder(tissue_slide, load_scorer(bundle), tmp_path_factory.mktemp("out"))[1]


@pytest.fixture(scope="module")
def scored(folder, loaded):
    return read_scored(folder, loaded)


def test_score_without_patches_is_that_of_the_bag_of_the_others(scored, loaded):
    found = score_without(scored, TorchRuntime(loaded.model), [0, 5, 5], name="tissue")
    others = torch.from_numpy(np.delete(scored.bag.features, [0, 5], axis=0))
    with torch.inference_mode():
        wanted = loaded.model(others.unsqueeze(0)).logits[0].softmax(0)
    np.testing.assert_allclose(found.after, wanted.tolist(), atol=1e-5)
    np.testing.assert_allclose(found.before, scored.result.probabilities, atol=1e-5)
    assert (found.left_out, found.patches) == (2, 12)
    assert found.after != found.before


def test_region_takes_the_patches_that_overlap_it(scored):
    # patches of 256 px from (256, 256): this rectangle touches the first two of the first row alone
    assert patches_in_region(scored, left=300, top=0, width=300, height=257) == [0, 1]
    assert patches_in_region(scored, left=0, top=0, width=256, height=2000) == []


def test_top_patches_are_those_with_the_largest_shares(scored):
    best = scored.result.classes.index(scored.result.predicted)
    shares = {patch.index: patch.contributions[best] for patch in scored.result.deciding_patches}
    assert top_patches(scored, 2) == sorted(shares, key=shares.__getitem__, reverse=True)[:2]


@pytest.mark.parametrize(
    ("patches", "message"), [([-1], "not -1"), ([12], "0 to 11, not 12"), (range(12), "all 12")]
)
def test_patches_that_cannot_be_left_out_are_refused(scored, loaded, patches, message):
    with pytest.raises(PatchChoiceError, match=message):
        score_without(scored, TorchRuntime(loaded.model), list(patches), name="tissue")


def test_result_of_another_model_is_refused(folder):
    other = load_bundle(Path(__file__).resolve().parents[1] / "bundles" / "s4mil_slide")
    with pytest.raises(
        MisfitError, match=r"was scored with another model; .*: found tiny 1\.0, wanted s4mil_slide"
    ):
        read_scored(folder, other)


def test_features_of_other_patches_than_the_results_are_refused(folder, loaded, tmp_path):
    bag = load_bag(folder / "features.h5")
    (tmp_path / "result.json").write_bytes((folder / "result.json").read_bytes())
    save_bag(tmp_path / "features.h5", replace(bag, features=bag.features[1:], top_left_px0=bag.top_left_px0[1:]))
    with pytest.raises(FeatureFileError, match="holds other patches than result"):
        read_scored(tmp_path, loaded)


def test_result_without_a_score_is_refused(white_slide, bundle, loaded, tmp_path):
    empty = score_to_folder(white_slide, load_scorer(bundle), tmp_path)[1]
    with pytest.raises(OutputError, match="holds a result without a score"):
        read_scored(empty, loaded)
