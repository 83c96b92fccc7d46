"""Patches in scan order, some of them ahead of the encoder."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from s4mil_monai.features import patch_stream
from s4mil_monai.features.patch_stage import DALI_PAYS_FROM, resolve_patch_stage
from s4mil_monai.features.patch_stream import ahead, read_ahead, read_in_turns
from s4mil_monai.features.prepare import prepare_slide
from s4mil_monai.result import PatchSettings
from s4mil_monai.slides.reader import open_slide

BOTH = pytest.mark.parametrize("read", [read_ahead, read_in_turns])


@pytest.fixture
def prepared(tissue_slide):
    with open_slide(tissue_slide) as slide:
        yield prepare_slide(slide, PatchSettings())


@BOTH
def test_a_patch_that_cannot_be_decoded_is_white_and_marked(prepared, monkeypatch, read):
    real = prepared.slide.read_inside

    def damaged(x, y, width, height, level):
        if y == 512 and x <= 768 < x + width:
            raise RuntimeError("Huffman table corrupt")
        return real(x, y, width, height, level)

    monkeypatch.setattr(prepared.slide, "read_inside", damaged)
    batches = list(read(prepared, batch_size=5))
    sound = np.concatenate([batch.sound for batch in batches])
    regions = np.concatenate([batch.regions for batch in batches])
    assert np.flatnonzero(~sound).tolist() == [6]
    assert (regions[6] == 255).all()
    assert [batch.start for batch in batches] == [0, 5, 10]


def test_reading_ahead_and_in_turns_give_the_same_batches(prepared):
    for first, second in zip(
        read_ahead(prepared, batch_size=5), read_in_turns(prepared, batch_size=5), strict=True
    ):
        np.testing.assert_array_equal(first.regions, second.regions)
        assert first.start == second.start


@BOTH
def test_reader_stays_a_bounded_number_of_batches_ahead(prepared, read, monkeypatch):
    monkeypatch.setattr(patch_stream, "READERS", 2)  # with those of a large machine, all 12 would be in bounds
    monkeypatch.setattr(patch_stream, "BATCHES_AHEAD", 4)
    asked = []
    real = prepared.slide.read_region
    prepared.slide.read_region = lambda **where: asked.append(where) or real(**where)
    batches = read(prepared, batch_size=1)
    next(batches)
    batches.close()
    assert len(asked) <= 4 + 1


def test_items_made_ahead_come_in_order_and_a_bounded_number_early():
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    early = ahead(items(), depth=2)
    assert next(early) == 0
    assert next(early) == 1
    assert len(made) <= 2 + 2
    assert list(early) == list(range(2, 20))


def test_an_error_while_making_ahead_reaches_whoever_asks_and_no_thread_is_left():
    def items():
        yield 1
        raise ValueError("no more pixels")

    early = ahead(items())
    assert next(early) == 1
    with pytest.raises(ValueError, match="no more pixels"):
        next(early)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_dali_is_chosen_where_it_is_faster_and_installed(monkeypatch):
    pytest.importorskip("nvidia.dali")
    assert resolve_patch_stage("auto", patches=DALI_PAYS_FROM - 1, shrunk=True) == "torch"
    assert resolve_patch_stage("auto", patches=DALI_PAYS_FROM, shrunk=True) == "dali"
    assert resolve_patch_stage("auto", patches=10**6) == "torch"
    assert resolve_patch_stage("auto", torch.device("cuda")) == "dali"
    assert resolve_patch_stage("torch", patches=10**6, shrunk=True) == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_patch_stage("auto", patches=DALI_PAYS_FROM, shrunk=True) == "torch"
