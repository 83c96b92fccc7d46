"""A folder into which anything may have been put."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage

from s4mil_monai.slides.dicom_header import quiet_pydicom
from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.mixed_folder import survey_folder
from tests.slides.test_folder import touch, without_rights


def write_dicom_file(path, *, sop_class=CTImageStorage, series="1.2.4"):
    found = pydicom.Dataset()
    found.SOPClassUID, found.SOPInstanceUID, found.SeriesInstanceUID = sop_class, "1.2.3", series
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.save_as(path, enforce_file_format=True)


def names_of(survey, folder):
    return sorted(str(slide.path.relative_to(folder)) for slide in survey.slides)


def test_series_alone_in_its_folder_is_that_folder(dicom_slide, tmp_path):
    shutil.copytree(dicom_slide, tmp_path / "in" / "case")
    survey = survey_folder(tmp_path / "in", tmp_path / "staging")
    assert names_of(survey, tmp_path / "in") == ["case"]
    assert not (tmp_path / "staging").exists()
    assert survey.passed_over == {}


def test_series_that_share_a_folder_are_told_apart_whatever_their_files_are_called(dicom_slide, tmp_path):
    (tmp_path / "in").mkdir()
    for number in (1, 2):
        level = pydicom.dcmread(next(dicom_slide.iterdir()))
        level.SeriesInstanceUID = f"1.2.{number}"
        level.SOPInstanceUID = level.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number}.1"
        level.save_as(tmp_path / "in" / f"IM{number:05d}")
    survey = survey_folder(tmp_path / "in", tmp_path / "staging")
    assert [found.path.name for found in survey.slides] == ["1.2.1", "1.2.2"]
    for found in survey.slides:
        with open_isolated(found.path) as slide:
            assert slide.size_px0 == (1536, 1280)


def test_everything_else_is_passed_over_with_a_reason(tissue_slide, tmp_path):
    source = tmp_path / "in"
    (source / "empty").mkdir(parents=True)
    (source / ".hidden").mkdir()
    shutil.copy(tissue_slide, source / "good.tif")
    (source / "good.dicom.json").write_text("{}")  # belongs to the slide
    write_dicom_file(source / "ct")
    (source / "damaged.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 40)
    (source / "README").write_text("hello")
    survey = survey_folder(source, tmp_path / "staging")
    assert names_of(survey, source) == ["good.tif"]
    assert survey.passed_over == {
        "ct": "DICOM, CT Image, not a whole slide image",
        "damaged.dcm": "damaged DICOM, not a whole slide image",
        "README": "a file without a suffix is no slide format",
        "empty": "the folder is empty",
    }


@pytest.mark.parametrize("name", ["slide", "S24.1"])
def test_data_beside_an_mrxs_file_are_part_of_it(tmp_path, name):
    (tmp_path / "in" / name / "deeper").mkdir(parents=True)
    (tmp_path / "in" / f"{name}.mrxs").write_bytes(b"x")
    for data in ("Data0000.dat", "deeper/Data0001.dat"):
        (tmp_path / "in" / name / data).write_bytes(b"x")
    survey = survey_folder(tmp_path / "in", tmp_path / "staging")
    assert (names_of(survey, tmp_path / "in"), survey.passed_over) == ([f"{name}.mrxs"], {})


def test_series_in_two_places_is_two_slides_with_the_instances_of_each(tmp_path):
    for place, name in (("a", "IM1"), ("b", "IM1"), ("b", "IM2")):
        (tmp_path / "in" / place).mkdir(parents=True, exist_ok=True)
        write_dicom_file(tmp_path / "in" / place / name, sop_class=VLWholeSlideMicroscopyImageStorage)
        (tmp_path / "in" / place / "note.txt").touch()
    survey = survey_folder(tmp_path / "in", tmp_path / "staging")
    assert [sorted(link.resolve() for link in slide.path.iterdir()) for slide in survey.slides] == [
        [tmp_path / "in" / "a" / "IM1"],
        [tmp_path / "in" / "b" / "IM1", tmp_path / "in" / "b" / "IM2"],
    ]


@pytest.mark.parametrize("series", ["../../escaped", "..", "", None])
def test_series_named_by_what_is_no_uid_gets_no_folder(tmp_path, series):
    (tmp_path / "in").mkdir()
    with quiet_pydicom():
        write_dicom_file(tmp_path / "in" / "IM1", sop_class=VLWholeSlideMicroscopyImageStorage, series=series)
    survey = survey_folder(tmp_path / "in", tmp_path / "staging")
    assert survey.slides == []
    assert survey.passed_over == {"IM1": "DICOM whose series is named by what is no UID"}
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_link_that_leads_back_or_nowhere_stops_nothing(tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in" / "deeper" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "gone.svs").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in" / "pipe")
    survey = survey_folder(tmp_path / "in", tmp_path / "staging")
    assert names_of(survey, tmp_path / "in") == ["gone.svs"]  # and fails, by name
    assert survey.passed_over == {
        "gone": "cannot be read",
        "pipe": "a file without a suffix is no slide format",
    }


def test_folder_that_cannot_be_looked_into_is_a_slide_that_fails_and_not_one_that_is_missed():
    with TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        touch(folder, "a.svs", "closed/b.svs")
        folder.chmod(0o755)
        (folder / "closed").chmod(0)
        try:
            with without_rights():
                survey = survey_folder(folder, folder / "staging")
        finally:
            (folder / "closed").chmod(0o755)
    assert names_of(survey, folder) == ["a.svs", "closed"]
