"""Probable and deciding patches as DICOM bulk annotations, for viewers that draw many outlines."""

from __future__ import annotations

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from s4mil_monai.outputs.dicom_codes import MORPHOLOGY, NO_UNITS, PATCH_PROBABILITY, SHARE, class_code, code
from s4mil_monai.outputs.dicom_object import ObjectKind, algorithm_of, equipment_of, finish, identity_of
from s4mil_monai.outputs.dicom_source import DicomSource
from s4mil_monai.outputs.geojson import REGION_THRESHOLD
from s4mil_monai.outputs.heatmap import shown_class
from s4mil_monai.outputs.identity import make_uid
from s4mil_monai.result import SlideResult

KIND = ObjectKind("annotations", 905, "Probable and deciding patches")

DECIDING = code("deciding", "Patch that decided the score")


def make_annotations(result: SlideResult, source: DicomSource) -> Dataset:
    """All probable patches with their probability, all deciding patches with their share of the logit."""
    identity = identity_of(KIND, result, source)
    instance = identity["sop_instance_uid"]
    made_groups = (_probable(result, source, instance), _deciding(result, source, instance))
    groups = [group for group in made_groups if group is not None]
    for number, group in enumerate(groups, start=1):
        group.AnnotationGroupNumber = number
    made = hd.ann.MicroscopyBulkSimpleAnnotations(
        [source.image],
        annotation_coordinate_type="3D",
        annotation_groups=groups,
        **identity,
        **equipment_of(result),
        content_label="PATCHES",
        content_description="Probable and deciding patches",
    )
    return finish(made, KIND, source)


def outline(corner_px0: tuple[int, int], side_px0: float) -> NDArray[np.float64]:
    """(4, 2) corners of a patch in level-0 pixels, clockwise from the top left."""
    x, y = corner_px0
    return np.array([(x, y), (x + side_px0, y), (x + side_px0, y + side_px0), (x, y + side_px0)])


def _probable(result: SlideResult, source: DicomSource, instance: str) -> hd.ann.AnnotationGroup | None:
    assert result.patches is not None
    shown = shown_class(result)
    rows = zip(result.patches.top_left_px0, result.patches.probabilities, strict=True)
    found = [(corner, row[shown]) for corner, row in rows if row[shown] >= REGION_THRESHOLD]
    if not found:
        return None
    return hd.ann.AnnotationGroup(
        number=1,
        uid=make_uid("probable patches", instance),
        label=f"p({result.classes[shown]}) >= {REGION_THRESHOLD:g}"[:64],
        annotated_property_category=MORPHOLOGY,
        annotated_property_type=class_code(result, shown),
        **_drawn([corner for corner, _ in found], result, source),
        measurements=[_measured(PATCH_PROBABILITY, [probability for _, probability in found])],
    )


def _deciding(result: SlideResult, source: DicomSource, instance: str) -> hd.ann.AnnotationGroup | None:
    if result.predicted is None or not result.deciding_patches:
        return None
    best = result.classes.index(result.predicted)
    return hd.ann.AnnotationGroup(
        number=1,
        uid=make_uid("deciding patches", instance),
        label="Deciding patches",
        annotated_property_category=MORPHOLOGY,
        annotated_property_type=DECIDING,
        **_drawn([patch.top_left_px0 for patch in result.deciding_patches], result, source),
        measurements=[_measured(SHARE, [patch.contributions[best] for patch in result.deciding_patches])],
    )


def _drawn(corners: list[tuple[int, int]], result: SlideResult, source: DicomSource) -> dict:
    """Outlines in mm. Polygons, because not every reader knows rectangles."""
    assert result.patches is not None
    side = result.patches.side_px0
    return {
        "graphic_type": "POLYGON",
        "graphic_data": [source.frame.to_mm(outline(corner, side)) for corner in corners],
        "algorithm_type": "AUTOMATIC",
        "algorithm_identification": algorithm_of(result),
    }


def _measured(name: hd.sr.CodedConcept, values: list[float]) -> hd.ann.Measurements:
    return hd.ann.Measurements(name=name, values=np.array(values, np.float32), unit=NO_UNITS)
