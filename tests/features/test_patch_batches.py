"""Two forms of the patch batches, one contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from s4mil_monai.errors import UnknownNameError
from s4mil_monai.features.patch_batches import resampling_weights
from s4mil_monai.features.patch_stage import choose_patch_batches

NORMALISE = {"mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}


@pytest.fixture(params=["torch", "dali"])
def form(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return choose_patch_batches(request.param)


def regions(side: int, sizes=(4, 4, 2)) -> list[np.ndarray]:
    generator = np.random.default_rng(side)
    return [generator.integers(0, 256, (n, side, side, 3), dtype=np.uint8) for n in sizes]


def reference(batch: np.ndarray, side: int) -> torch.Tensor:
    """The rule written out in float64, one patch and channel at a time."""
    weights = resampling_weights(batch.shape[1], side).double().numpy()
    out = np.empty((len(batch), 3, side, side))
    for n in range(len(batch)):
        for c in range(3):
            resampled = weights @ batch[n, :, :, c].astype(float) @ weights.T
            out[n, c] = (resampled / 255 - NORMALISE["mean"][c]) / NORMALISE["deviation"][c]
    return torch.from_numpy(out).float()


@pytest.mark.parametrize("side", [64, 55, 109, 128, 65])
def test_form_gives_the_numbers_of_the_rule_borders_included(form, side):
    batches = regions(side)
    given = list(form(iter(batches), patch_side_px=64, batch_size=4, **NORMALISE))
    assert [tuple(batch.shape) for batch in given] == [(4, 3, 64, 64), (4, 3, 64, 64), (2, 3, 64, 64)]
    for ours, batch in zip(given, batches, strict=True):
        assert ours.dtype == torch.float32
        # a difference of 1/255 of the range is 1 / 255 / 0.225 after normalisation; ask for a hundredth of it
        assert (ours - reference(batch, 64)).abs().max() < 0.01 / 255 / 0.225


def test_no_regions_give_no_batches(form):
    assert list(form(iter([]), patch_side_px=64, batch_size=4, **NORMALISE)) == []


def test_batches_already_given_are_not_overwritten_by_later_ones(form):
    batches = regions(64)
    first = next(iter(form(iter(batches), patch_side_px=64, batch_size=4, **NORMALISE)))
    alone = first.clone()
    list(form(iter(batches[1:]), patch_side_px=64, batch_size=4, **NORMALISE))
    assert torch.equal(first, alone)


def test_weights_away_from_borders_are_those_of_pillow():
    line = np.random.default_rng(0).random(437).astype(np.float32)
    ours = resampling_weights(437, 256).numpy() @ line
    theirs = np.asarray(Image.fromarray(line[None]).resize((256, 1), Image.Resampling.BILINEAR))[0]
    np.testing.assert_allclose(ours[2:-2], theirs[2:-2], atol=1e-5)


def test_weights_of_each_pixel_add_up_to_one():
    for side in (100, 256, 300, 513):
        torch.testing.assert_close(resampling_weights(side, 256).sum(1), torch.ones(256))


def test_unknown_form_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="known: torch, dali"):
        choose_patch_batches("opencv")


@pytest.mark.gpu
@pytest.mark.parametrize("side", [64, 55, 109])
def test_dali_on_the_gpu_gives_the_numbers_of_the_rule(side):
    pytest.importorskip("nvidia.dali")
    form = choose_patch_batches("dali", torch.device("cuda"))
    batches = regions(side)
    given = list(form(iter(batches), patch_side_px=64, batch_size=4, **NORMALISE))
    for ours, batch in zip(given, batches, strict=True):
        assert (ours.cpu() - reference(batch, 64)).abs().max() < 0.01 / 255 / 0.225
