"""Calibration: what is promised of probabilities, thresholds and the refer band holds on simulated slides."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import expit, log_softmax, logit, softmax
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from s4mil_monai.errors import BundleError, OutputError, TableError
from s4mil_monai.statistics.calibration import Calibration, read_calibration, write_calibration
from s4mil_monai.statistics.fit_calibration import (
    choose_threshold,
    clopper_pearson,
    conformal_floor,
    draw_in,
    fit_calibration,
    fit_platt,
    fit_temperature,
    logits_of,
)
from tests.statistics.examples import simulate


def slides(count: int, *, seed: int, apart: float = 2.0, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels in turn, and logits whose true class stands out."""
    labels = np.arange(count) % classes
    logits = np.random.default_rng(seed).normal(size=(count, classes))
    logits[np.arange(count), labels] += apart
    return labels, logits


def made(**changes) -> Calibration:
    facts = {"method": "temperature", "classes": 2, "temperature": 2.0, "threshold": 0.5, "refer_low": 0.3}
    facts |= {"refer_high": 0.6, "class_floors": (0.4, 0.3), "alpha": 0.1, "n": 10, "n_patients": 10}
    return Calibration(**(facts | {"provenance": "made up"} | changes))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_temperature_is_recovered(true, classes):
    generator = np.random.default_rng(0)
    logits = 2 * true * generator.normal(size=(20_000, classes))
    labels = (logits / true + generator.gumbel(size=logits.shape)).argmax(1)  # draws from softmax(logits / true)
    assert fit_temperature(labels, logits) == pytest.approx(true, rel=0.05)


def test_temperature_is_the_best_of_a_fine_grid():
    labels, logits = slides(60, seed=1, apart=1.0)
    grid = np.geomspace(0.1, 10, 4001)
    # 30 slides of either class: the true one counts 31/32, the other 1/32
    counts = np.where(np.eye(2)[labels] == 1, 31 / 32, 1 / 32)
    surprise = [-(counts * log_softmax(logits / t, 1)).sum(1).mean() for t in grid]
    assert fit_temperature(labels, logits) == pytest.approx(grid[np.argmin(surprise)], rel=2e-3)


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_predictions_without_an_error_do_not_become_certain(method):
    labels, logits = slides(40, seed=0, apart=50.0)
    p = fit_calibration(labels, logits, alpha=0.1, method=method).apply(logits)[np.arange(40), labels]
    # 20 slides of each class, each counted as right 21 times of 22
    assert p.mean() == pytest.approx(21 / 22, abs=0.01)


def test_labels_of_three_classes_are_drawn_in_by_their_counts():
    # class 0 has 2 slides: (2 + 1) / (2 + 3) and 1 / 5; classes 1 and 2 have one: 2 / 4 and 1 / 4
    wanted = [[0.6, 0.2, 0.2], [0.25, 0.5, 0.25], [0.6, 0.2, 0.2], [0.25, 0.25, 0.5]]
    np.testing.assert_allclose(draw_in(np.array([0, 1, 0, 2]), 3), wanted)


def test_platt_agrees_with_scikit_learn():
    labels, logits = slides(300, seed=3, apart=1.0)
    margin = logits[:, 1:] - logits[:, :1]
    classifier = LogisticRegression(C=0.01).fit(margin, labels)
    wanted = CalibratedClassifierCV(FrozenEstimator(classifier), method="sigmoid").fit(margin, labels)
    decision = classifier.decision_function(margin)
    slope, intercept = fit_platt(labels, np.stack([np.zeros(300), decision], -1))
    np.testing.assert_allclose(expit(slope * decision + intercept), wanted.predict_proba(margin)[:, 1], atol=1e-4)


def test_platt_of_large_logits_is_fitted_as_well():
    labels, logits = slides(300, seed=3, apart=1.0)
    slope, intercept = fit_platt(labels, logits)
    scaled = fit_platt(labels, 1e4 * logits)
    assert scaled == pytest.approx((slope / 1e4, intercept), rel=1e-4)


def test_swapped_labels_are_refused_by_platt():
    labels, logits = slides(100, seed=0)
    with pytest.raises(TableError, match="positives score below negatives"):
        fit_calibration(1 - labels, logits, method="platt")


def test_applied_temperature_is_a_softmax_and_keeps_the_order():
    _, logits = slides(30, seed=0)
    found = made().apply(logits)
    np.testing.assert_allclose(found, softmax(logits / 2, axis=1))
    np.testing.assert_array_equal(found.argmax(1), logits.argmax(1))
    np.testing.assert_allclose(made().apply(logits[4]), found[4])


def test_applied_platt_is_its_line():
    line = made(method="platt", temperature=None, slope=0.5, intercept=-1.0)
    # 0.5 (3 - 1) - 1 = 0
    np.testing.assert_allclose(line.apply(np.array([1.0, 3.0])), [0.5, 0.5])
    np.testing.assert_allclose(line.apply(np.array([[0.0, 4.0]]))[0, 1], expit(1.0))


def test_logits_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"2 classes are wanted, got shape \(3,\)"):
        made().apply(np.zeros(3))


def test_probabilities_serve_as_logits():
    frame = simulate({"a": 1.0})
    np.testing.assert_allclose(softmax(logits_of(frame), axis=1), frame[["p_0", "p_1"]])
    sure = frame.assign(p_0=1.0, p_1=0.0)
    assert np.isfinite(logits_of(sure)).all()
    given_ones = frame.assign(logit_0=1.0, logit_1=2.0)
    np.testing.assert_array_equal(logits_of(given_ones)[0], [1, 2])


@pytest.mark.parametrize("n, alpha, wanted", [(39, 0.1, 4 / 40), (30, 0.1, 3 / 31), (19, 0.05, 1 / 20)])
def test_conformal_floor_misses_exactly_its_share_on_average(n, alpha, wanted):
    # Probabilities uniform on [0, 1]: a new slide falls below a floor f with probability f.
    generator = np.random.default_rng(0)
    missed = np.mean([conformal_floor(generator.random(n), alpha) for _ in range(4000)])
    assert missed <= alpha + 0.003
    assert missed == pytest.approx(wanted, abs=0.003)


def test_conformal_floor_needs_enough_slides():
    assert conformal_floor(np.full(18, 0.5), 0.05) is None
    assert conformal_floor(np.arange(19) / 19, 0.05) == 0  # the smallest


@pytest.mark.parametrize("apart", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_refer_band_keeps_wrong_calls_of_either_class_below_alpha_on_average(method, apart):
    # The difference of the two logits is normal, of mean apart for class 1, -apart for class 0, and variance 2.
    wrong = []
    for seed in range(300):
        fitted = fit_calibration(*slides(120, seed=seed, apart=apart), method=method, alpha=0.1, sensitivity=0.9)
        band = (fitted.refer_low, fitted.refer_high)
        low, high = logit([fitted.threshold if edge is None else edge for edge in band])
        if fitted.method == "platt":
            low, high = (low - fitted.intercept) / fitted.slope, (high - fitted.intercept) / fitted.slope
        else:
            low, high = low * fitted.temperature, high * fitted.temperature
        wrong.append(scipy.stats.norm.cdf([(low - apart) / math.sqrt(2), (-apart - high) / math.sqrt(2)]))
    missed, alarmed = np.mean(wrong, 0)
    # deviation of a mean: 0.039 / sqrt(300) = 0.0023
    assert missed <= 0.106
    assert alarmed <= 0.106
    if apart == 0.5:  # classes overlap: nothing is widened, and the band is as narrow as it may be
        assert (missed, alarmed) == pytest.approx((6 / 61, 6 / 61), abs=0.006)


def test_band_holds_for_all_slides_of_a_patient_at_once():
    def patients_of(count, seed):
        generator = np.random.default_rng(seed)
        patients = np.repeat(np.arange(count), 4)
        labels = patients % 2
        own = np.repeat(generator.normal(size=count), 4)
        margin = 2.0 * (2 * labels - 1) + own + generator.normal(size=4 * count)
        return labels, np.stack([np.zeros(4 * count), margin], -1), patients

    labels, logits, patients = patients_of(2000, 999)
    missed, missed_by_slides = [], []
    for seed in range(40):
        fit_labels, fit_logits, fit_patients = patients_of(100, seed)
        for found, grouping in ((missed, fit_patients), (missed_by_slides, None)):
            fitted = fit_calibration(fit_labels, fit_logits, patients=grouping, alpha=0.1, sensitivity=0.95)
            lowest = fitted.threshold if fitted.refer_low is None else fitted.refer_low
            called = (fitted.apply(logits)[:, 1] < lowest) & (labels == 1)
            found.append(len(set(patients[called])) / 1000)
    assert np.mean(missed) <= 0.1 + 2.5 * np.std(missed) / math.sqrt(40)
    assert np.mean(missed_by_slides) > np.mean(missed)


def test_possible_classes_of_three_leave_out_the_true_one_at_most_alpha_of_the_time():
    labels, logits = slides(2000, seed=99, apart=1.5, classes=3)
    missed = []
    for seed in range(40):
        fitted = fit_calibration(*slides(150, seed=seed, apart=1.5, classes=3), alpha=0.2)
        p = fitted.apply(logits)
        missed.append([(p[labels == c, c] < fitted.class_floors[c]).mean() for c in range(3)])
    assert (np.mean(missed, 0) <= 0.2 + 2.5 * np.std(missed, 0) / math.sqrt(40)).all()
    assert np.mean(missed) > 0.17
    assert made(class_floors=(0.4, 0.3)).possible_classes(np.array([0.65, 0.35])) == (0, 1)
    assert made(class_floors=(0.4, 0.3)).possible_classes(np.array([0.75, 0.25])) == (0,)


def test_three_classes_have_no_positive():
    fitted = fit_calibration(*slides(150, seed=0, classes=3))
    assert fitted.threshold is None
    with pytest.raises(ValueError, match="this model has 3"):
        fitted.decide(0.5)


def test_classes_well_apart_are_never_referred():
    labels, logits = slides(100, seed=0, apart=30.0)
    fitted = fit_calibration(labels, logits, alpha=0.05)
    decisions = [fitted.decide(p) for p in fitted.apply(logits)[:, 1]]
    assert fitted.refer_low is None
    assert "refer" not in decisions
    # 95 % of 50 positives leaves 2 below the threshold; the band's 48.45th of 50 leaves 1
    missed = [d for d, label in zip(decisions, labels, strict=True) if label == 1 and d == "negative"]
    assert len(missed) == 1
    assert (fitted.sensitivity, fitted.specificity) == (0.98, 1.0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(-0.5, 8), st.sampled_from([0.05, 0.2]), st.floats(0.5, 0.99))
def test_decisions_rise_with_the_probability_and_agree_with_the_threshold_outside_the_band(
    seed, apart, alpha, sensitivity
):
    fitted = fit_calibration(*slides(80, seed=seed, apart=apart), alpha=alpha, sensitivity=sensitivity)
    assert fitted.refer_low is None or fitted.refer_low <= fitted.threshold <= fitted.refer_high
    decisions = [fitted.decide(p) for p in np.linspace(0, 1, 101)]
    ranks = [("negative", "refer", "positive").index(d) for d in decisions]
    assert ranks == sorted(ranks)
    for p, decision in zip(np.linspace(0, 1, 101), decisions, strict=True):
        assert decision in ("refer", "positive" if p >= fitted.threshold else "negative")


def test_slides_that_all_score_the_same_are_all_referred():
    labels = np.arange(60) % 2
    fitted = fit_calibration(labels, np.tile([0.3, 0.1], (60, 1)))
    assert fitted.decide(fitted.apply(np.array([0.3, 0.1]))[1]) == "refer"


@pytest.mark.parametrize("apart", [0.5, 2.0, 4.0])
def test_promise_holds_for_scores_of_a_few_values(apart):
    values = np.arange(-3, 4) * 1.3
    wrong = []
    edges = [-np.inf, *((values[1:] + values[:-1]) / 2), np.inf]
    law = np.diff(scipy.stats.norm.cdf(edges, [[-apart / 2], [apart / 2]]))
    for seed in range(200):
        generator, labels = np.random.default_rng(seed), np.arange(100) % 2
        drawn = np.array([generator.choice(7, p=law[label]) for label in labels])
        fitted = fit_calibration(labels, np.stack([np.zeros(100), values[drawn]], -1), alpha=0.1, sensitivity=0.9)
        called = [fitted.decide(fitted.apply(np.array([0, value]))[1]) for value in values]
        says = {d: np.array([c == d for c in called]) for d in ("positive", "negative")}
        wrong.append([law[0] @ says["positive"], law[1] @ says["negative"]])
    assert (np.mean(wrong, 0) <= 0.1 + 2.5 * np.std(wrong, 0) / math.sqrt(200)).all()


def test_edges_of_the_band_are_referred():
    assert [made().decide(p) for p in (0.29, 0.3, 0.5, 0.6, 0.61)] == ["negative", *["refer"] * 3, "positive"]
    point = made(refer_low=0.5, refer_high=0.5)
    assert [point.decide(p) for p in (0.49, 0.5, 0.51)] == ["negative", "refer", "positive"]
    without = made(refer_low=None, refer_high=None)
    assert [without.decide(p) for p in (0.49, 0.5)] == ["negative", "positive"]
    with pytest.raises(ValueError, match="got nan"):
        made().decide(math.nan)


def test_threshold_is_the_highest_with_the_sensitivity():
    p = np.array([0.9, 0.2, 0.8, 0.6, 0.7, 0.5, 0.4, 0.3, 0.95, 0.85])
    point = choose_threshold(p, np.array([0.1, 0.25, 0.35, 0.45]), sensitivity=0.8)
    # 8 of 10 positives are at or above .4, 3 of 4 negatives below
    assert (point.threshold, point.sensitivity, point.specificity) == (0.4, 0.8, 0.75)


def test_interval_of_the_sensitivity_holds_that_of_new_patients():
    # Uniform probabilities: the sensitivity at a threshold is 1 - threshold.
    generator = np.random.default_rng(0)
    points = [choose_threshold(generator.random(80), np.zeros(5), sensitivity=0.9) for _ in range(1500)]
    inside = np.mean([point.sensitivity_low <= 1 - point.threshold <= point.sensitivity_high for point in points])
    assert inside == pytest.approx(0.95, abs=0.017)


@pytest.mark.parametrize("hits, n", [(0, 10), (3, 10), (10, 10), (57, 60)])
def test_exact_interval_agrees_with_scipy(hits, n):
    wanted = scipy.stats.binomtest(hits, n).proportion_ci(method="exact")
    assert clopper_pearson(hits, n) == pytest.approx((wanted.low, wanted.high))


def test_too_few_patients_for_the_error_rate_are_refused():
    labels, logits = slides(24, seed=0)
    with pytest.raises(TableError, match=r"alpha 0\.05 needs 19 patients of each class; class 0 has 12"):
        fit_calibration(labels, logits, alpha=0.05)
    with pytest.raises(TableError, match="no slide of class 1 to calibrate on"):
        fit_calibration(np.zeros(24, int), logits)


def test_impossible_shares_are_refused():
    labels, logits = slides(100, seed=0)
    with pytest.raises(ValueError, match="alpha is a share between 0 and 1, got 5"):
        fit_calibration(labels, logits, alpha=5)


def test_calibration_comes_back_from_its_file_with_its_facts(tmp_path):
    labels, logits = slides(100, seed=0)
    fitted = fit_calibration(labels, logits, patients=np.arange(100) // 2 * 2 + labels, provenance="10 folds")
    path = write_calibration(fitted, tmp_path / "calibration.json")
    assert read_calibration(path) == fitted
    written = json.loads(path.read_text())
    assert written["format"] == "s4mil.calibration/1"
    assert (written["n"], written["n_patients"], written["provenance"]) == (100, 100, "10 folds")
    assert "slope" not in written


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": None}, "temperature is for the method temperature"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"temperature": math.inf}, "finite number"),
        ({"slope": 1.0, "intercept": 0.0}, "slope and intercept are for the method platt"),
        ({"threshold": None}, "two classes need a threshold"),
        ({"refer_low": None}, "refer_low and refer_high are given both or neither"),
        ({"threshold": 0.7}, "refer_low <= threshold <= refer_high"),
        ({"class_floors": (0.5,)}, "2 classes need as many floors, got 1"),
        ({"surprise": 1}, "Extra inputs are not permitted"),
    ],
)
def test_calibration_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        made(**changes)


def test_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "calibration.json"
    with pytest.raises(BundleError, match=r"calibration\.json: cannot be read"):
        read_calibration(path)
    path.write_text(made().to_json().replace("calibration/1", "calibration/9"))
    with pytest.raises(BundleError, match=r"is not a calibration of format s4mil\.calibration/1: format"):
        read_calibration(path)
    path.write_bytes(b"\xff")
    with pytest.raises(BundleError, match="is not a calibration"):
        read_calibration(path)
    with pytest.raises(OutputError, match="cannot be written"):
        write_calibration(made(), tmp_path / "no folder" / "calibration.json")
