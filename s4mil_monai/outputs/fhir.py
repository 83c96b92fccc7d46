"""The score as a FHIR R4 DiagnosticReport with Observations, for systems that know no DICOM.

The patient is not named: the report is found through the study that it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from s4mil_monai import __version__
from s4mil_monai.errors import OutputError
from s4mil_monai.outputs.identity import identify_result, make_urn
from s4mil_monai.result import SlideResult

SYSTEM = "urn:s4mil_monai:codes"
"""Of codes that no published system has."""

INTERPRETATION_SYSTEM = "http://terminology.hl7.org/CodeSystem/v3-ObservationInterpretation"
ABSENT_SYSTEM = "http://terminology.hl7.org/CodeSystem/data-absent-reason"
CATEGORY_SYSTEM = "http://terminology.hl7.org/CodeSystem/v2-0074"
OBSERVATION_CATEGORY_SYSTEM = "http://terminology.hl7.org/CodeSystem/observation-category"

OBSERVATION_STATUS = frozenset(
    ("registered", "preliminary", "final", "amended", "corrected", "cancelled", "entered-in-error", "unknown")
)
CODES: dict[str, frozenset[str]] = {
    "Bundle.type": frozenset(
        (
            *("document", "message", "transaction", "transaction-response", "batch", "batch-response"),
            *("history", "searchset", "collection"),
        )
    ),
    "Observation.status": OBSERVATION_STATUS,
    "DiagnosticReport.status": OBSERVATION_STATUS | {"partial", "appended"},
    "Device.status": frozenset(("active", "inactive", "entered-in-error", "unknown")),
    "Device.deviceName.type": frozenset(
        (
            *("udi-label-name", "user-friendly-name", "patient-reported-name"),
            *("manufacturer-name", "model-name", "other"),
        )
    ),
}
"""What R4 allows where a code is required; models of the resources check types only."""

CODES_OF_SYSTEM: dict[str, frozenset[str]] = {
    INTERPRETATION_SYSTEM: frozenset(("POS", "NEG", "IND")),
    ABSENT_SYSTEM: frozenset(("unknown", "not-performed", "error", "unsupported")),
    CATEGORY_SYSTEM: frozenset(("PAT",)),
    OBSERVATION_CATEGORY_SYSTEM: frozenset(("imaging", "laboratory")),
    "http://loinc.org": frozenset(("11526-1",)),
    "http://unitsofmeasure.org": frozenset(("1",)),
}
"""Of published systems, the codes that are used here."""

INTERPRETATIONS = {
    "positive": ("POS", "Positive"),
    "negative": ("NEG", "Negative"),
    "refer": ("IND", "Indeterminate"),
}


def write_fhir(
    result: SlideResult, path: Path, *, study_instance_uid: str | None = None, written: datetime | None = None
) -> None:
    """Write the report as a FHIR R4 Bundle.

    Args:
        result: Of the slide.
        path: Ends in ``.json``.
        study_instance_uid: Of the study the slide belongs to; None where that is not known.
        written: When; now by default.
    """
    bundle = make_fhir(result, study_instance_uid=study_instance_uid, written=written)
    path.write_text(json.dumps(bundle, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make_fhir(
    result: SlideResult, *, study_instance_uid: str | None = None, written: datetime | None = None
) -> dict[str, Any]:
    """A Bundle of one DiagnosticReport, its Observations and the Device that made them.

    Raises:
        OutputError: A code is not one that R4 allows.
    """
    moment = (written or datetime.now(timezone.utc)).isoformat(timespec="seconds")
    key = (*identify_result(result), study_instance_uid or "")
    device = _device(result)
    common = {"status": "preliminary", "issued": moment, "device": {"reference": make_urn("device", *key)}}
    if study_instance_uid is not None:
        common["derivedFrom"] = [_study(study_instance_uid)]
    observations = list(_observations(result, common))
    urns = [make_urn(f"observation {number}", *key) for number in range(len(observations))]
    report = _report(result, moment, urns, study_instance_uid)
    resources = [report, *observations, device]
    names = [make_urn("report", *key), *urns, make_urn("device", *key)]
    bundle = {
        "resourceType": "Bundle",
        "type": "collection",
        "timestamp": moment,
        "entry": [{"fullUrl": urn, "resource": found} for urn, found in zip(names, resources, strict=True)],
    }
    check_codes(bundle)
    return bundle


def check_codes(resource: dict[str, Any]) -> None:
    """Refuse codes that R4 does not have, in every place of a resource that has a required set.

    Raises:
        OutputError: Names place and code.
    """
    for path, value in _walk(resource, resource["resourceType"]):
        allowed = CODES.get(path)
        if allowed is not None and value not in allowed:
            raise OutputError(path, f"{value!r} is no code of FHIR R4; known: {', '.join(sorted(allowed))}")
        if isinstance(value, dict) and value.get("system") in CODES_OF_SYSTEM and "code" in value:
            known = CODES_OF_SYSTEM[value["system"]]
            if value["code"] not in known:
                raise OutputError(path, f"{value['code']!r} is not one of {', '.join(sorted(known))}")


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value with its path; a resource inside another begins a path of its own."""
    yield path, value
    if isinstance(value, dict):
        for key, below in value.items():
            inner = below.get("resourceType") if isinstance(below, dict) else None
            yield from _walk(below, inner or f"{path}.{key}")
    elif isinstance(value, list):
        for below in value:
            yield from _walk(below, path)


def _study(study_instance_uid: str) -> dict[str, Any]:
    return {
        "type": "ImagingStudy",
        "identifier": {"system": "urn:dicom:uid", "value": f"urn:oid:{study_instance_uid}"},
    }


def _concept(system: str, code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": system, "code": code, "display": display}], "text": display}


def _device(result: SlideResult) -> dict[str, Any]:
    return {
        "resourceType": "Device",
        "status": "active",
        "manufacturer": "s4mil_monai",
        "serialNumber": result.model.sha256,
        "deviceName": [{"name": result.model.bundle, "type": "model-name"}],
        "version": [{"value": result.model.version or "none"}, {"value": f"s4mil_monai {__version__}"}],
        "note": [{"text": result.model.intended_use or "research use; not cleared for diagnosis"}],
    }


def _report(
    result: SlideResult, moment: str, observations: list[str], study_instance_uid: str | None
) -> dict[str, Any]:
    report = {
        "resourceType": "DiagnosticReport",
        "status": "preliminary",  # a person has not looked at it
        "category": [_concept(CATEGORY_SYSTEM, "PAT", "Pathology (gross & histopath, not surgical)")],
        "code": _concept("http://loinc.org", "11526-1", "Pathology study"),
        "issued": moment,
        "result": [{"reference": urn} for urn in observations],
        "conclusion": _conclusion(result),
    }
    if study_instance_uid is not None:
        report["imagingStudy"] = [_study(study_instance_uid)]
    return report


def _conclusion(result: SlideResult) -> str:
    if not result.has_score or result.probabilities is None:
        return f"No score: {result.reason}. Research use; not cleared for diagnosis."
    decided = f"{result.decision}; " if result.decision else ""
    return (
        f"{decided}most probable {result.predicted}, probability {max(result.probabilities):.3f} by the model. "
        "Research use; not cleared for diagnosis."
    )


def _observations(result: SlideResult, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield _observation(common, "status", "Status of the score", {"valueString": result.status})
    for kind, values in (("probability", result.probabilities), ("calibrated", result.calibrated)):
        for index, value in enumerate(values or ()):
            shown = f"{kind.capitalize()} of {result.classes[index]}"
            yield _observation(common, f"{kind}-{index}", shown, {"valueQuantity": _share(value)})
    if result.threshold is not None:
        threshold = {"valueQuantity": _share(result.threshold)}
        yield _observation(common, "threshold", "Calibrated probability from which on it is positive", threshold)
    yield _decision(result, common)
    if result.quality is not None:
        yield _observation(common, "quality", "Fitness for scoring", {"valueString": result.quality.verdict})


def _decision(result: SlideResult, common: dict[str, Any]) -> dict[str, Any]:
    """The decision, or why there is none."""
    name = ("decision", "Decision by the calibrated threshold")
    if result.decision in INTERPRETATIONS:
        code, display = INTERPRETATIONS[result.decision]
        return _observation(
            common,
            *name,
            {
                "valueCodeableConcept": _concept(SYSTEM, result.decision, result.decision),
                "interpretation": [_concept(INTERPRETATION_SYSTEM, code, display)],
            },
        )
    absent = ("unsupported", "Unsupported") if result.has_score else ("not-performed", "Not Performed")
    found: dict[str, Any] = {"dataAbsentReason": _concept(ABSENT_SYSTEM, *absent)}
    if result.reason is not None:
        found["note"] = [{"text": result.reason}]
    return _observation(common, *name, found)


def _observation(common: dict[str, Any], code: str, display: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "resourceType": "Observation",
        **common,
        "category": [_concept(OBSERVATION_CATEGORY_SYSTEM, "imaging", "Imaging")],
        "code": _concept(SYSTEM, code, display),
        **found,
    }


def _share(value: float) -> dict[str, Any]:
    return {"value": value, "system": "http://unitsofmeasure.org", "code": "1", "unit": "1"}
