"""Models are what they were when they were staged, or they are not used."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from s4mil_monai.errors import BundleError
from s4mil_monai.models.manifest import MANIFEST, stage_models, verify_models, write_manifest


@pytest.fixture
def staged(bundle, tmp_path):
    weights = tmp_path / "encoder.pth"
    weights.write_bytes(b"weights")
    stage_models(bundle, tmp_path / "models", encoder_weights=weights)
    return tmp_path / "models"


def test_staged_models_are_found_with_their_encoder_weights(staged):
    found = verify_models(staged)
    assert found.bundle == staged / "tiny"
    assert found.encoder_weights == staged / "tiny" / "encoder" / "encoder.pth"
    assert verify_models(staged / "tiny") == found


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not here")
def test_manifest_can_be_checked_without_this_package(staged):
    command = ["sha256sum", "--check", "--strict", "--quiet", MANIFEST]
    assert subprocess.run(command, cwd=staged / "tiny", check=False).returncode == 0


def leave(path):
    path.parent.mkdir(parents=True)
    path.write_text("left behind")


def change(path):
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: (m / "tiny/json.py").write_text("x"), "json.py is code, which a bundle does not hold"),
        (lambda m: (m / "tiny/models/torch.pyc").write_text("x"), "models/torch.pyc is code"),
        (lambda m: (m / "tiny/models/x.so.1").write_text("x"), "models/x.so.1 is code"),
        (lambda m: (m / "tiny/torch").symlink_to(m / "tiny/models"), "torch is a link to a folder"),
        (lambda m: (m / "tiny/gone").symlink_to(m / "nowhere"), "gone is not a plain file"),
        (lambda m: os.mkfifo(m / "tiny/pipe"), "pipe is not a plain file"),
        (lambda m: leave(m / "tiny/models/output/x.pt"), "models/output/x.pt is not in SHA256SUMS"),
        (
            lambda m: change(m / "tiny/configs/metadata.json"),
            "configs/metadata.json is not the file of SHA256SUMS",
        ),
        (lambda m: (m / "tiny/models/model.pt").unlink(), "models/model.pt of SHA256SUMS is missing"),
        (lambda m: (m / "tiny/configs/extra.yaml").write_text("x"), "configs/extra.yaml is not in SHA256SUMS"),
        (lambda m: (m / "tiny" / MANIFEST).unlink(), "has no SHA256SUMS"),
        (lambda m: (m / "tiny" / MANIFEST).write_text("# nothing\n"), "is not what sha256sum writes"),
        (
            lambda m: (m / "tiny" / MANIFEST).write_text(f"{'a' * 64}  ../../secret\n"),
            "names a file outside the folder",
        ),
        (lambda m: (m / "other").mkdir(), "holds other, tiny; wanted one bundle and nothing else"),
        (lambda m: shutil.rmtree(m / "tiny"), "holds nothing; wanted one bundle"),
        (lambda m: shutil.rmtree(m), "there is no such folder of models"),
    ],
)
def test_spoilt_models_are_refused(staged, spoil, message):
    spoil(staged)
    with pytest.raises(BundleError, match=message):
        verify_models(staged)


def test_two_files_of_encoder_weights_are_refused(staged):
    (staged / "tiny" / "encoder" / "another.pth").write_bytes(b"w")
    write_manifest(staged / "tiny")
    with pytest.raises(BundleError, match="holds 2 files of encoder weights"):
        verify_models(staged)


def test_models_are_not_staged_over_others(staged, bundle):
    with pytest.raises(BundleError, match="is not empty"):
        stage_models(bundle, staged)


@pytest.mark.parametrize(
    "name",
    [
        "output/run/model.pt",
        "eval/metrics.json",
        "mlruns/0/meta.yaml",
        "mlruns.db/x",
        "__pycache__/a.pyc",
        ".git/config",
    ],
)
def test_what_runs_leave_in_the_folder_is_no_part_of_a_bundle(staged, name):
    leave(staged / "tiny" / name)
    verify_models(staged)
    write_manifest(staged / "tiny")
    assert name not in (staged / "tiny" / MANIFEST).read_text()


def test_what_is_staged_is_what_a_manifest_names(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "tiny")
    leave(copy / "output/run/model.pt")
    leave(copy / "models/output/model.pt")
    write_manifest(copy)
    (copy / MANIFEST).write_text("an old one")
    staged = stage_models(copy, tmp_path / "models")
    assert (staged.bundle / "models/output/model.pt").is_file()
    assert not (staged.bundle / "output").exists()
    assert (copy / MANIFEST).read_text() == "an old one"
    assert staged == verify_models(tmp_path / "models")
