"""All DICOM results of one slide, in the study of the slide."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from pydicom import Dataset

from s4mil_monai.outputs import dicom_annotations, dicom_capture, dicom_map, dicom_report, dicom_segmentation
from s4mil_monai.outputs.dicom_object import write_object
from s4mil_monai.outputs.dicom_source import DicomSource
from s4mil_monai.outputs.heatmap import HeatmapPicture
from s4mil_monai.result import SlideResult
from s4mil_monai.slides.dicom_header import quiet_pydicom


def write_dicom(
    result: SlideResult,
    source: DicomSource,
    picture: HeatmapPicture,
    folder: Path,
    *,
    written: datetime | None = None,
) -> list[Path]:
    """Write every DICOM object that a result gives into a folder of its own.

    A result without a score gives the report and the picture only.

    Args:
        result: Of the slide.
        source: What the objects refer to.
        picture: As :func:`s4mil_monai.outputs.heatmap.write_heatmap` gives it.
        folder: Made if it is not there.
        written: When, for the dates of the objects; now by default.
    """
    written = written or datetime.now(timezone.utc)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_pydicom():
        made = make_objects(result, source, picture)
        paths = [folder / f"{name}.dcm" for name in made]
        for path, found in zip(paths, made.values(), strict=True):
            write_object(found, path, written=written)
    return paths


def make_objects(result: SlideResult, source: DicomSource, picture: HeatmapPicture) -> dict[str, Dataset]:
    """The objects by name."""
    made = {
        dicom_report.KIND.name: dicom_report.make_structured_report(result, source),
        dicom_capture.KIND.name: dicom_capture.make_capture(result, source, picture),
    }
    if result.has_score:
        made[dicom_annotations.KIND.name] = dicom_annotations.make_annotations(result, source)
        made |= _name_levels(dicom_map.KIND.name, dicom_map.make_parametric_maps(result, source))
        made |= _name_levels(dicom_segmentation.KIND.name, dicom_segmentation.make_segmentations(result, source))
    if source.overview is not None:
        made["overview"] = source.overview
    return made


def _name_levels(name: str, levels: list[Dataset]) -> dict[str, Dataset]:
    """The finest level has the name, the others a number as well."""
    return {f"{name}_{number}" if number else name: level for number, level in enumerate(levels)}
