"""The heatmap as a DICOM secondary capture, for viewers that show nothing but pictures."""

from __future__ import annotations

import highdicom as hd
import numpy as np
from pydicom import Dataset

from s4mil_monai.outputs.dicom_object import ObjectKind, equipment_of, finish, identity_of
from s4mil_monai.outputs.dicom_source import DicomSource
from s4mil_monai.outputs.heatmap import HeatmapPicture, blend
from s4mil_monai.result import SlideResult

KIND = ObjectKind("heatmap", 902, "Heatmap")


def make_capture(result: SlideResult, source: DicomSource, picture: HeatmapPicture) -> Dataset:
    """The picture of ``heatmap.png`` with the spacing of its pixels."""
    image = source.image
    row_mm, column_mm = source.frame.spacing_mm
    made = hd.sc.SCImage(
        np.ascontiguousarray(np.asarray(blend(picture))),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="SLIDE",
        study_instance_uid=image.StudyInstanceUID,
        **identity_of(KIND, result, source),
        patient_id=image.PatientID,
        patient_name=image.PatientName,
        patient_birth_date=image.PatientBirthDate,
        patient_sex=image.PatientSex or None,
        accession_number=image.AccessionNumber,
        study_id=image.StudyID,
        study_date=image.StudyDate or None,
        study_time=image.StudyTime or None,
        referring_physician_name=image.ReferringPhysicianName,
        pixel_spacing=(
            round(row_mm * picture.px0_per_px[1], 12),
            round(column_mm * picture.px0_per_px[0], 12),
        ),
        container_identifier=image.ContainerIdentifier,
        specimen_descriptions=image.SpecimenDescriptionSequence,
    )
    made.PatientOrientation = None  # pyright: ignore[reportAttributeAccessIssue] - empty, as nobody lies here
    made.BurnedInAnnotation = "NO"
    equipment = equipment_of(result)
    made.ManufacturerModelName = equipment["manufacturer_model_name"]
    made.SoftwareVersions = equipment["software_versions"]
    return finish(made, KIND, source)
