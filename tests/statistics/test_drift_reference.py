"""The reference of a bundle: bins, file, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4mil_monai.errors import BundleError, OutputError, TooFewSlidesError
from s4mil_monai.measures import MEASURES
from s4mil_monai.statistics.drift_reference import (
    DRIFT_REFERENCE_FILE,
    MOST_KEPT,
    DriftReference,
    build_reference,
    count_by_bin,
    cut_into_bins,
    find_reference,
    read_reference,
    write_reference,
)
from tests.statistics.slides_made_up import MODEL, draw_slides


@pytest.fixture(scope="module")
def reference() -> DriftReference:
    return build_reference(draw_slides(100, np.random.default_rng(0)), model_sha256=MODEL, provenance="made up")


def test_bins_of_distinct_values_hold_equally_many():
    values = np.random.default_rng(0).permutation(np.arange(100.0))
    edges = cut_into_bins(values, 10)
    np.testing.assert_array_equal(edges, np.arange(9, 99, 10))  # the 10th, 20th, ... value ends a bin
    np.testing.assert_array_equal(count_by_bin(values, edges), np.full(10, 10))


def test_value_that_many_share_has_a_bin_of_its_own_and_what_falls_below_is_seen():
    edges = cut_into_bins(np.full(50, 0.3), 5)
    np.testing.assert_array_equal(count_by_bin(np.array([0.2, 0.3, 0.3, 0.4]), edges), [1, 2, 1])


@given(st.lists(st.floats(-1e6, 1e6), min_size=30, max_size=300), st.integers(3, 10))
def test_every_value_lies_in_exactly_one_bin(values, bins):
    values = np.array(values)
    edges = cut_into_bins(values, bins)
    assert (np.diff(edges) > 0).all()
    bins = pairwise([-np.inf, *edges, np.inf])
    by_hand = [((values > low) & (values <= high)).sum() for low, high in bins]
    assert count_by_bin(values, edges).tolist() == by_hand
    assert sum(by_hand) == len(values)


def test_reference_has_every_measure_with_ten_slides_a_bin(reference):
    assert tuple(reference.measures) == MEASURES
    assert {measure.counts for measure in reference.measures.values()} == {(10,) * 10}
    assert reference.slides == 100


def test_fewer_slides_make_fewer_bins():
    small = build_reference(draw_slides(35, np.random.default_rng(0)), model_sha256=MODEL)
    assert {len(measure.counts) for measure in small.measures.values()} == {3}


def test_many_slides_leave_a_bounded_sample_with_both_ends():
    slides = draw_slides(1200, np.random.default_rng(0))
    scores = sorted(slide.score for slide in slides)
    kept = build_reference(slides, model_sha256=MODEL).measures["score"]
    assert len(kept.sample) == MOST_KEPT
    assert kept.slides == 1200
    assert (kept.sample[0], kept.sample[-1]) == (scores[0], scores[-1])
    assert np.median(kept.sample) == pytest.approx(np.median(scores), abs=1e-3)


def test_values_of_a_slide_are_not_tied_together(reference):
    for measure in reference.measures.values():
        assert list(measure.sample) == sorted(measure.sample)


def test_measure_that_too_few_slides_have_is_left_out():
    slides = draw_slides(40, np.random.default_rng(0))
    without = [slide.model_copy(update={"glass_brightness": None}) for slide in slides[:11]]
    found = build_reference([*without, *slides[11:]], model_sha256=MODEL)
    assert set(MEASURES) - set(found.measures) == {"glass_brightness"}


def test_too_few_slides_make_no_reference():
    slides = draw_slides(29, np.random.default_rng(0))
    with pytest.raises(TooFewSlidesError, match="needs 30 scored slides, found 29"):
        build_reference(slides, model_sha256=MODEL)


def test_reference_comes_back_from_its_file_bit_by_bit(reference, tmp_path):
    write_reference(reference, tmp_path / DRIFT_REFERENCE_FILE)
    assert find_reference(tmp_path, model_sha256=MODEL) == reference


def test_constant_measure_comes_back_from_its_file(tmp_path):
    slides = [slide.model_copy(update={"score": 0.0}) for slide in draw_slides(40, np.random.default_rng(0))]
    constant = build_reference(slides, model_sha256=MODEL)
    write_reference(constant, tmp_path / "r.json")
    assert read_reference(tmp_path / "r.json", model_sha256=MODEL) == constant


def test_bundle_without_a_reference_has_none(tmp_path):
    assert find_reference(tmp_path, model_sha256=MODEL) is None


def test_reference_of_another_model_is_refused_by_name(reference, tmp_path):
    write_reference(reference, tmp_path / DRIFT_REFERENCE_FILE)
    with pytest.raises(
        BundleError, match=r"drift_reference\.json: is of another model .*abababababab.*cdcdcdcdcdcd"
    ):
        find_reference(tmp_path, model_sha256="cd" * 32)


def drop_an_edge(facts: dict) -> None:
    del facts["measures"]["score"]["edges"][0]


def count_below_nothing(facts: dict) -> None:
    facts["measures"]["score"]["counts"][0] = -1


def swap_the_sample(facts: dict) -> None:
    facts["measures"]["score"]["sample"].reverse()


def name_an_unknown_measure(facts: dict) -> None:
    facts["measures"]["mood"] = facts["measures"]["score"]


def be_of_a_later_format(facts: dict) -> None:
    facts["format"] = "s4mil.drift_reference/2"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (drop_an_edge, "measures.score: 8 edges make 9 bins, got 10"),
        (count_below_nothing, "measures.score: counts are of all slides"),
        (swap_the_sample, "measures.score: edges and sample are ascending"),
        (name_an_unknown_measure, "measures: unknown measure mood"),
        (be_of_a_later_format, "format: Input should be 's4mil.drift_reference/1'"),
    ],
)
def test_wrong_reference_is_one_line_that_says_what_is_wrong(reference, tmp_path, damage, text):
    facts = json.loads(reference.to_json())
    damage(facts)
    (tmp_path / "r.json").write_text(json.dumps(facts), encoding="utf-8")
    assert_refused(tmp_path / "r.json", text)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b'{"format": null}', b"NaN"])
def test_file_that_is_no_reference_is_one_line(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    assert_refused(tmp_path / "r.json", "is not a drift reference of format s4mil.drift_reference/1")


def test_missing_file_is_one_line(tmp_path):
    assert_refused(tmp_path / "r.json", "cannot be read (No such file or directory)")


def assert_refused(path, text: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_reference(path, model_sha256=MODEL)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_place_that_cannot_be_written_is_one_line(reference, tmp_path):
    (tmp_path / "configs").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"):
        write_reference(reference, tmp_path / DRIFT_REFERENCE_FILE)
