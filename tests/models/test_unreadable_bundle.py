"""A bundle that belongs to somebody else is one line with the file, not a traceback."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from s4mil_monai.errors import BundleError
from s4mil_monai.models.manifest import METADATA, stage_models, verify_models, write_manifest
from s4mil_monai.models.seal import seal_bundle, verify_bundle

NOBODY = 65534


@pytest.fixture
def sealed() -> Iterator[Path]:
    """A sealed folder that any user can look into, outside pytest's own, which only its user can."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        bundle = Path(folder) / "tiny"
        (bundle / METADATA).parent.mkdir(parents=True)
        (bundle / METADATA).write_text("{}")
        (bundle / "model.pt").write_bytes(b"weights")
        write_manifest(bundle)
        yield bundle


@contextmanager
def service_user() -> Iterator[None]:
    """Let this process have the rights of another user where it is root, to whom every file opens."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("check", [verify_models, verify_bundle])
@pytest.mark.parametrize("name", ["model.pt", "SHA256SUMS"])
def test_a_file_that_may_not_be_read_is_named(sealed, check, name):
    (sealed / name).chmod(0)
    with service_user(), pytest.raises(BundleError) as refused:
        check(sealed)
    assert str(refused.value) == f"{sealed}: {name} cannot be used (Permission denied)"


def test_a_folder_that_may_not_be_entered_is_named(sealed):
    sealed.chmod(0)
    with service_user(), pytest.raises(BundleError, match=r"configs/metadata\.json cannot be used \(Permission"):
        verify_models(sealed)
    sealed.chmod(0o755)


def test_a_folder_that_may_not_be_written_to_cannot_be_sealed_and_keeps_its_manifest(sealed):
    before = (sealed / "SHA256SUMS").read_text()
    (sealed / "model.pt").write_bytes(b"other weights")
    sealed.chmod(0o555)
    with service_user(), pytest.raises(BundleError, match=r"SHA256SUMS.* cannot be used \(Permission denied\)"):
        seal_bundle(sealed)
    sealed.chmod(0o755)
    assert (sealed / "SHA256SUMS").read_text() == before


def test_what_cannot_be_copied_is_named_when_models_are_staged(sealed):
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        (sealed / "model.pt").chmod(0)
        with service_user(), pytest.raises(BundleError, match=r"model\.pt cannot be used \(Permission denied\)"):
            stage_models(sealed, Path(folder) / "models")
        shutil.rmtree(Path(folder) / "models")
