"""The step: exactly the whole model, whatever the length and however it is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mil_monai.errors import UnknownNameError
from s4mil_monai.models.s4d import BLOCK
from s4mil_monai.streaming.chunk_step import ChunkStep, first_maximum
from s4mil_monai.streaming.stream import SlideStream
from s4mil_monai.streaming.torch_runtime import TorchRuntime
from tests.streaming.conftest import D, make_model

CHUNK = 256


def stream(model, features, *, chunk=CHUNK, pieces=None, **options):
    """The output of a model, streamed in pieces of given lengths."""
    slide = SlideStream(TorchRuntime(model, chunk=chunk, **options))
    for piece in features.split(pieces or len(features)):
        slide.add(piece)
    return slide.finish()


def assert_same(found, wanted):
    for name in ("logits", "patch_logits", "pooled"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-5, rtol=1e-5)
    # a maximum that two patches share up to rounding may be given to either
    values = wanted.winners != found.winners
    assert values.float().mean() < 0.01


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 100_000])
@pytest.mark.parametrize("layers, patch_classes", [(1, None), (2, 3), (3, None)])
def test_streamed_slide_has_the_output_of_the_whole_model(length, layers, patch_classes):
    model = make_model(layers=layers, patch_classes=patch_classes)
    features = torch.randn(length, D, generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        wanted = model(features.unsqueeze(0))
    assert_same(stream(model, features), wanted)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_cut_and_no_state_dimension_changes_the_output(data):
    model = make_model(
        layers=data.draw(st.integers(1, 3)),
        state_dim=2 * data.draw(st.integers(1, 20)),
        patch_classes=data.draw(st.sampled_from([None, 2, 5])),
    )
    length = data.draw(st.integers(1, 1500))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=8)))
    pieces = [after - before for before, after in zip([0, *cuts], [*cuts, length], strict=True)]
    features = torch.randn(length, D, generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        wanted = model(features.unsqueeze(0))
    chunk = BLOCK * data.draw(st.integers(1, 6))
    assert_same(stream(model, features, chunk=chunk, pieces=pieces), wanted)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_both_discretizations_are_streamed(discretization):
    torch.manual_seed(0)
    model = make_model()
    model.blocks[0][1].discretization = discretization
    features = torch.randn(700, D)
    with torch.inference_mode():
        assert_same(stream(model, features), model(features.unsqueeze(0)))


@pytest.mark.parametrize("precision, bound", [("float16", 5e-3), ("bfloat16", 5e-2)])
def test_half_precision_stays_near_and_keeps_its_state_in_float32(precision, bound):
    model = make_model(layers=2)
    features = torch.randn(3000, D)
    with torch.inference_mode():
        wanted = model(features.unsqueeze(0)).logits
    found = stream(model, features, precision=precision).logits
    assert 0 < (found - wanted).abs().max() < bound * max(1.0, float(wanted.abs().max()))
    step = ChunkStep(model, precision=precision)
    output = step(*step.first_state(), torch.randn(64, D), torch.ones(64, dtype=torch.bool))
    assert {tensor.dtype for tensor in output.state} == {torch.float32, torch.int32}


def test_state_has_the_same_size_after_any_number_of_patches():
    step = ChunkStep(make_model(layers=2))
    before = step.first_state()
    output = step(*before, torch.randn(640, D), torch.ones(640, dtype=torch.bool))
    assert [tensor.shape for tensor in output.state] == [tensor.shape for tensor in before]
    assert output.state.start.tolist() == [640]


@given(data=st.data())
def test_first_maximum_is_that_of_the_valid_rows_and_the_first_that_has_it(data):
    blocks, width = data.draw(st.integers(1, 4)), 5
    count = data.draw(st.integers(1, blocks * BLOCK))
    seed = data.draw(st.integers(0, 100))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 3, (blocks * BLOCK, width), generator=generator).float()  # with many ties
    found, place = first_maximum(values, torch.tensor([count], dtype=torch.int32))
    valid = values[:count].numpy()
    assert found.tolist() == valid.max(0).tolist()
    assert place.tolist() == valid.argmax(0).tolist()  # NumPy gives the first


def test_precision_that_does_not_exist_is_refused():
    with pytest.raises(UnknownNameError, match="unknown precision 'int8'; known: float32, bfloat16, float16"):
        ChunkStep(make_model(), precision="int8")


@pytest.mark.parametrize("chunk", [0, 63, 100])
def test_chunk_that_is_no_multiple_of_a_block_is_refused(chunk):
    with pytest.raises(ValueError, match="a multiple of 64 patches"):
        TorchRuntime(make_model(), chunk=chunk)
