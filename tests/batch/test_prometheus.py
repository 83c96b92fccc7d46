"""Prometheus text, read again by Prometheus' own parser."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from s4mil_monai.batch.prometheus import BatchSnapshot, StageSeconds, metrics_text
from s4mil_monai.statistics.drift import compare
from s4mil_monai.statistics.drift_reference import build_reference
from tests.statistics.slides_made_up import MODEL, draw_slides

NIGHT = BatchSnapshot(
    jobs={"waiting": 3, "running": 1, "published": 40, "quarantined": 0},
    scored=41,
    published={"positive": 12, "negative": 25, "refer": 3},
    failures={"UnreadableSlideError": 2, "S4MilError": 1},
    stages={"last_patch_to_score": StageSeconds(41, 12.5, {0.99: 0.9, 0.5: 0.25})},
    oldest_waiting_s=610.5,
    run_started=1795700000.25,
    run_ended=1795703600.0,
    run_exit=0,
)


def read(snapshot: BatchSnapshot) -> dict[tuple[str, ...], float]:
    """Values by the sample's name and the values of its labels, which the text has in order of their names."""
    families = text_string_to_metric_families(metrics_text(snapshot))
    samples = [sample for family in families for sample in family.samples]
    found = {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value for sample in samples
    }
    assert len(found) == len(samples)
    return found


def test_every_number_of_the_ledger_comes_back():
    found = read(NIGHT)
    expected = {
        ("s4mil_jobs", "waiting"): 3,
        ("s4mil_jobs", "running"): 1,
        ("s4mil_jobs", "published"): 40,
        ("s4mil_jobs", "quarantined"): 0,
        ("s4mil_slides_scored_total",): 41,
        ("s4mil_slides_published_total", "positive"): 12,
        ("s4mil_slides_published_total", "negative"): 25,
        ("s4mil_slides_published_total", "refer"): 3,
        ("s4mil_slide_failures_total", "UnreadableSlideError"): 2,
        ("s4mil_slide_failures_total", "S4MilError"): 1,
        ("s4mil_stage_seconds", "0.5", "last_patch_to_score"): 0.25,
        ("s4mil_stage_seconds", "0.99", "last_patch_to_score"): 0.9,
        ("s4mil_stage_seconds_count", "last_patch_to_score"): 41,
        ("s4mil_stage_seconds_sum", "last_patch_to_score"): 12.5,
        ("s4mil_oldest_waiting_seconds",): 610.5,
        ("s4mil_last_run_start_timestamp_seconds",): 1795700000.25,
        ("s4mil_last_run_end_timestamp_seconds",): 1795703600,
        ("s4mil_last_run_exit_status",): 0,
        ("s4mil_drift_verdict", "no_reference"): 1,
        ("s4mil_drift_verdict", "too_few"): 0,
        ("s4mil_drift_verdict", "stable"): 0,
        ("s4mil_drift_verdict", "watch"): 0,
        ("s4mil_drift_verdict", "drift"): 0,
    }
    assert found == expected


def test_every_metric_has_a_type_and_says_what_it_is():
    families = list(text_string_to_metric_families(metrics_text(NIGHT)))
    assert all(family.documentation.endswith(".") for family in families)
    assert {family.type for family in families} == {"gauge", "counter", "summary"}


def test_what_is_not_known_is_absent():
    names = {key[0] for key in read(BatchSnapshot(jobs={"waiting": 0}))}
    assert names == {"s4mil_jobs", "s4mil_slides_scored_total", "s4mil_drift_verdict"}


def test_drift_comes_by_measure_with_the_worst_verdict():
    generator = np.random.default_rng(0)
    reference = build_reference(draw_slides(60, generator), model_sha256=MODEL)
    findings = compare(reference, draw_slides(40, generator, moved={"eosin_od": 3}))
    found = read(BatchSnapshot(jobs={}, drift=tuple(findings)))
    assert found["s4mil_drift_verdict", "drift"] == 1
    assert found["s4mil_drift_verdict", "no_reference"] == 0
    assert (found["s4mil_drift_level", "eosin_od"], found["s4mil_drift_level", "score"]) == (3, 1)
    for finding in findings:
        assert found["s4mil_drift_psi", finding.measure] == pytest.approx(finding.psi)
        assert found["s4mil_drift_psi_by_chance", finding.measure] == pytest.approx(finding.psi_by_chance)
        assert found["s4mil_drift_ks_p_value", finding.measure] == pytest.approx(finding.ks_p_adjusted)
        assert found["s4mil_drift_slides", finding.measure] == 40


def test_too_few_slides_have_a_verdict_and_no_statistics():
    generator = np.random.default_rng(0)
    reference = build_reference(draw_slides(60, generator), model_sha256=MODEL)
    found = read(BatchSnapshot(jobs={}, drift=tuple(compare(reference, draw_slides(5, generator)))))
    assert found["s4mil_drift_verdict", "too_few"] == 1
    assert "s4mil_drift_psi" not in {key[0] for key in found}


@pytest.mark.parametrize("label", ["slide.svs", "TCGA-CR-7395", "Doe John", "/data/a", "case1234", "", "a" * 65])
def test_label_that_could_name_a_slide_or_a_patient_is_told_as_other(label):
    found = read(BatchSnapshot(jobs={}, failures={label: 2, "_LinAlgError": 1, "S4MilError": 4}))
    assert found["s4mil_slide_failures_total", "other"] == 3
    assert found["s4mil_slide_failures_total", "S4MilError"] == 4
    with pytest.raises(ValueError, match="a label is a word of this package"):
        metrics_text(BatchSnapshot(jobs={}, stages={label: StageSeconds(1, 1.0)}))
