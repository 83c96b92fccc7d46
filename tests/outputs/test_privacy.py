"""Who the patient is stays in the patient module of the DICOM objects, and nowhere else."""

from __future__ import annotations

import logging
import os
import shutil

import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image, ImageDraw

from s4mil_monai.outputs.dicom_source import PATIENT_AND_STUDY
from s4mil_monai.outputs.hospital import HospitalWriter
from s4mil_monai.scoring import load_scorer, score_to_folder
from tests.conftest import tissue_picture

SECRETS = ("Mustermann", "Zaphod", "HOSP-4711-XY", "19561224", "ACC0815", "Schwester Stefanie")
LABEL_RGB = (1, 2, 253)
"""A colour that only the label has."""


@pytest.fixture(scope="module")
def scorer(bundle):
    return load_scorer(bundle)


def svs_with_a_label(path):
    """An Aperio file whose description names a patient, with a label that shows the name."""
    label = Image.new("RGB", (256, 256), LABEL_RGB)
    ImageDraw.Draw(label).text((10, 10), "Mustermann Zaphod", fill=(255, 255, 255))
    description = (
        "Aperio Image Library v10\n1536x1280 [0,0 1536x1280] (256x256) JPEG/RGB Q=70"
        "|AppMag = 20|MPP = 0.5|Patient = Mustermann Zaphod|ID = HOSP-4711-XY|User = Schwester Stefanie"
    )
    picture = tissue_picture()
    with tifffile.TiffWriter(path) as file:
        options = {"photometric": "rgb", "compression": "jpeg", "tile": (256, 256), "metadata": None}
        file.write(picture, description=description, **options)
        file.write(picture[::2, ::2], description=description, subfiletype=1, **options)
        file.write(
            np.asarray(label),
            description="Aperio label Mustermann",
            subfiletype=1,
            photometric="rgb",
            metadata=None,
        )
    return path


def dicom_with_a_patient(source, folder):
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    os.chmod(folder, 0o755)
    for path in folder.iterdir():
        found = pydicom.dcmread(path)
        found.PatientName, found.PatientID = "Mustermann^Zaphod", "HOSP-4711-XY"
        found.PatientBirthDate, found.AccessionNumber = "19561224", "ACC0815"
        found.PatientComments = found.ImageComments = found.StudyDescription = "Mustermann Zaphod"
        found.SeriesDescription, found.OperatorsName = "Mustermann Zaphod", "Schwester Stefanie"
        found.BarcodeValue = found.LabelText = "Mustermann HOSP-4711-XY"
        found.SpecimenDescriptionSequence[0].SpecimenDetailedDescription = "skin of Mustermann"
        found.SpecimenDescriptionSequence[0].SpecimenShortDescription = "Mustermann"
        found.add_new(0x00091001, "UN", b"Zaphod")
        found.save_as(path)
    return folder


def bytes_outside_the_patient_module(path):
    """Of a DICOM object, all but the patient and study that it belongs to; of anything else, all."""
    data = path.read_bytes()
    if path.suffix != ".dcm":
        return data
    found = pydicom.dcmread(path)
    for keyword in PATIENT_AND_STUDY:
        if keyword in found:
            del found[keyword]
    return found.to_json(bulk_data_threshold=1 << 40).encode() + (found.get("PixelData") or b"")


@pytest.mark.parametrize("kind", ["svs", "svs with sidecar", "dicom"])
def test_no_output_names_the_patient(kind, scorer, tmp_path, request, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    if kind == "dicom":
        source = request.getfixturevalue("shared") / "slides/dicom_CMU-1-Small-Region"
        slide = dicom_with_a_patient(source, tmp_path / "slide")
    else:
        slide = svs_with_a_label(tmp_path / "slide.svs")
    if kind == "svs with sidecar":
        (tmp_path / "slide.dicom.json").write_text(
            '{"patient_name": "Mustermann^Zaphod", "patient_id": "HOSP-4711-XY",'
            ' "patient_birth_date": "1956-12-24", "accession_number": "ACC0815"}'
        )
    _, folder = score_to_folder(slide, scorer, tmp_path / "out", hospital=HospitalWriter())
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.name for path in written} >= {"result.json", "report.html", "fhir.json", "report.dcm"}
    for path in written:
        content = bytes_outside_the_patient_module(path)
        for secret in SECRETS:
            assert secret.encode() not in content, path.name
            assert secret not in str(path.relative_to(tmp_path))
    said = caplog.text + "".join(capfd.readouterr())
    assert [secret for secret in SECRETS if secret in said] == []
    if kind != "svs":  # the patient is where the PACS looks
        assert str(pydicom.dcmread(folder / "dicom" / "report.dcm").PatientName) == "Mustermann^Zaphod"


def test_no_picture_shows_the_label(scorer, tmp_path):
    slide = svs_with_a_label(tmp_path / "slide.svs")
    _, folder = score_to_folder(slide, scorer, tmp_path / "out", hospital=HospitalWriter())
    pixels = [np.asarray(Image.open(folder / "heatmap.png").convert("RGB"))]
    pixels += [pydicom.dcmread(folder / "dicom" / f"{name}.dcm").pixel_array for name in ("heatmap", "overview")]
    for found in pixels:
        distance = np.abs(found.reshape(-1, 3).astype(int) - LABEL_RGB).sum(1)
        assert distance.min() > 60


def test_search_finds_a_name_where_there_is_one(tmp_path):
    """The test above can fail."""
    found = pydicom.Dataset()
    found.PatientName, found.ImageComments = "Mustermann", "of Mustermann"
    found.SOPClassUID, found.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    assert bytes_outside_the_patient_module(tmp_path / "x.dcm").count(b"Mustermann") == 1
