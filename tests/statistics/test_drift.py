"""Drift: statistics against hand calculations, verdicts against simulated slides."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import kl_div

from s4mil_monai.measures import MEASURES, SlideMeasures
from s4mil_monai.slides.overview import Overview
from s4mil_monai.slides.stain import measure_stain
from s4mil_monai.slides.tissue import TissueMask, mark_tissue
from s4mil_monai.statistics.drift import (
    DriftFinding,
    DriftSettings,
    compare,
    describe_drift,
    population_stability,
    stability_by_chance,
    worst_verdict,
)
from s4mil_monai.statistics.drift_reference import build_reference
from tests.conftest import GLASS
from tests.statistics.slides_made_up import MODEL, draw_slides


@pytest.fixture(scope="module")
def reference():
    return build_reference(draw_slides(100, np.random.default_rng(0)), model_sha256=MODEL)


def of(findings: list[DriftFinding], measure: str) -> DriftFinding:
    return next(finding for finding in findings if finding.measure == measure)


# The statistics -----------------------------------------------------------------------------------------------


def test_psi_is_that_of_a_hand_calculation():
    # (0.25 - 0.5) ln(0.25 / 0.5) + (0.75 - 0.5) ln(0.75 / 0.5) = 0.25 ln 2 + 0.25 ln 1.5 = 0.25 ln 3
    assert population_stability([10, 10], [5, 15]) == pytest.approx(0.25 * math.log(3))


def test_empty_bin_counts_as_half_a_slide():
    # (0.05 - 0.5) ln(0.05 / 0.5) + (1 - 0.5) ln(1 / 0.5)
    assert population_stability([10, 10], [0, 10]) == pytest.approx(0.45 * math.log(10) + 0.5 * math.log(2))


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=2, max_size=10))
def test_psi_is_the_divergence_both_ways(counts):
    before, now = np.array(counts, float).T
    p, q = before / before.sum(), now / now.sum()
    assert population_stability(before, now) == pytest.approx(kl_div(p, q).sum() + kl_div(q, p).sum(), abs=1e-12)


@pytest.mark.parametrize(("n", "m", "bins"), [(300, 50, 10), (100, 100, 10), (50, 30, 5), (30, 20, 3)])
def test_psi_by_chance_is_its_mean_over_draws_of_one_distribution(n, m, bins):
    generator = np.random.default_rng(0)
    even = np.full(bins, 1 / bins)
    pairs = zip(generator.multinomial(n, even, 2000), generator.multinomial(m, even, 2000), strict=True)
    drawn = np.mean([population_stability(before, now) for before, now in pairs])
    formula = stability_by_chance(np.full(bins, n // bins), np.full(bins, m / bins))
    assert drawn == pytest.approx(formula, rel=0.2)


def test_kolmogorov_smirnov_is_the_largest_difference_of_cumulative_shares(reference):
    recent = draw_slides(40, np.random.default_rng(5), moved={"score": 1.0})
    finding = of(compare(reference, recent), "score")
    before, now = np.array(reference.measures["score"].sample), np.array([slide.score for slide in recent])
    places = np.concatenate([before, now])
    shares = [(values[None] <= places[:, None]).mean(1) for values in (before, now)]
    assert finding.ks == pytest.approx(np.abs(shares[0] - shares[1]).max())


def test_p_value_is_that_of_counting_permutations(reference):
    recent = draw_slides(30, np.random.default_rng(7), moved={"score": 0.5})
    finding = of(compare(reference, recent), "score")
    pooled = np.array([*reference.measures["score"].sample, *(slide.score for slide in recent)])
    order, generator = np.argsort(pooled), np.random.default_rng(0)
    is_recent = generator.permuted(np.tile(np.arange(130) < 30, (4000, 1)), axis=1)[:, order]
    differences = np.abs((is_recent / 30 - ~is_recent / 100).cumsum(1)).max(1)
    assert finding.ks_p == pytest.approx((differences >= finding.ks - 1e-9).mean(), abs=0.02)


def test_p_values_are_adjusted_for_the_number_of_measures(reference):
    findings = compare(reference, draw_slides(60, np.random.default_rng(1), moved={"eosin_od": 1.5}))
    smallest = min(findings, key=lambda finding: finding.ks_p)
    assert smallest.measure == "eosin_od"
    assert smallest.ks_p_adjusted == pytest.approx(len(MEASURES) * smallest.ks_p)  # Holm's first step


# Verdicts -----------------------------------------------------------------------------------------------------


def test_measures_that_moved_drift_and_the_others_are_stable(reference):
    findings = compare(reference, draw_slides(60, np.random.default_rng(2), moved={"eosin_od": 1.5, "score": -2}))
    moved = {finding.measure for finding in findings if finding.verdict != "stable"}
    assert moved == {"eosin_od", "score"}
    assert worst_verdict(findings) == "drift"
    assert of(findings, "score").median < of(findings, "score").reference_median


def test_evidence_without_size_is_stable():
    generator = np.random.default_rng(3)
    reference = build_reference(draw_slides(4000, generator), model_sha256=MODEL)
    finding = of(compare(reference, draw_slides(4000, generator, moved={"score": 0.25})), "score")
    assert finding.ks_p_adjusted < 0.001
    assert finding.verdict == "stable"  # PSI of normal values moved by 0.25 deviations is near 0.25² = 0.06


def test_size_without_evidence_is_stable(reference):
    drawn = [of(compare(reference, draw_slides(20, np.random.default_rng(seed))), "score") for seed in range(20)]
    assert all(finding.psi > 0.1 for finding in drawn)  # which the customary limits call a change, every time
    assert {finding.verdict for finding in drawn} == {"stable"}


@pytest.mark.parametrize(("n", "m"), [(30, 20), (60, 30), (100, 60)])
def test_alarms_without_change_are_as_rare_as_stated(n, m):
    generator = np.random.default_rng(0)
    looks = 150
    worst, above_the_customary_limit = [], 0
    for _ in range(looks):
        found = compare(build_reference(draw_slides(n, generator), model_sha256=MODEL), draw_slides(m, generator))
        worst.append(worst_verdict(found))
        above_the_customary_limit += any(finding.psi > 0.25 for finding in found)
    # stated: at most 1 in 100 looks; of 150, five or more would come up once in 50 times
    assert looks - worst.count("stable") <= 4
    assert worst.count("drift") <= 1
    assert above_the_customary_limit > 0.9 * looks  # what PSI alone would have said


@pytest.mark.parametrize(("slides", "deviations"), [(30, 2.0), (100, 1.0)])
def test_a_measure_that_moved_far_enough_is_found_every_time(reference, slides, deviations):
    for seed in range(20):
        recent = draw_slides(slides, np.random.default_rng(seed), moved={"haematoxylin_od": deviations})
        assert of(compare(reference, recent), "haematoxylin_od").verdict in ("watch", "drift")


def test_few_slides_get_no_verdict(reference):
    findings = compare(reference, draw_slides(19, np.random.default_rng(0), moved={"score": 5}))
    assert {finding.verdict for finding in findings} == {"too_few"}
    assert {finding.psi for finding in findings} == {None}


def test_measure_that_few_recent_slides_have_gets_no_verdict(reference):
    recent = draw_slides(40, np.random.default_rng(0))
    recent = [slide.model_copy(update={"sharpness": None}) for slide in recent[:25]] + recent[25:]
    findings = compare(reference, recent)
    assert (of(findings, "sharpness").verdict, of(findings, "sharpness").slides) == ("too_few", 15)
    assert of(findings, "score").verdict == "stable"
    assert worst_verdict(findings) == "stable"


def test_constant_measure_that_stays_is_stable_and_one_that_falls_drifts():
    before = [
        slide.model_copy(update={"feature_zero_share": 0.3}) for slide in draw_slides(60, np.random.default_rng(0))
    ]
    reference = build_reference(before, model_sha256=MODEL)
    assert of(compare(reference, before), "feature_zero_share").verdict == "stable"
    fallen = [slide.model_copy(update={"feature_zero_share": 0.2}) for slide in before]
    assert of(compare(reference, fallen), "feature_zero_share").verdict == "drift"


@pytest.mark.parametrize("wrong", [{"watch_psi": 0.3}, {"drift_p": 0.5}, {"least_slides": 0}, {"bins": 10}])
def test_settings_that_contradict_themselves_are_refused(wrong):
    with pytest.raises(ValidationError):
        DriftSettings(**wrong)


# Stain of pictures --------------------------------------------------------------------------------------------


def paint(generator: np.random.Generator, *, denser: float) -> TissueMask:
    """A picture of tissue whose stain varies from slide to slide by a tenth."""
    density = np.array([0.12, 0.39, 0.17]) * generator.normal(1, 0.1) * denser
    noise = generator.normal(1, 0.15, (60, 60, 1))
    pixels = np.full((100, 100, 3), GLASS, np.uint8)
    pixels[20:80, 20:80] = np.array(GLASS) * 10 ** -(density * noise)
    mask, ink = mark_tissue(pixels, mpp=8.0)
    return TissueMask(mask, (16.0, 16.0), "s.tif", Overview(pixels, (16.0, 16.0), 0), ink)


def measure_pictures(count: int, seed: int, *, denser: float = 1.0) -> list[SlideMeasures]:
    """Stain measured on pictures; features and scores drawn, always of the same law."""
    generator = np.random.default_rng(seed)
    rest = draw_slides(count, generator)
    return [slide.model_copy(update=asdict(measure_stain(paint(generator, denser=denser)))) for slide in rest]


def test_slides_stained_darker_drift_and_slides_drawn_anew_do_not():
    reference = build_reference(measure_pictures(60, seed=0), model_sha256=MODEL)
    anew, darker = measure_pictures(30, seed=1), measure_pictures(30, seed=2, denser=1.4)
    assert worst_verdict(compare(reference, anew)) == "stable"
    drifted = {finding.measure for finding in compare(reference, darker) if finding.verdict == "drift"}
    assert drifted == {"tissue_brightness", "saturation", "eosin_od", "haematoxylin_od"}


# One line -----------------------------------------------------------------------------------------------------


def test_bundle_without_a_reference_says_so():
    assert compare(None, draw_slides(30, np.random.default_rng(0))) == []
    assert describe_drift([]) == "drift: not compared, the bundle has no reference"


def test_too_few_slides_say_how_many_are_wanted(reference):
    findings = compare(reference, draw_slides(12, np.random.default_rng(0)))
    assert describe_drift(findings) == "drift: too few slides to tell (12, wanted 20)"
    assert describe_drift(compare(reference, [])) == "drift: too few slides to tell (0, wanted 20)"


def test_stable_slides_say_how_many_were_compared(reference):
    line = describe_drift(compare(reference, draw_slides(40, np.random.default_rng(0))))
    assert line == "drift: stable in 15 measures, 40 slides against 100"


def test_drift_names_what_moved_from_where_to_where_clearest_first(reference):
    recent = draw_slides(60, np.random.default_rng(2), moved={"eosin_od": 3, "score": -1})
    line = describe_drift(compare(reference, recent))
    assert line.startswith("drift: drift, 60 slides against 100: eosin_od 0.5")
    assert "; score 0.5" in line
    assert "by chance" in line
    assert "\n" not in line
