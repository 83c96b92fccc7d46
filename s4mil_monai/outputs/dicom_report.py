"""The score as a DICOM structured report (TID 1500), with the regions and patches it rests on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from highdicom import sr
from pydicom import Dataset
from pydicom.sr.codedict import codes

from s4mil_monai import __version__
from s4mil_monai.outputs.dicom_annotations import DECIDING, outline
from s4mil_monai.outputs.dicom_codes import (
    DECISION,
    DECISIONS,
    LARGEST,
    NO_UNITS,
    PATCH_PROBABILITY,
    PREDICTED,
    PROCEDURE,
    QUALITY,
    REASON,
    SHARE,
    STATUS,
    THRESHOLD,
    class_code,
    code,
    model_code,
    reason_code,
)
from s4mil_monai.outputs.dicom_object import MANUFACTURER, ObjectKind, finish, identity_of
from s4mil_monai.outputs.dicom_source import DicomSource
from s4mil_monai.outputs.geojson import DECIDING_SHOWN, find_regions
from s4mil_monai.outputs.heatmap import shown_class
from s4mil_monai.outputs.identity import make_uid
from s4mil_monai.result import SlideResult

KIND = ObjectKind("report", 901, "Slide score")

REGIONS_SHOWN = 20
"""Largest regions that are reported; all patches are in the annotations."""


def make_structured_report(result: SlideResult, source: DicomSource) -> Dataset:
    """Score, decision, thresholds, model, and by coordinates the regions and patches behind them."""
    identity = identity_of(KIND, result, source)
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=_observer(result)),
        procedure_reported=PROCEDURE,
        imaging_measurements=[_slide_level(result, identity), *_regions(result, source, identity)],
        title=codes.DCM.ImagingMeasurementReport,
        referenced_images=[source.image],
    )
    made = sr.Comprehensive3DSR(evidence=[source.image], content=content, **identity, is_complete=True)
    return finish(made, KIND, source)


def _observer(result: SlideResult) -> sr.ObserverContext:
    return sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=make_uid("device", result.model.sha256, __version__),
            name=f"s4mil_monai {__version__}",
            manufacturer_name=MANUFACTURER,
            model_name=result.model.bundle,
            serial_number=result.model.sha256[:16] or "none",
        ),
    )


def _algorithm(result: SlideResult) -> sr.AlgorithmIdentification:
    settings = json.dumps(result.settings.model_dump(), sort_keys=True)
    parameters = [
        f"model SHA-256 {result.model.sha256}",
        f"encoder {result.encoder.name}, SHA-256 {result.encoder.sha256}",
        f"patches {settings}",
        f"resolution {result.slide.mpp:g} micrometres per level-0 pixel, from {result.slide.mpp_source}",
        f"intended use: {result.model.intended_use}",
    ]
    return sr.AlgorithmIdentification(
        name=result.model.bundle, version=result.model.version or "none", parameters=parameters
    )


def _slide_level(result: SlideResult, identity: dict) -> sr.MeasurementsAndQualitativeEvaluations:
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(identity, "slide"),
        algorithm_id=_algorithm(result),
        measurements=list(_probabilities(result)) or None,
        qualitative_evaluations=list(_judgements(result)),
    )


def _probabilities(result: SlideResult) -> Iterator[sr.Measurement]:
    for kind, values in (("probability", result.probabilities), ("calibrated", result.calibrated)):
        for index, value in enumerate(values or ()):
            name = model_code(result, f"{kind.capitalize()} of {result.classes[index]}")
            yield sr.Measurement(name=name, value=value, unit=NO_UNITS)
    if result.threshold is not None:
        yield sr.Measurement(name=THRESHOLD, value=result.threshold, unit=NO_UNITS)


def _judgements(result: SlideResult) -> Iterator[sr.QualitativeEvaluation]:
    yield sr.QualitativeEvaluation(STATUS, code(result.status, result.status))
    if result.predicted is not None:
        best = result.classes.index(result.predicted)
        yield sr.QualitativeEvaluation(PREDICTED, class_code(result, best))
    if result.decision is not None:
        yield sr.QualitativeEvaluation(DECISION, DECISIONS[result.decision])
    if result.reason is not None:
        yield sr.QualitativeEvaluation(REASON, reason_code(result.reason))
    if result.quality is not None:
        yield sr.QualitativeEvaluation(QUALITY, code(f"q-{result.quality.verdict}", result.quality.verdict))


def _regions(
    result: SlideResult, source: DicomSource, identity: dict
) -> Iterator[sr.PlanarROIMeasurementsAndQualitativeEvaluations]:
    shown = class_code(result, shown_class(result))
    found = sorted(find_regions(result), key=lambda region: -region.polygon.area)[:REGIONS_SHOWN]
    for number, region in enumerate(found, start=1):
        points_px0 = np.array(region.polygon.exterior.coords)
        measured = sr.Measurement(name=LARGEST, value=region.largest, unit=NO_UNITS)
        yield _planar(f"region {number}", points_px0, shown, [measured], source, identity)
    if result.predicted is None or result.patches is None:
        return
    best = result.classes.index(result.predicted)
    for rank, patch in enumerate(result.deciding_patches[:DECIDING_SHOWN], start=1):
        corners = outline(patch.top_left_px0, result.patches.side_px0)
        probability = result.patches.probabilities[patch.index][shown_class(result)]
        measured_all = [
            sr.Measurement(name=SHARE, value=patch.contributions[best], unit=NO_UNITS),
            sr.Measurement(name=PATCH_PROBABILITY, value=probability, unit=NO_UNITS),
        ]
        closed = np.concatenate((corners, corners[:1]))
        yield _planar(f"deciding patch {rank}", closed, DECIDING, measured_all, source, identity)


def _planar(
    name: str,
    points_px0: np.ndarray,
    finding: sr.CodedConcept,
    measurements: list[sr.Measurement],
    source: DicomSource,
    identity: dict,
) -> sr.PlanarROIMeasurementsAndQualitativeEvaluations:
    region = sr.ImageRegion3D(
        graphic_type="POLYGON",
        graphic_data=source.frame.to_mm(points_px0),
        frame_of_reference_uid=source.image.FrameOfReferenceUID,
    )
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(identity, name),
        referenced_region=region,
        finding_type=finding,
        measurements=measurements,
    )


def _tracking(identity: dict, name: str) -> sr.TrackingIdentifier:
    return sr.TrackingIdentifier(uid=make_uid("tracking", identity["sop_instance_uid"], name), identifier=name)
