"""The MONAI Deploy application, as an integrator tries it: a process of its own, a folder of mixed files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest
from PIL import Image
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from s4mil_monai.models.manifest import stage_models, verify_models, write_manifest
from s4mil_monai.outputs.hospital import HospitalWriter
from s4mil_monai.scoring import load_scorer, score_to_folder
from s4mil_monai.slides.overrides import read_overrides
from s4mil_monai.slides.pyramid import write_pyramid
from tests.conftest import tissue_picture

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {"result.json", "heatmap.png", "regions.geojson", "features.h5", "report.html", "fhir.json", "dicom"}


def run_app(*arguments, program=("-m", "deploy.app"), environment=None, cwd=ROOT):
    command = [sys.executable, *program, *map(str, arguments)]
    settings = {**os.environ, **(environment or {})}
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def models(bundle, tmp_path_factory):
    return stage_models(bundle, tmp_path_factory.mktemp("staged") / "models").bundle.parent


def write_ct(path):
    found = pydicom.Dataset()
    found.SOPClassUID, found.SOPInstanceUID, found.SeriesInstanceUID = CTImageStorage, "1.2.3", "1.2.4"
    found.PatientName = "Mustermann^Zaphod"
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def trial(tissue_slide, dicom_slide, models, tmp_path_factory):
    """Two good slides, a JPEG, a truncated slide, a radiology image, an empty folder; and what came out."""
    folder = tmp_path_factory.mktemp("trial")
    source = folder / "in"
    (source / "empty").mkdir(parents=True)
    write_pyramid(tissue_picture(), source / "good.tif", mpp=None)  # the site's table knows its resolution
    (folder / "site.csv").write_text("slide,scanner,mpp\ngood.tif,,0.5\n")
    (folder / "studies.csv").write_text("slide,patient_id\ngood.tif,P12\n")
    for instance in dicom_slide.iterdir():  # as a gateway delivers it: beside other things, without a suffix
        shutil.copy(instance, source / instance.stem)
    (source / "cut.svs").write_bytes(tissue_slide.read_bytes()[:100_000])
    Image.new("RGB", (64, 64)).save(source / "holiday.jpg")
    write_ct(source / "ct.dcm")
    tables = {"S4MIL_RESOLUTIONS": str(folder / "site.csv"), "S4MIL_STUDIES": str(folder / "studies.csv")}
    ran = run_app("-i", source, "-o", folder / "out", "-m", models, environment=tables)
    return source, folder / "out", ran


def rows_of(out):
    summary = json.loads((out / "summary.json").read_text())
    return {row["slide"]: row for row in summary["slides"]}, {
        row["path"]: row["reason"] for row in summary["passed_over"]
    }


def test_good_slides_are_complete_and_the_others_are_named_with_reasons(trial):
    _, out, ran = trial
    slides, passed_over = rows_of(out)
    good = {name: row for name, row in slides.items() if row["status"] == "scored"}
    assert len(good) == 2
    for row in good.values():
        assert {path.name for path in (out / row["folder"]).iterdir()} == WHOLE
    assert pydicom.dcmread(out / "good" / "dicom" / "report.dcm").PatientID == "P12"
    assert {row["file"] for row in slides.values()} == {"good.tif", "cut.svs", "level0"}
    assert "the file ends after 100,000 bytes" in slides["cut.svs"]["reason"]
    assert passed_over == {
        "ct.dcm": "DICOM, CT Image, not a whole slide image",
        "holiday.jpg": ".jpg is no slide format",
        "empty": "the folder is empty",
    }
    assert ran.returncode == 1
    assert {path.name for path in out.iterdir()} == {"summary.json", *(row["folder"] for row in good.values())}


def test_app_gives_the_result_of_s4mil_score(trial, models, dicom_slide, tmp_path):
    source, out, _ = trial
    scorer = load_scorer(next(models.iterdir()))
    series = pydicom.dcmread(next(dicom_slide.iterdir())).SeriesInstanceUID
    shutil.copytree(dicom_slide, tmp_path / series)
    site = read_overrides(source.parent / "site.csv")
    hospital = HospitalWriter(source.parent / "studies.csv")
    for slide, name in ((source / "good.tif", "good"), (tmp_path / series, series)):
        _, folder = score_to_folder(slide, scorer, tmp_path / "out", overrides=site, hospital=hospital)
        found, wanted = (json.loads((place / "result.json").read_text()) for place in (out / name, folder))
        assert found.pop("seconds").keys() == wanted.pop("seconds").keys()
        assert found == wanted
        for file in ("heatmap.png", "regions.geojson", "features.h5"):
            assert (out / name / file).read_bytes() == (folder / file).read_bytes()
        uids = [
            {pydicom.dcmread(path).SOPInstanceUID for path in (place / "dicom").iterdir()}
            for place in (out / name, folder)
        ]
        assert uids[0] == uids[1]


def test_app_says_nothing_about_the_patient(trial):
    _, out, ran = trial
    assert "Mustermann" not in ran.stdout + ran.stderr
    assert "Mustermann" not in (out / "summary.json").read_text()


def test_changed_models_are_refused_before_anything_reads_them(models, tissue_slide, tmp_path):
    changed = tmp_path / "models"
    shutil.copytree(models, changed)
    weights = next(changed.rglob("model.pt"))
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    (tmp_path / "in").mkdir()
    shutil.copy(tissue_slide, tmp_path / "in")
    ran = run_app("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", changed)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        f"s4mil app: {weights.parents[1]}: models/model.pt is not the file of SHA256SUMS; "
        "copy the bundle again, or, if you changed it, seal it again (s4mil seal)"
    )
    assert "Parsed args" not in ran.stderr  # the SDK has not looked into the folder
    assert list((tmp_path / "out").iterdir()) == []


def test_models_whose_configuration_would_run_code_are_refused_though_their_manifest_is_true(models, tmp_path):
    hostile = shutil.copytree(models, tmp_path / "models")
    staged = verify_models(hostile).bundle
    (staged / "configs" / "train.yaml").write_text("run: $open('/tmp/x', 'w')")
    write_manifest(staged)
    (tmp_path / "in").mkdir()
    ran = run_app("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", hostile)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        f"s4mil app: {staged}/configs/train.yaml: run: \"$open('/tmp/x', 'w')\" "
        "names open, which is not on the allow-list"
    )


def test_wrong_use_leaves_with_2(tmp_path):
    ran = run_app("-i", tmp_path / "nowhere")
    assert ran.returncode == 2
