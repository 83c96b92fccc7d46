"""The stream: what callers may do with it, what they are told, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from s4mil_monai.errors import ChunkWidthError, EmptyStreamError, NotFiniteError, OverflowedError, StreamEndedError
from s4mil_monai.streaming.stream import SlideStream
from s4mil_monai.streaming.torch_runtime import TorchRuntime
from tests.streaming.conftest import D, make_model

CHUNK = 128


@pytest.fixture(scope="module")
def model():
    return make_model(layers=2)


@pytest.fixture
def runtime(model):
    return TorchRuntime(model, chunk=CHUNK)


def test_score_so_far_is_that_of_a_slide_that_ends_there(model, runtime):
    features = torch.randn(400, D)
    stream = SlideStream(runtime)
    stream.add(features[:100])
    assert stream.so_far() is None  # no chunk is full
    stream.add(features[100:300])
    now = stream.so_far()
    assert now.patches == 256
    with torch.inference_mode():
        wanted = model(features[:256].unsqueeze(0)).logits[0].softmax(0)
    torch.testing.assert_close(torch.tensor(now.probabilities), wanted, atol=1e-5, rtol=1e-5)


def test_shares_of_the_winning_patches_add_up_to_the_streamed_logits(model, runtime):
    stream = SlideStream(runtime)
    for _ in range(10):
        stream.add(torch.randn(77, D))
    output = stream.finish()
    apart = model.take_apart(output)
    torch.testing.assert_close(
        (apart.contributions.sum(0) + apart.bias).float(), output.logits[0], atol=1e-5, rtol=1e-5
    )
    assert int(apart.patches.max()) < 770


def test_slides_read_in_turns_by_one_runtime_do_not_disturb_each_other(model, runtime):
    bags = [torch.randn(500, D), torch.randn(333, D)]
    streams = [SlideStream(runtime) for _ in bags]
    for start in range(0, 500, 90):
        for stream, bag in zip(streams, bags, strict=True):
            stream.add(bag[start : start + 90])
    with torch.inference_mode():
        for stream, bag in zip(streams, bags, strict=True):
            wanted = model(bag.unsqueeze(0)).logits
            torch.testing.assert_close(stream.finish().logits, wanted, atol=1e-5, rtol=1e-5)


def test_features_of_another_width_are_refused(runtime):
    with pytest.raises(ChunkWidthError, match=rf"wanted features \(n, {D}\), got \(5, 7\)"):
        SlideStream(runtime).add(torch.randn(5, 7))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_with_their_place_and_change_nothing(model, runtime, bad):
    good = torch.randn(200, D)
    spoiled = torch.randn(50, D)
    spoiled[7, 3] = bad
    stream = SlideStream(runtime)
    stream.add(good)
    with pytest.raises(NotFiniteError, match="the features of patch 207 are not finite") as caught:
        stream.add(spoiled)
    assert caught.value.first == 207
    with torch.inference_mode():
        wanted = model(good.unsqueeze(0)).logits
    torch.testing.assert_close(stream.finish().logits, wanted, atol=1e-5, rtol=1e-5)


def test_score_that_overflows_is_refused_instead_of_being_no_number(model):
    stream = SlideStream(TorchRuntime(model, chunk=CHUNK, precision="float16"))
    stream.add(torch.full((3, D), 7e4))
    with pytest.raises(OverflowedError, match="the score is not a number: features too large for float16"):
        stream.finish()


def test_runtime_that_has_run_is_copied_and_pickled_with_its_numbers(runtime):
    features = torch.randn(100, D)
    copies = [runtime, copy.deepcopy(runtime.step), pickle.loads(pickle.dumps(runtime.step))]
    valid = torch.ones(64, dtype=torch.bool)
    found = [step(*step.first_state(), features[:64], valid).logits for step in (runtime.step, *copies[1:])]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_autocast_around_a_stream_changes_nothing(model, runtime):
    features = torch.randn(100, D)
    streams = [SlideStream(runtime), SlideStream(runtime)]
    streams[0].add(features)
    with torch.autocast("cpu", torch.bfloat16):
        streams[1].add(features)
        found = streams[1].finish().logits
    assert torch.equal(found, streams[0].finish().logits)


def test_finite_features_whose_sum_overflows_are_taken(model):
    features = torch.zeros(30, D)
    features[:, 0] = 3e37  # 30 of them are more than float32 holds
    model = copy.deepcopy(model)
    model.project.weight[:, 0] = 0
    stream = SlideStream(TorchRuntime(model, chunk=CHUNK))
    stream.add(features)
    assert torch.isfinite(stream.finish().logits).all()


def test_stream_takes_nothing_after_its_end(runtime):
    stream = SlideStream(runtime)
    stream.add(torch.randn(5, D))
    stream.finish()
    with pytest.raises(StreamEndedError, match="the stream ended after 5 patches"):
        stream.add(torch.randn(5, D))
    with pytest.raises(StreamEndedError):
        stream.finish()


def test_stream_without_patches_has_no_score(runtime):
    stream = SlideStream(runtime)
    stream.add(torch.randn(0, D))
    with pytest.raises(EmptyStreamError, match="before its first patch"):
        stream.finish()
