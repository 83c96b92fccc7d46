"""The probable regions as a DICOM segmentation."""

from __future__ import annotations

import math

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from s4mil_monai.outputs.dicom_codes import MORPHOLOGY, class_code
from s4mil_monai.outputs.dicom_object import (
    ObjectKind,
    algorithm_of,
    equipment_of,
    finish,
    identity_of,
)
from s4mil_monai.outputs.dicom_raster import halve_while_large, place_raster, tile_size_of
from s4mil_monai.outputs.dicom_source import DicomSource
from s4mil_monai.outputs.geojson import REGION_THRESHOLD
from s4mil_monai.outputs.heatmap import shown_class
from s4mil_monai.outputs.identity import make_uid
from s4mil_monai.result import SlideResult

KIND = ObjectKind("segmentation", 904, "Probable regions")

FINEST_PART = 16
"""Of a patch's side: where patches overlap, pixels of the segmentation are not smaller than this part."""


def make_segmentations(result: SlideResult, source: DicomSource) -> list[Dataset]:
    """Where patches are at least as probable as the threshold, one segment, in place on the slide.

    Where that is more than a tile, coarser levels of a pyramid follow: a pixel of theirs is set where any was.
    """
    finest, pitch_px0 = lay_regions(result)
    levels = halve_while_large(finest, lambda blocks: blocks.max(-1), beyond=0)
    made = []
    for number, pixels in enumerate(levels):
        pitch = pitch_px0 * 2**number
        identity = identity_of(KIND, result, source, level=number, levels=len(levels))
        made.append(
            _make_level(result, source, pixels, place_raster(source, pitch, centre_px0=pitch / 2), identity)
        )
    return made


def _make_level(
    result: SlideResult, source: DicomSource, pixels: NDArray[np.uint8], placed: dict, identity: dict
) -> Dataset:
    shown = result.classes[shown_class(result)]
    said = f"p({shown}) >= {REGION_THRESHOLD:g}"
    made = hd.seg.Segmentation(
        [source.image],
        pixels[None],
        "BINARY",
        [_describe_segment(result, said, identity["series_instance_uid"])],
        **identity,
        **equipment_of(result),
        content_label="REGIONS",
        content_description=f"Patches with {said}"[:64],
        **placed,
        tile_pixel_array=True,
        tile_size=tile_size_of(pixels),
        dimension_organization_type="TILED_SPARSE",
        omit_empty_frames=bool(pixels.any()),
    )
    made.PatientOrientation = None
    return finish(made, KIND, source)


def _describe_segment(result: SlideResult, said: str, series_instance_uid: str) -> hd.seg.SegmentDescription:
    shown = shown_class(result)
    return hd.seg.SegmentDescription(
        segment_number=1,
        segment_label=result.classes[shown][:64],
        segmented_property_category=MORPHOLOGY,
        segmented_property_type=class_code(result, shown),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm_of(result),
        tracking_uid=make_uid("segment", series_instance_uid),
        tracking_id=said[:64],
    )


def lay_regions(result: SlideResult) -> tuple[NDArray[np.uint8], float]:
    """Raster of the probable patches from the scan's corner on, and its pitch in level-0 pixels.

    Without overlap a pixel is a patch. With it, a pixel is the largest square of which patch and stride are whole
    multiples, so that the union of patches is exact.
    """
    assert result.patches is not None
    side_px, overlap_px = result.settings.side_px, result.settings.overlap_px
    parts = side_px // max(math.gcd(side_px, overlap_px), math.ceil(side_px / FINEST_PART))
    pitch_px0 = result.patches.side_px0 / parts
    corners = np.rint(np.array(result.patches.top_left_px0) / pitch_px0).astype(int)
    width, height = corners.max(0) + parts
    pixels = np.zeros((height, width), np.uint8)
    probable = np.array(result.patches.probabilities)[:, shown_class(result)] >= REGION_THRESHOLD
    for column, row in corners[probable]:
        pixels[row : row + parts, column : column + parts] = 1
    return pixels, pitch_px0
