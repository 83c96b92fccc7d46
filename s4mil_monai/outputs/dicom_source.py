"""What DICOM results refer to: an image of the slide that a PACS has, with its patient, study and frame.

A DICOM slide is its own. Of any other file there is no DICOM image, so an overview of it is made one, and written
with the results; nothing refers to an image that does not exist.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pydicom.errors import BytesLengthException
from pydicom.sequence import Sequence

from s4mil_monai.errors import SlideError
from s4mil_monai.outputs.dicom_frame import SlideFrame
from s4mil_monai.outputs.dicom_overview import make_overview
from s4mil_monai.outputs.dicom_study import StudyAttributes
from s4mil_monai.outputs.heatmap import HeatmapPicture
from s4mil_monai.outputs.identity import make_uid
from s4mil_monai.result import SlideResult
from s4mil_monai.slides.dicom_header import WHOLE_SLIDE, quiet_pydicom, read_header
from s4mil_monai.slides.slide import Slide

PATIENT_AND_STUDY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
"""What results take over from their source; highdicom wants each, if only empty."""

IMAGE = (
    *("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("FrameOfReferenceUID", "PositionReferenceIndicator", "Modality", "ImageType", "Rows", "Columns"),
    *("NumberOfFrames", "DimensionOrganizationType", "TotalPixelMatrixRows", "TotalPixelMatrixColumns"),
    *("TotalPixelMatrixOriginSequence", "ImageOrientationSlide", "SharedFunctionalGroupsSequence"),
    *("TotalPixelMatrixFocalPlanes", "ContainerIdentifier", "ContainerTypeCodeSequence"),
    "IssuerOfTheContainerIdentifierSequence",
)
"""What is kept of a source image. Free text, private tags, label and acquisition are not."""

NEEDED = (
    *("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality"),
    *("Rows", "Columns", "NumberOfFrames", "TotalPixelMatrixRows", "ImageOrientationSlide"),
    "TotalPixelMatrixOriginSequence.XOffsetInSlideCoordinateSystem",
    "TotalPixelMatrixOriginSequence.YOffsetInSlideCoordinateSystem",
    "SharedFunctionalGroupsSequence.PixelMeasuresSequence.PixelSpacing",
)
"""Without these, inner ones in the first item of a sequence, nothing can refer to an image, or say where on it."""

DAMAGE = (
    *(AttributeError, LookupError, NotImplementedError, TypeError, ValueError),
    *(struct.error, BytesLengthException),
)
"""What pydicom and highdicom raise of values that cannot be meant."""

SLIDE_COORDINATES = (0.0, -1.0, 0.0, -1.0, 0.0, 0.0)
"""Orientation of a slide held with its label at the top, scanned upright."""

UNLINKED_NAME = "NOT^LINKED"
"""Patient of a slide of whom nothing says whose it is."""


@dataclass(frozen=True)
class DicomSource:
    """A slide as results refer to it."""

    image: Dataset
    """Header of the image that is referred to, without pixels."""
    frame: SlideFrame
    linked: bool
    """Whether study and patient are those of the slide; otherwise they are made up, and say so."""
    overview: Dataset | None = None
    """The image itself, where it has to be written with the results."""

    @property
    def belongs_to(self) -> tuple[str, ...]:
        """Image, patient, study, glass slide and specimens, as the objects have them."""
        return _belongs_to(self.image)


def find_source(
    slide: Slide, result: SlideResult, picture: HeatmapPicture, study: StudyAttributes | None = None
) -> DicomSource:
    """The image that results of a slide refer to.

    Args:
        slide: The open slide.
        result: What came of it.
        picture: As :func:`s4mil_monai.outputs.heatmap.write_heatmap` gives it; becomes the overview of a file.
        study: Patient and study of a slide that is no DICOM; None marks the results as not linked.

    Raises:
        SlideError: The slide is DICOM, and its headers lack something, cannot be understood, or contradict how its
            pixels were read.
    """
    with quiet_pydicom():
        with header_understood(slide.name):
            instances = _volume_instances(slide.path)
            if instances:
                return _source_of_dicom(slide, result, instances)
        return _source_of_file(result, picture, study)


@contextmanager
def header_understood(name: str) -> Iterator[None]:
    """Values of a DICOM header that a library cannot take are an error of the slide, without quoting them.

    Raises:
        SlideError: A library could not.
    """
    try:
        yield
    except DAMAGE as error:
        raise SlideError(name, f"its DICOM header cannot be understood ({type(error).__name__})") from error


def _source_of_dicom(slide: Slide, result: SlideResult, instances: list[Dataset]) -> DicomSource:
    level0 = max(instances, key=lambda found: int(found.TotalPixelMatrixColumns))
    image = _complete(_keep(level0), slide.name)
    size = (int(image.TotalPixelMatrixColumns), int(image.TotalPixelMatrixRows))
    if size != tuple(result.slide.size_px0):
        raise SlideError(
            slide.name,
            f"its DICOM headers have {size[0]} x {size[1]} pixels, {result.slide.backend} read "
            f"{result.slide.size_px0[0]} x {result.slide.size_px0[1]}",
        )
    return DicomSource(image, _frame_of(image, slide.name), linked=True)


def _volume_instances(path: Path) -> list[Dataset]:
    """Headers of the slide's pyramid levels; nothing where it is no DICOM."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [header for file in files if (header := _read_header(file)) is not None]
    if not path.is_dir() and found:
        beside = (_read_header(file) for file in sorted(path.parent.iterdir()) if file != path)
        series = found[0].get("SeriesInstanceUID")
        found += [header for header in beside if header is not None and header.get("SeriesInstanceUID") == series]
    return [header for header in found if "VOLUME" in (header.get("ImageType") or ())]


def _read_header(file: Path) -> Dataset | None:
    header = read_header(file) if file.is_file() else None
    if header is None or header.SOPClassUID != WHOLE_SLIDE or "TotalPixelMatrixColumns" not in header:
        return None
    return header


def _keep(header: Dataset) -> Dataset:
    image = Dataset()
    for keyword in (*IMAGE, *PATIENT_AND_STUDY):
        if keyword in header:
            image.add(header[keyword])
    image.SpecimenDescriptionSequence = _keep_specimens(header)
    return image


def _keep_specimens(header: Dataset) -> Sequence:
    """Identifiers of the specimens; how they were described and prepared is free text and stays behind."""
    kept = ("SpecimenIdentifier", "SpecimenUID", "IssuerOfTheSpecimenIdentifierSequence")
    specimens = []
    for found in header.get("SpecimenDescriptionSequence", []):
        specimen = Dataset()
        for keyword in kept:
            if keyword in found:
                specimen.add(found[keyword])
        specimens.append(specimen)
    return Sequence(specimens)


def _complete(image: Dataset, name: str) -> Dataset:
    """Give a source what the standard requires and real files lack; empty where only the hospital knows it."""
    for keyword in PATIENT_AND_STUDY:
        if keyword not in image:
            setattr(image, keyword, "")
    if not image.get("SpecificCharacterSet"):
        image.pop("SpecificCharacterSet", None)  # empty is ASCII to the standard, and an error to highdicom
    if not image.get("TotalPixelMatrixOriginSequence"):
        # every result shares the frame of reference of this image, so any origin keeps them in place on it
        origin = Dataset()
        origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 0.0, 0.0
        image.TotalPixelMatrixOriginSequence = Sequence([origin])
    for place in NEEDED:
        if _find(image, place) in (None, ""):
            raise SlideError(name, f"its DICOM header has no {place}, so results cannot refer to it")
    image.setdefault("ContainerIdentifier", "UNKNOWN")
    for keyword in ("IssuerOfTheContainerIdentifierSequence", "ContainerTypeCodeSequence"):
        image.setdefault(keyword, Sequence())
    if not image.SpecimenDescriptionSequence:
        unknown = _specimen("UNKNOWN", make_uid("specimen", image.SOPInstanceUID))
        image.SpecimenDescriptionSequence = Sequence([unknown])
    for specimen in image.SpecimenDescriptionSequence:
        specimen.SpecimenPreparationSequence = Sequence()
    return image


def _find(image: Dataset, place: str) -> Any:
    """The value at a place such as ``Sequence.Keyword``, in the first item of the sequence; None without it."""
    *sequences, keyword = place.split(".")
    for sequence in sequences:
        items = image.get(sequence)
        if not items:
            return None
        image = items[0]
    return image.get(keyword)


def _frame_of(image: Dataset, name: str) -> SlideFrame:
    """Where level 0 lies.

    Raises:
        SlideError: A position, a direction or a spacing is not what can be meant.
    """
    origin = image.TotalPixelMatrixOriginSequence[0]
    x, y = origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem
    origin_mm = _numbers((x, y, origin.get("ZOffsetInSlideCoordinateSystem") or 0))
    orientation = _numbers(image.ImageOrientationSlide)
    spacing_mm = _numbers(image.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing)
    if len(orientation) != 6:
        found = f"an ImageOrientationSlide of {len(orientation)} numbers"
        raise SlideError(name, f"its DICOM header has {found}, not 6")
    if len(spacing_mm) != 2 or min(spacing_mm) <= 0:
        raise SlideError(name, "its DICOM header has a PixelSpacing that is not two positive numbers")
    return SlideFrame((origin_mm[0], origin_mm[1], origin_mm[2]), orientation, (spacing_mm[0], spacing_mm[1]))


def _numbers(values: Iterable[Any]) -> tuple[float, ...]:
    found = tuple(float(value) for value in values)
    if not all(math.isfinite(value) for value in found):
        raise ValueError("not finite")
    return found


def _source_of_file(result: SlideResult, picture: HeatmapPicture, study: StudyAttributes | None) -> DicomSource:
    linked = study is not None and study.names_study
    sha256, spacing_mm = result.slide.sha256, result.slide.mpp / 1000
    # 25 mm is a slide's width; a scan seldom starts at its very edge, and where it did is not known
    frame = SlideFrame((25.0, 50.0, 0.0), SLIDE_COORDINATES, (spacing_mm, spacing_mm))
    image = Dataset()
    image.SpecificCharacterSet = "ISO_IR 192"
    _set_patient(image, study if study is not None and linked else None, sha256)
    image.FrameOfReferenceUID = make_uid("frame", sha256, str(result.slide.mpp))
    image.ContainerIdentifier = (study.container_id if study else "") or "UNKNOWN"
    specimen = _specimen((study.specimen_id if study else "") or "UNKNOWN", make_uid("specimen", sha256))
    image.SpecimenDescriptionSequence = Sequence([specimen])
    image.SOPInstanceUID = make_uid("overview", sha256, str(result.slide.mpp), *_belongs_to(image))
    image.SeriesInstanceUID = make_uid("overview series", image.SOPInstanceUID)
    overview = make_overview(picture, image, frame)
    return DicomSource(_complete(_keep(overview), "overview"), frame, linked=linked, overview=overview)


def _belongs_to(image: Dataset) -> tuple[str, ...]:
    named = ("SOPInstanceUID", "StudyInstanceUID", *PATIENT_AND_STUDY, "ContainerIdentifier")
    specimens = (str(found.get("SpecimenIdentifier", "")) for found in image.SpecimenDescriptionSequence)
    return (*(str(image.get(keyword) or "") for keyword in named), *specimens)


def _specimen(identifier: str, uid: str) -> Dataset:
    specimen = Dataset()
    specimen.SpecimenIdentifier, specimen.SpecimenUID = identifier, uid
    specimen.IssuerOfTheSpecimenIdentifierSequence = Sequence()
    specimen.SpecimenPreparationSequence = Sequence()
    return specimen


def _set_patient(image: Dataset, study: StudyAttributes | None, sha256: str) -> None:
    """Patient and study of the attributes; without them, a patient of its own for each slide, that says so."""
    if study is None:
        study = StudyAttributes(patient_id=f"UNLINKED-{sha256[:12].upper()}", patient_name=UNLINKED_NAME)
    image.PatientID, image.PatientName = study.patient_id, study.patient_name
    image.PatientBirthDate, image.PatientSex = study.patient_birth_date, study.patient_sex
    image.AccessionNumber, image.StudyID = study.accession_number, study.study_id
    image.StudyDate, image.StudyTime = study.study_date, study.study_time
    image.ReferringPhysicianName = ""
    image.StudyInstanceUID = study.study_instance_uid or make_uid(
        "study", study.patient_id, study.accession_number or sha256
    )
