"""A sealed bundle is what it was when it was sealed, to the byte, before anything of it is parsed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from s4mil_monai.errors import BundleError, ConfigRefusedError
from s4mil_monai.models.bundle import load_bundle, ship_weights
from s4mil_monai.models.bundle_files import find_bundle_files
from s4mil_monai.models.manifest import MANIFEST, write_manifest
from s4mil_monai.models.seal import kept_sealed, seal_bundle, verify_bundle

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
SHIPPED = sorted(path for path in BUNDLES.iterdir() if path.is_dir())


@pytest.fixture
def sealed(bundle, tmp_path) -> Path:
    """A sealed bundle with a configuration."""
    copy = shutil.copytree(bundle, tmp_path / "tiny")
    (copy / "configs" / "train.yaml").write_text('run: ["$@trainer.run()"]\n')
    (copy / "configs" / "logging.conf").write_text((BUNDLES / "s4mil_slide/configs/logging.conf").read_text())
    seal_bundle(copy)
    return copy


@pytest.mark.parametrize("bundle", SHIPPED, ids=lambda path: path.name)
def test_manifest_that_is_shipped_is_true(bundle):
    """If not: s4mil seal."""
    assert verify_bundle(bundle).bundle == bundle


@pytest.mark.parametrize("bundle", SHIPPED, ids=lambda path: path.name)
def test_one_flipped_bit_in_any_file_is_found_and_the_file_named(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / bundle.name)
    names = [name for name in find_bundle_files(copy) if name != MANIFEST]
    assert len(names) >= 7
    for name in names:
        before = (copy / name).read_bytes()
        middle = len(before) // 2
        (copy / name).write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        with pytest.raises(BundleError, match=f": {name} is not the file of {MANIFEST}") as refused:
            verify_bundle(copy)
        assert not isinstance(refused.value, ConfigRefusedError)
        (copy / name).write_bytes(before)
    assert verify_bundle(copy).files == len(names)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("configs/train.yaml", "run: [ this is no YAML"),
        ("configs/train.yaml", "run: $eval('1')"),
        ("configs/train.yaml", "run: !!python/object/apply:os.system [id]"),
        ("configs/metadata.json", "{ this is no JSON"),
        ("configs/logging.conf", "this is no logging file"),
        ("models/model.pt", "these are no weights"),
    ],
)
def test_changed_file_is_refused_as_changed_before_it_is_parsed(sealed, name, content):
    (sealed / name).write_text(content)
    with pytest.raises(
        BundleError, match=f"{name} is not the file of {MANIFEST}; copy the bundle again"
    ) as refused:
        verify_bundle(sealed)
    assert refused.value.__cause__ is None


def test_true_manifest_does_not_vouch_for_a_hostile_configuration(sealed):
    (sealed / "configs" / "train.yaml").write_text("run: $__import__('os').system('id')")
    write_manifest(sealed)
    with pytest.raises(ConfigRefusedError, match=r"train\.yaml: run: "):
        verify_bundle(sealed)


def test_hostile_configuration_is_not_sealed(sealed):
    before = (sealed / MANIFEST).read_bytes()
    (sealed / "configs" / "train.yaml").write_text("run: $__import__('os').system('id')")
    with pytest.raises(ConfigRefusedError):
        seal_bundle(sealed)
    assert (sealed / MANIFEST).read_bytes() == before


def test_folder_without_metadata_is_not_sealed(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle: configs/metadata\.json is missing"):
        seal_bundle(tmp_path)
    assert not (tmp_path / MANIFEST).exists()


def test_bundle_that_gets_new_weights_stays_sealed(sealed):
    settings = load_bundle(sealed).settings
    metadata = json.loads((sealed / "configs/metadata.json").read_text())
    (sealed / "configs/metadata.json").write_text(json.dumps(metadata | {"version": "1.1"}))
    seal_bundle(sealed)
    before = (sealed / MANIFEST).read_bytes()
    weights = settings.weights.model_copy(update={"path": "models/other.pt"})
    ship_weights(sealed, sealed / "trained.pt", settings.model_copy(update={"weights": weights}))
    assert (sealed / MANIFEST).read_bytes() != before
    verify_bundle(sealed)


def test_bundle_that_was_not_sealed_gets_no_manifest(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "tiny")
    with kept_sealed(copy):
        (copy / "models" / "more.bin").write_text("x")
    assert not (copy / MANIFEST).exists()


def test_change_nobody_here_made_is_not_vouched_for(sealed, caplog):
    (sealed / "configs" / "train.yaml").write_text("run: []")
    with kept_sealed(sealed):
        (sealed / "models" / "more.bin").write_text("x")
    assert "configs/train.yaml is not the file of SHA256SUMS" in caplog.text
    assert "it is not sealed again" in caplog.text
    with pytest.raises(BundleError, match=r"configs/train\.yaml"):
        verify_bundle(sealed)


def test_manifest_is_not_renewed_when_a_change_fails(sealed):
    def fail() -> None:
        with kept_sealed(sealed):
            (sealed / "models" / "half.bin").write_text("x")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    with pytest.raises(BundleError, match=r"models/half\.bin is not in SHA256SUMS"):
        verify_bundle(sealed)
