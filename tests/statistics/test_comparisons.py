"""Tests of one model against another: against SciPy, by hand, and by how often they cry wolf."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from s4mil_monai.errors import TableError, UnknownNameError
from s4mil_monai.statistics.comparisons import (
    TESTS_WITH_P_VALUE,
    adjust_benjamini_hochberg,
    adjust_holm,
    compare_aurocs,
    compare_with_reference,
    corrected_t_test,
    mcnemar_test,
    measure_folds,
    paired_t_test,
)
from s4mil_monai.statistics.predictions import check_predictions
from tests.statistics.examples import simulate

VALUES = np.array([0.81, 0.86, 0.79, 0.90, 0.84])
OTHERS = np.array([0.80, 0.82, 0.80, 0.85, 0.81])


def test_paired_t_test_agrees_with_scipy():
    found, wanted = paired_t_test(VALUES, OTHERS), scipy.stats.ttest_rel(VALUES, OTHERS)
    interval = wanted.confidence_interval()
    assert (found.statistic, found.p_value) == pytest.approx((wanted.statistic, wanted.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.n == 5


def test_corrected_t_test_by_hand():
    found = corrected_t_test(np.array([0.51, 0.52, 0.53]), np.full(3, 0.5), test_over_train=0.5)
    # differences .01 .02 .03: mean .02, s² 1e-4, variance 1e-4 (1/3 + 1/2), t = .02 / sqrt(8.33e-5) = 2.19089;
    # two-sided p of Student's law with 2 degrees of freedom is 1 - t / sqrt(2 + t²)
    assert found.statistic == pytest.approx(2.19089, rel=1e-5)
    assert found.p_value == pytest.approx(1 - 2.19089 / math.sqrt(2 + 4.8), rel=1e-4)


def test_fold_without_a_value_is_left_out_of_both():
    values, others = VALUES.copy(), OTHERS.copy()
    values[1] = np.nan
    assert paired_t_test(values, others) == paired_t_test(np.delete(VALUES, 1), np.delete(OTHERS, 1))


def test_equal_folds_show_no_difference_and_equally_better_ones_no_variance():
    same = paired_t_test(VALUES, VALUES)
    assert (same.p_value, same.note) == (1.0, "no difference anywhere")
    shifted = paired_t_test(np.array([0.5, 0.75]), np.array([0.25, 0.5]))
    assert math.isnan(shifted.p_value)
    assert shifted.note == "the variance is 0"
    assert paired_t_test(VALUES[:1], OTHERS[:1]).note == "1 folds with a value"


def test_corrected_t_test_keeps_its_level_where_the_plain_one_does_not():
    # Differences of overlapping folds correlate: a part of variance rho = n_test / (n_test + n_train) is shared.
    generator, rho = np.random.default_rng(0), 0.1
    cried = {"plain": 0, "corrected": 0}
    for _ in range(600):
        differences = math.sqrt(rho) * generator.normal() + math.sqrt(1 - rho) * generator.normal(size=10)
        cried["plain"] += paired_t_test(differences, np.zeros(10)).p_value < 0.05
        ratio = rho / (1 - rho)
        cried["corrected"] += corrected_t_test(differences, np.zeros(10), test_over_train=ratio).p_value < 0.05
    assert cried["plain"] > 60
    assert 17 <= cried["corrected"] <= 45


def test_delong_test_by_definition():
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2
    scores, others = generator.normal(labels), generator.normal(0.5 * labels)

    def pairs(of):
        return (of[labels == 1][:, None] > of[labels == 0][None, :]).astype(float)

    gain = pairs(scores) - pairs(others)
    variance = gain.mean(1).var(ddof=1) / 30 + gain.mean(0).var(ddof=1) / 30
    z = gain.mean() / math.sqrt(variance)
    found = compare_aurocs(labels, scores, others)
    assert found.difference == pytest.approx(gain.mean())
    assert found.p_value == pytest.approx(math.erfc(abs(z) / math.sqrt(2)))
    assert found.high - found.low == pytest.approx(2 * 1.959964 * math.sqrt(variance), rel=1e-5)


def test_delong_test_cries_wolf_in_5_of_100_equal_models():
    generator, labels, cried = np.random.default_rng(0), np.arange(100) % 2, 0
    for _ in range(600):
        shared = generator.normal(1.0 * labels)
        cried += compare_aurocs(labels, *(shared + generator.normal(size=(2, 100)))).p_value < 0.05
    # deviation of the share: 0.009
    assert cried / 600 == pytest.approx(0.05, abs=0.026)


def test_model_compared_with_itself_does_not_differ():
    labels, scores = np.arange(10) % 2, np.random.default_rng(0).random(10)
    assert compare_aurocs(labels, scores, scores).p_value == 1


def correctness(only: int, only_other: int, both: int = 10) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([True] * only + [False] * only_other + [True] * both),
        np.array([False] * only + [True] * only_other + [True] * both),
    )


def test_mcnemar_of_few_discordant_pairs_is_exact():
    # 2 (C(8, 0) + C(8, 1)) / 2^8
    found = mcnemar_test(*correctness(1, 7))
    assert found.p_value == pytest.approx(18 / 256)
    assert (found.n, found.note) == (8, "exact")
    assert found.difference == pytest.approx(-6 / 18)


def test_mcnemar_of_many_is_chi_square_with_continuity():
    # (|10 - 25| - 1)² / 35 = 5.6, and P(chi² of 1 > x) = erfc(sqrt(x / 2))
    found = mcnemar_test(*correctness(10, 25))
    assert (found.statistic, found.p_value) == pytest.approx((5.6, math.erfc(math.sqrt(2.8))))
    assert mcnemar_test(*correctness(20, 20)).p_value == 1


def test_mcnemar_without_discordant_pairs_is_1():
    assert mcnemar_test(*correctness(0, 0)).p_value == 1


def test_adjusted_p_values_by_hand():
    p_values = [0.01, 0.04, math.nan, 0.03, 0.005]
    # Holm: .005 * 4, .01 * 3, .03 * 2, then .04 * 1 is raised to .06
    np.testing.assert_allclose(adjust_holm(p_values), [0.03, 0.06, math.nan, 0.06, 0.02])
    # Benjamini-Hochberg: .005 * 4/1, .01 * 4/2, .03 * 4/3, .04
    np.testing.assert_allclose(adjust_benjamini_hochberg(p_values), [0.02, 0.04, math.nan, 0.04, 0.02])


def test_adjusted_p_values_stop_at_1_and_none_stay_none():
    np.testing.assert_array_equal(adjust_holm([0.9, 0.8]), [1, 1])
    assert math.isnan(adjust_holm([math.nan])[0])


def test_seeds_on_the_same_folds_count_once_a_fold():
    frame = simulate({"a": 1.0}, seeds=3)
    folds = measure_folds(frame, ["accuracy"])
    assert folds["fold"].tolist() == [0, 1, 2, 3, 4]
    assert set(folds["seed"]) == {-1}
    first = frame[frame["fold"] == 0]
    right = (first["p_1"] > 0.5) == (first["label"] == 1)
    assert folds["value"][0] == pytest.approx(right.groupby(first["seed"]).mean().mean())


def test_seeds_on_folds_of_their_own_all_count():
    frame = simulate({"a": 1.0}, seeds=2)
    redrawn = frame.assign(fold=(frame["fold"] + frame["seed"]) % 5)
    assert len(measure_folds(redrawn, ["accuracy"])) == 10


def test_every_model_is_compared_with_the_reference_by_every_test():
    frame = simulate({"good": 2.0, "fair": 1.0, "poor": 0.2}, slides=300, folds=10)
    found, tests = (
        compare_with_reference(frame, "good", test_over_train=1 / 8, resamples=400),
        ("bootstrap", *TESTS_WITH_P_VALUE),
    )
    assert found.groupby("model", sort=False)["test"].apply(tuple).to_dict() == dict.fromkeys(
        ("fair", "poor"), tests
    )
    assert (found["difference"] < 0).all()
    tested = found[found["test"] != "bootstrap"]
    assert (tested["p"] < 0.05).all()
    for _, part in tested.groupby("test"):
        np.testing.assert_allclose(part["p_holm"], adjust_holm(part["p"].tolist()))
        np.testing.assert_allclose(part["p_bh"], adjust_benjamini_hochberg(part["p"].tolist()))
    intervals = found[found["test"].isin(["bootstrap", "delong"])].pivot(index="model", columns="test")
    np.testing.assert_allclose(intervals["low", "bootstrap"], intervals["low", "delong"], atol=0.01)


def test_copies_of_a_patients_slide_narrow_no_interval_of_a_difference():
    models = {"a": 1.0, "b": 0.5}
    once, copied = (
        compare_with_reference(simulate(models, slides=slides, per_patient=each), "a", resamples=300)
        for slides, each in ((60, 1), (180, 3))
    )
    assert copied["n"][0] == 180
    for test in ("bootstrap", "delong"):
        wanted, found = (rows.set_index("test").loc[test] for rows in (once, copied))
        assert wanted["high"] - wanted["low"] > 0.1
        assert (found["low"], found["high"]) == pytest.approx((wanted["low"], wanted["high"]))


def test_corrected_t_test_widens_the_plain_one_by_the_ratio_it_is_given():
    frame = simulate({"a": 1.0, "b": 0.5}, folds=5)
    found = compare_with_reference(frame, "a", metric="accuracy", test_over_train=1 / 3, resamples=50)
    found = found.set_index("test")
    right = frame.assign(right=(frame["p_1"] > 0.5) == (frame["label"] == 1))
    by_fold = right.pivot_table(index="fold", columns="model", values="right", aggfunc="mean")
    plain = scipy.stats.ttest_rel(by_fold["b"], by_fold["a"])
    # 5 folds, 3/5 of the slides train and 1/5 test: s² (1/5 + 1/3) for s² / 5
    wider = math.sqrt((1 / 5 + 1 / 3) / (1 / 5))
    assert found.loc["corrected_t", "statistic"] == pytest.approx(plain.statistic / wider)
    assert found.loc["corrected_t", "p"] == pytest.approx(2 * scipy.stats.t(4).sf(abs(plain.statistic) / wider))
    half = (plain.confidence_interval().high - plain.confidence_interval().low) / 2 * wider
    assert found.loc["corrected_t", "high"] - found.loc["corrected_t", "low"] == pytest.approx(2 * half)


def test_corrected_t_test_is_left_out_where_the_ratio_is_not_known():
    found = compare_with_reference(simulate({"a": 1.0, "b": 0.5}), "a", resamples=50).set_index("test")
    assert math.isnan(found.loc["corrected_t", "p"])
    assert found.loc["corrected_t", "note"] == "no corrected_t: slides tested over slides trained on is not given"
    assert found.loc["paired_t", "p"] < 1


def test_folds_on_one_official_test_set_need_the_ratio_to_be_given():
    parts = [simulate({"a": 1.0, "b": 0.5}, seeds=1 + fold).query("seed == @fold") for fold in range(3)]
    official = check_predictions(pd.concat([part.assign(seed=0, fold=n) for n, part in enumerate(parts)]))
    found = compare_with_reference(official, "a", resamples=50).set_index("test")
    assert math.isnan(found.loc["corrected_t", "p"])
    assert found.loc["corrected_t", "note"] == "no corrected_t: folds share test slides"
    given = compare_with_reference(official, "a", test_over_train=0.5, resamples=50).set_index("test")
    assert given.loc["corrected_t", "p"] > given.loc["paired_t", "p"]


def test_three_classes_are_compared_without_delong():
    frame = simulate({"a": 1.5, "b": 0.5}, classes=3)
    found = compare_with_reference(frame, "a", test_over_train=1 / 3, resamples=50).set_index("test")
    assert found.loc["delong", "note"] == "for two classes only"
    assert found.loc["corrected_t", "p"] < 0.05


def test_models_of_other_slides_or_seeds_are_refused():
    frame = simulate({"a": 1.0, "b": 1.0}, seeds=2)
    fewer = frame[(frame["model"] == "a") | (frame["slide"] != "s0003")]
    with pytest.raises(TableError, match="b and a are not of the same slides: s0003"):
        compare_with_reference(fewer, "a")
    once = frame[(frame["model"] == "a") | (frame["seed"] == 0)]
    with pytest.raises(TableError, match="b and a do not have the same seeds and folds"):
        compare_with_reference(once, "a")
    with pytest.raises(UnknownNameError, match="unknown model 'c'"):
        compare_with_reference(frame, "c")
