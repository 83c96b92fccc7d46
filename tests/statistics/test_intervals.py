"""Bootstrap and DeLong against SciPy, by definition, and by how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from scipy.special import expit, logit

from s4mil_monai.statistics.intervals import (
    WEIGHTS_AT_ONCE,
    bootstrap_metric,
    delong_covariance,
    delong_interval,
    draw_resamples,
    place,
)
from s4mil_monai.statistics.metrics import measure
from s4mil_monai.statistics.predictions import pool_runs
from tests.statistics.examples import pooled_scores, simulate


def scores_of(count: int, *, seed: int, apart: float = 1.2) -> tuple[np.ndarray, np.ndarray]:
    """Labels in turn, and scores in (0, 1) of which a few tie."""
    labels = np.arange(count) % 2
    return labels, np.round(expit(np.random.default_rng(seed).normal(apart * labels)), 2)


def all_pairs(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(positives, negatives): 1 in order, ½ tied, 0 else; DeLong by definition."""
    high, low = scores[labels == 1][:, None], scores[labels == 0][None, :]
    return (high > low) + 0.5 * (high == low)


def test_patients_are_drawn_whole_and_classes_keep_their_size():
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    patients = np.array(["a", "a", "b", "c", "c", "d", "d", "e"])
    # e has one slide where c and d have two, so the number of slides varies; that of patients does not
    (weights,) = draw_resamples(labels=labels, patients=patients, resamples=500, seed=1)
    for first, second in ((0, 1), (3, 4), (5, 6)):
        np.testing.assert_array_equal(weights[:, first], weights[:, second])
    np.testing.assert_array_equal(weights[:, [0, 2]].sum(1), 2)
    np.testing.assert_array_equal(weights[:, [3, 5, 7]].sum(1), 3)
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.15)


def test_patient_with_slides_of_both_classes_is_a_kind_of_its_own():
    labels, patients = np.array([0, 1, 0, 0, 1, 1]), np.array(["x", "x", "a", "b", "c", "d"])
    (weights,) = draw_resamples(labels=labels, patients=patients, resamples=200)
    np.testing.assert_array_equal(weights[:, :2], 1)
    np.testing.assert_array_equal(weights[:, 2:4].sum(1), 2)


def test_seed_decides_the_draws():
    def drawn(seed):
        return next(draw_resamples(labels=np.arange(20) % 2, patients=np.arange(20), resamples=5, seed=seed))

    np.testing.assert_array_equal(drawn(3), drawn(3))
    assert (drawn(3) != drawn(4)).any()


def test_many_slides_are_drawn_in_blocks():
    slides = WEIGHTS_AT_ONCE // 3
    labels = np.arange(slides) % 2
    blocks = [block.shape for block in draw_resamples(labels=labels, patients=labels, resamples=5)]
    assert blocks == [(3, slides), (2, slides)]


def test_bootstrap_of_an_auroc_agrees_with_scipy():
    labels, scores = scores_of(40, seed=2, apart=2.5)

    def area(high, low, axis=-1):
        return ((high[..., :, None] > low[..., None, :]) + 0.5 * (high[..., :, None] == low[..., None, :])).mean(
            (-2, -1)
        )

    wanted = scipy.stats.bootstrap(
        (scores[labels == 1], scores[labels == 0]),
        area,
        n_resamples=6000,
        method="percentile",
        rng=np.random.default_rng(0),
        vectorized=True,
        batch=500,
    ).confidence_interval
    found = bootstrap_metric("auroc", pooled_scores(labels, scores), resamples=6000)
    assert found.value == pytest.approx(measure("auroc", labels, np.stack([1 - scores, scores], -1)).value)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.01)


def test_bootstrap_of_an_accuracy_has_the_binomial_spread():
    labels, scores = scores_of(400, seed=0)
    found = bootstrap_metric("accuracy", pooled_scores(labels, scores), level=0.95)
    # normal approximation of a share
    half = 1.96 * np.sqrt(found.value * (1 - found.value) / 400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def test_copies_of_slides_add_nothing_when_patients_are_resampled():
    labels, scores = scores_of(80, seed=2)
    once = bootstrap_metric("auroc", pooled_scores(labels, scores))
    copied = pooled_scores(np.repeat(labels, 3), np.repeat(scores, 3), np.repeat(np.arange(80), 3))
    assert bootstrap_metric("auroc", copied) == once


def test_figure_of_several_seeds_is_the_mean_of_theirs():
    frame = simulate({"a": 1.0}, seeds=3)
    alone = [bootstrap_metric("auroc", pool_runs(frame[frame["seed"] == seed], "a")).value for seed in range(3)]
    assert bootstrap_metric("auroc", pool_runs(frame, "a")).value == pytest.approx(np.mean(alone))


def test_auroc_of_1_has_no_interval_and_says_why():
    pooled = pooled_scores(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9]))
    by_bootstrap = bootstrap_metric("auroc", pooled)
    assert by_bootstrap.value == 1
    assert np.isnan([by_bootstrap.low, by_bootstrap.high]).all()
    assert by_bootstrap.reason == "every resample gives the same value"
    assert delong_interval(pooled).reason == "the variance is 0"


def test_slides_of_one_class_have_no_interval_and_no_value():
    found = bootstrap_metric("auroc", pooled_scores(np.array([1, 1]), np.array([0.1, 0.2])))
    assert np.isnan(found.value)
    assert found.reason == "the figure is not defined"


def test_delong_variance_is_that_of_its_definition():
    labels, scores = scores_of(50, seed=7)
    other = scores_of(50, seed=8)[1]
    auroc, covariance = delong_covariance(labels, place(labels, np.stack([scores, other])))
    pairs = [all_pairs(labels, scores), all_pairs(labels, other)]
    np.testing.assert_allclose(auroc, [p.mean() for p in pairs])
    by_positives = np.cov([p.mean(1) for p in pairs]) / 25
    by_negatives = np.cov([p.mean(0) for p in pairs]) / 25
    np.testing.assert_allclose(covariance, by_positives + by_negatives, rtol=1e-12)


def test_copies_of_slides_add_nothing_to_delong_over_patients():
    labels, scores = scores_of(40, seed=1)
    _, once = delong_covariance(labels, place(labels, scores))
    repeated = np.repeat(labels, 3)
    _, copied = delong_covariance(repeated, place(repeated, np.repeat(scores, 3)), np.repeat(np.arange(40), 3))
    np.testing.assert_allclose(copied, once)


def test_delong_over_patients_with_both_classes_has_the_spread_of_the_bootstrap():
    # pairs of slides share what is the patient's: their scores move together, which narrows the AUROC's spread
    generator = np.random.default_rng(0)
    patients, labels = np.repeat(np.arange(150), 2), np.tile([0, 1], 150)
    scores = expit(np.repeat(generator.normal(size=150), 2) + generator.normal(labels, 0.5))
    (auroc,), ((variance,),) = delong_covariance(labels, place(labels, scores), patients)
    _, ((independent,),) = delong_covariance(labels, place(labels, scores))
    found = bootstrap_metric("auroc", pooled_scores(labels, scores, patients))
    assert found.value == pytest.approx(auroc)
    assert (found.high - found.low) / 3.92 == pytest.approx(np.sqrt(variance), rel=0.06)
    assert variance < 0.8 * independent


def test_delong_interval_on_log_odds_by_hand():
    labels, scores = scores_of(60, seed=4)
    (value,), ((variance,),) = delong_covariance(labels, place(labels, scores))
    half = 1.959964 * np.sqrt(variance) / (value * (1 - value))
    wanted = expit(logit(value) + np.array([-half, half]))
    found = delong_interval(pooled_scores(labels, scores))
    assert (found.low, found.high) == pytest.approx(tuple(wanted), rel=1e-5)
    copied = pooled_scores(np.repeat(labels, 3), np.repeat(scores, 3), np.repeat(np.arange(60), 3))
    assert (delong_interval(copied).low, delong_interval(copied).high) == pytest.approx(tuple(wanted), rel=1e-5)


def test_delong_interval_holds_the_true_auroc_in_95_of_100_studies():
    # AUROC of two normal laws of deviation 1 that are 1.2 apart
    truth, labels = scipy.stats.norm.cdf(1.2 / np.sqrt(2)), np.arange(120) % 2
    generator, studies = np.random.default_rng(0), 1000
    held = 0
    for _ in range(studies):
        found = delong_interval(pooled_scores(labels, generator.normal(1.2 * labels)))
        held += found.low <= truth <= found.high
    # deviation of the share: 0.007
    assert held / studies == pytest.approx(0.95, abs=0.021)


def test_bootstrap_interval_holds_the_true_auroc_in_95_of_100_studies():
    truth, labels = scipy.stats.norm.cdf(1.2 / np.sqrt(2)), np.arange(120) % 2
    generator, studies = np.random.default_rng(1), 300
    held = 0
    for _ in range(studies):
        pooled = pooled_scores(labels, expit(generator.normal(1.2 * labels)))
        found = bootstrap_metric("auroc", pooled, resamples=400)
        held += found.low <= truth <= found.high
    # deviation of the share: 0.013
    assert held / studies == pytest.approx(0.95, abs=0.039)


def test_one_positive_patient_has_no_delong_interval_and_says_why():
    labels, patients = np.array([1, 1, 0, 0, 0]), np.array([0, 0, 1, 2, 3])
    found = delong_interval(pooled_scores(labels, np.array([0.9, 0.4, 0.5, 0.3, 0.2]), patients))
    assert found.reason == "one patient of a class"


def test_auroc_without_two_classes_of_the_same_slides_has_no_delong_interval():
    one_class = pooled_scores(np.array([1, 1]), np.array([0.1, 0.2]))
    assert delong_interval(one_class).reason == "slides are of one class"
    assert delong_interval(pool_runs(simulate({"a": 1.0}, classes=3), "a")).reason == "for two classes only"
    with pytest.raises(ValueError, match="got 2 positives and 0 negatives"):
        place(np.array([1, 1]), np.array([0.1, 0.2]))
