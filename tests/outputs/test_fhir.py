"""The score for systems that speak FHIR R4."""

from __future__ import annotations

import json

import pytest
from fhir.resources.R4B.bundle import Bundle

from s4mil_monai.errors import OutputError
from s4mil_monai.outputs.fhir import check_codes, make_fhir, write_fhir
from s4mil_monai.slides.isolation import open_isolated
from tests.outputs.results import make_result


@pytest.fixture(scope="module")
def result(tissue_slide):
    with open_isolated(tissue_slide) as slide:
        return make_result(slide)


def by_kind(bundle):
    found = {}
    for entry in bundle["entry"]:
        found.setdefault(entry["resource"]["resourceType"], []).append(entry["resource"])
    return found


def unscored(result):
    none = dict.fromkeys(("predicted", "probabilities", "calibrated", "decision", "threshold", "patches"))
    return result.model_copy(
        update={**none, "status": "no_tissue", "reason": "no tissue found", "deciding_patches": []}
    )


def test_bundle_is_valid_r4_with_and_without_a_score(result):
    for found in (result, unscored(result), result.model_copy(update={"decision": "refer"})):
        bundle = Bundle.model_validate(make_fhir(found, study_instance_uid="1.2.3"))
        assert bundle.entry[0].resource.get_resource_type() == "DiagnosticReport"


def test_every_reference_of_the_report_is_in_the_bundle(result):
    bundle = make_fhir(result)
    names = {entry["fullUrl"] for entry in bundle["entry"]}
    report = by_kind(bundle)["DiagnosticReport"][0]
    referred = {item["reference"] for item in report["result"]}
    referred |= {found["device"]["reference"] for found in by_kind(bundle)["Observation"]}
    assert referred == names - {bundle["entry"][0]["fullUrl"]}


def test_observations_hold_probability_threshold_and_decision(result):
    found = observations_of(result)
    assert found["probability-1"]["valueQuantity"]["value"] == 0.8
    assert found["calibrated-1"]["valueQuantity"]["value"] == 0.7
    assert found["threshold"]["valueQuantity"]["value"] == 0.5
    assert found["decision"]["interpretation"][0]["coding"][0]["code"] == "POS"


@pytest.mark.parametrize(
    ("decision", "code", "display"),
    [("positive", "POS", "Positive"), ("negative", "NEG", "Negative"), ("refer", "IND", "Indeterminate")],
)
def test_decision_has_the_interpretation_that_hl7_gives_it(result, decision, code, display):
    """Codes and displays as HL7's table v3 ObservationInterpretation has them."""
    found = observations_of(result.model_copy(update={"decision": decision}))["decision"]
    assert found["valueCodeableConcept"]["coding"][0]["code"] == decision
    assert found["interpretation"] == [
        {
            "coding": [
                {
                    "system": "http://terminology.hl7.org/CodeSystem/v3-ObservationInterpretation",
                    "code": code,
                    "display": display,
                }
            ],
            "text": display,
        }
    ]


@pytest.mark.parametrize(
    ("decision", "predicted", "probabilities", "text"),
    [
        ("positive", "tumour", [0.2, 0.8], "positive; most probable tumour, probability 0.800 by the model."),
        ("negative", "normal", [0.75, 0.25], "negative; most probable normal, probability 0.750 by the model."),
        ("refer", "tumour", [0.48, 0.52], "refer; most probable tumour, probability 0.520 by the model."),
        (None, "tumour", [0.2, 0.8], "most probable tumour, probability 0.800 by the model."),
    ],
)
def test_conclusion_says_decision_and_most_probable_class(result, decision, predicted, probabilities, text):
    changed = {"decision": decision, "predicted": predicted, "probabilities": probabilities}
    report = by_kind(make_fhir(result.model_copy(update=changed)))["DiagnosticReport"][0]
    assert report["conclusion"] == f"{text} Research use; not cleared for diagnosis."


def test_each_observation_is_displayed_by_the_name_of_its_class(result):
    shown = {code: found["code"]["coding"][0]["display"] for code, found in observations_of(result).items()}
    assert shown == {
        "status": "Status of the score",
        "probability-0": "Probability of normal",
        "probability-1": "Probability of tumour",
        "calibrated-0": "Calibrated of normal",
        "calibrated-1": "Calibrated of tumour",
        "threshold": "Calibrated probability from which on it is positive",
        "decision": "Decision by the calibrated threshold",
        "quality": "Fitness for scoring",
    }
    numbers = {code: found.get("valueQuantity") for code, found in observations_of(result).items()}
    values = {code: number["value"] for code, number in numbers.items() if number is not None}
    assert values == {
        "probability-0": 0.2,
        "probability-1": 0.8,
        "calibrated-0": 0.3,
        "calibrated-1": 0.7,
        "threshold": 0.5,
    }


def observations_of(result):
    return {found["code"]["coding"][0]["code"]: found for found in by_kind(make_fhir(result))["Observation"]}


def test_result_without_a_score_says_why(result):
    bundle = make_fhir(unscored(result))
    found = {o["code"]["coding"][0]["code"]: o for o in by_kind(bundle)["Observation"]}
    assert found["decision"]["dataAbsentReason"]["coding"][0]["code"] == "not-performed"
    assert by_kind(bundle)["DiagnosticReport"][0]["conclusion"].startswith("No score: no tissue found.")


def test_report_is_found_through_its_study_and_names_nobody(result):
    report = by_kind(make_fhir(result, study_instance_uid="1.2.3"))["DiagnosticReport"][0]
    assert report["imagingStudy"][0]["identifier"]["value"] == "urn:oid:1.2.3"
    assert "subject" not in report
    assert "imagingStudy" not in by_kind(make_fhir(result))["DiagnosticReport"][0]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Observation", {"status": "blah"}),  # the models of fhir.resources let this pass
        ("DiagnosticReport", {"status": "done"}),
        ("Device", {"status": "on"}),
        ("Device", {"deviceName": [{"name": "x", "type": "nickname"}]}),
        ("Observation", {"valueQuantity": {"value": 1, "system": "http://unitsofmeasure.org", "code": "one"}}),
    ],
)
def test_code_that_r4_does_not_have_is_refused(result, kind, change):
    bundle = make_fhir(result)
    by_kind(bundle)[kind][0].update(change)
    with pytest.raises(OutputError, match=r"is no code of FHIR R4|is not one of"):
        check_codes(bundle)


@pytest.mark.parametrize("field", ["encoder", "slide", "threshold", "decision", "calibrated", "classes", "status"])
def test_result_that_says_something_else_is_another_report_as_it_is_in_dicom(result, field):
    changed = {
        "encoder": result.encoder.model_copy(update={"sha256": "12" * 32}),
        "slide": result.slide.model_copy(update={"mpp": 0.25}),
        "threshold": 0.6,
        "decision": "refer",
        "calibrated": [0.4, 0.6],
        "classes": ("tumour", "normal"),
        "status": "degraded",
    }
    other = result.model_copy(update={field: changed[field]})
    assert names_of(make_fhir(result)) == names_of(make_fhir(result))
    assert not names_of(make_fhir(result)) & names_of(make_fhir(other))


def names_of(bundle):
    return {entry["fullUrl"] for entry in bundle["entry"]}


def test_file_is_the_bundle(result, tmp_path):
    write_fhir(result, tmp_path / "fhir.json", study_instance_uid="1.2.3")
    assert Bundle.model_validate(json.loads((tmp_path / "fhir.json").read_text()))
