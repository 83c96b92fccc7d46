"""A site's settings: wrong ones are refused at the start, in one line, before anything is touched."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from s4mil_monai.batch.settings import LEDGER_VARIABLE, SiteSettings, check_places, read_site
from s4mil_monai.batch.site import DeviceAwayError, read_checked_site
from s4mil_monai.checksum import sha256_of
from s4mil_monai.errors import BundleError, SettingsError, SourceAwayError, UnknownNameError
from s4mil_monai.features.encoder import find_encoder
from s4mil_monai.features.patch_stage import choose_patch_batches
from s4mil_monai.features.store import save_bag
from s4mil_monai.precision import PRECISIONS
from s4mil_monai.streaming.choose import RUNTIMES
from tests.features.test_store import make_bag

REPOSITORY = Path(__file__).resolve().parents[2]


def no_default():
    raise AssertionError("the settings name a bundle")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"retries": 3}, "retries: Extra inputs are not permitted"),
        ({"tries": 0}, "tries: Input should be greater than or equal to 1"),
        ({"sources": []}, "sources: "),
        ({"sources": [{"folder": "share", "worklist": "list.csv"}]}, "either a folder or a worklist"),
        ({"sources": [{"worklist": "list.csv"}]}, "there is no worklist .*list.csv"),
        ({"out": "share/results"}, "out .*share/results and sources.0 .*share lie in each other"),
        ({"features": "share/features"}, "features .*share/features and sources.0 .*share lie in each other"),
        ({"features": "."}, "features .* and sources.0 .*share lie in each other"),
        ({"resolutions": "mpp.csv"}, "resolutions: there is no .*mpp.csv"),
        ({"studies": "studies.csv"}, "studies are for dicom: true"),
        ({"ray_address": "auto"}, "ray_address is for executor: ray"),
        ({"executor": "slurm"}, "executor: Input should be 'local' or 'ray'"),
        ({"bundle": "nothing"}, "bundle: there is no .*nothing"),
        ({"bundle": "file"}, "bundle: .*file is no folder"),
        ({"out": "file"}, "out: .*file is no folder"),
        ({"features": "file"}, "features: .*file is no folder"),
        ({"device": "gpu"}, "device: 'gpu' is no device; it is auto, cpu, cuda, or one of several"),
        ({"device": "cuda:x"}, "device: 'cuda:x' is no device"),
        ({"patch_stage": "foo"}, "patch_stage: Input should be 'torch', 'dali' or 'auto'"),
        ({"aggregator_runtime": "foo"}, "aggregator_runtime: Input should be 'auto', 'torch', 'onnxruntime' or"),
        ({"aggregator_precision": "int8"}, "aggregator_precision: Input should be 'float32', 'bfloat16' or"),
        ({"encoder_weights": "file"}, "encoder_weights: .*file: damaged, or not a weights file"),
        ({"encoder_weights": "other.pt"}, "encoder_weights: .*other.pt: weights of another network: lacks"),
        ({"resolutions": "file"}, "resolutions: .*file: line 1: unknown column 'no table'"),
        ({"dicom": True, "studies": "file"}, "studies: .*file: line 1: no column 'slide'"),
        ({"ledger": "foo"}, "ledger, or S4MIL_LEDGER_URL: is no address of a ledger; wanted sqlite:///FILE or"),
        ({"ledger": "postgresql+nothing://u:secret@h/d"}, "is no address of a ledger; wanted"),
        ({"ledger": "sqlite+pysqlcipher3x:///a"}, "is no address of a ledger; wanted"),
    ],
)
def test_wrong_settings_are_refused_by_name_and_nothing_is_made(site, settings, said):
    (site.folder / "file").write_text("no table\n")
    torch.save({"weight": torch.zeros(3)}, site.folder / "other.pt")
    site.configure(**settings)
    with pytest.raises(SettingsError, match=said) as refused:
        read_checked_site(site.file, default_bundle=no_default)
    assert refused.value.path == str(site.file)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)
    assert not site.out.exists()


def test_names_of_the_settings_are_those_that_the_package_knows():
    literals = {name: get_args(field.annotation) for name, field in SiteSettings.model_fields.items()}
    assert literals["aggregator_runtime"] == RUNTIMES
    assert literals["aggregator_precision"] == tuple(PRECISIONS)
    with pytest.raises(UnknownNameError) as refused:
        choose_patch_batches("none of them")
    assert literals["patch_stage"] == refused.value.known


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1", "mps"])
def test_a_device_is_named_as_pytorch_names_it(site, name):
    site.configure(device=name)
    assert read_site(site.file).device == name
    assert name == "auto" or torch.device(name)


def test_a_gpu_that_is_not_there_is_one_line_and_nothing_wrong_with_the_settings(site):
    site.configure(device="cuda:99")
    with pytest.raises(DeviceAwayError, match=r"^device: cuda:99: PyTorch finds \d+ GPUs on this machine$"):
        read_checked_site(site.file, default_bundle=no_default)
    assert not site.out.exists()


def test_weights_that_the_model_was_not_trained_with_are_refused(site):
    state = find_encoder("efficientnet_lite0").build().state_dict()
    torch.save(state, site.folder / "untrained.pt")
    site.configure(encoder_weights="untrained.pt")
    with pytest.raises(SettingsError, match=r"encoder_weights: .*untrained\.pt are other weights of efficient"):
        read_checked_site(site.file, default_bundle=no_default)


def test_a_ledger_named_by_the_environment_is_checked_as_well(site, monkeypatch):
    monkeypatch.setenv(LEDGER_VARIABLE, "db.hospital:5432")
    with pytest.raises(SettingsError, match="S4MIL_LEDGER_URL: is no address of a ledger"):
        read_site(site.file)


def test_wrong_settings_leave_with_the_code_that_no_unit_starts_again_after(site):
    site.configure(device="gpu")
    done = site.call("run")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_a_share_that_is_away_is_nothing_wrong_with_the_settings(site):
    site.configure(sources=[{"folder": "elsewhere"}])
    with pytest.raises(SourceAwayError, match="elsewhere: there is no such folder; is the share mounted"):
        read_checked_site(site.file, default_bundle=no_default)
    assert not site.out.exists()


@pytest.mark.parametrize("text", ["sources: [", "- a list", "", "\x00", "sources: 3"])
def test_a_file_that_is_no_settings_is_refused(site, text):
    site.file.write_text(text)
    with pytest.raises(SettingsError, match=r"site\.yaml"):
        read_site(site.file)


def test_an_output_that_holds_a_source_is_refused(site):
    (site.folder / "out" / "share").mkdir(parents=True)
    site.configure(sources=[{"folder": "out/share"}])
    with pytest.raises(SettingsError, match="lie in each other"):
        check_places(read_site(site.file), site.file)


def test_a_worklist_in_the_output_is_refused(site):
    site.out.mkdir()
    (site.out / "list.csv").write_text("slide\n")
    site.configure(sources=[{"worklist": "out/list.csv"}])
    with pytest.raises(SettingsError, match=r"out .*out and sources.0 .*list.csv lie in each other"):
        check_places(read_site(site.file), site.file)


def test_a_link_does_not_hide_that_the_output_lies_in_a_source(site):
    (site.folder / "link").symlink_to(site.share)
    site.configure(out="link/results")
    with pytest.raises(SettingsError, match="lie in each other"):
        check_places(read_site(site.file), site.file)


def test_a_changed_bundle_is_refused_before_it_is_parsed(site, tmp_path):
    changed = shutil.copytree(site.bundle, tmp_path / "changed")
    (changed / "configs" / "metadata.json").write_text("not even JSON")
    site.configure(bundle=str(changed))
    with pytest.raises(BundleError, match=r"configs/metadata\.json is not the file of SHA256SUMS"):
        read_checked_site(site.file, default_bundle=no_default)


def test_features_of_another_encoder_are_refused(site):
    save_bag(site.folder / "features" / "one.h5", make_bag())
    site.configure(features="features")
    with pytest.raises(SettingsError, match=r"features: .* the model wants efficientnet_lite0"):
        read_checked_site(site.file, default_bundle=no_default)


def test_the_ledgers_address_may_come_from_the_environment(site, monkeypatch):
    monkeypatch.setenv(LEDGER_VARIABLE, "postgresql+psycopg://s4mil:secret@db/s4mil")
    assert read_site(site.file).ledger_url == "postgresql+psycopg://s4mil:secret@db/s4mil"
    site.configure(ledger="sqlite:///own.sqlite")
    assert read_site(site.file).ledger_url == "sqlite:///own.sqlite"


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "configs" / "scoring").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_settings_can_be_read(file):
    assert read_site(file).sources


def test_settings_of_the_cluster_can_be_read(tmp_path):
    content = yaml.safe_load((REPOSITORY / "deploy" / "k8s" / "site.yaml").read_text())["data"]["site.yaml"]
    (tmp_path / "site.yaml").write_text(content)
    assert isinstance(read_site(tmp_path / "site.yaml"), SiteSettings)


def test_what_is_recorded_of_settings_and_tables_is_what_was_read(site):
    table = site.folder / "mpp.csv"
    table.write_text("slide,scanner,mpp\na.svs,,0.25\n")
    site.configure(resolutions="mpp.csv")
    before = hashlib.sha256(site.file.read_bytes()).hexdigest()
    found = read_checked_site(site.file, default_bundle=no_default)
    site.file.write_text(site.file.read_text() + "# a comment that is saved while slides are scored\n")
    assert found.config_sha256 == before
    assert found.bundle_sha256 == sha256_of(site.bundle / "SHA256SUMS")
    assert found.tables == {"resolutions": sha256_of(table)}
    assert found == read_checked_site(site.file, default_bundle=no_default), "a comment loads no model anew"
    table.write_text("slide,scanner,mpp\na.svs,,0.5\n")
    assert found != read_checked_site(site.file, default_bundle=no_default)


def test_a_table_that_cannot_be_read_is_one_line(site):
    (site.folder / "mpp.csv").mkdir()
    site.configure(resolutions="mpp.csv")
    with pytest.raises(SettingsError, match=r"resolutions: .*mpp\.csv: cannot be read \(Is a directory\)"):
        read_checked_site(site.file, default_bundle=no_default)
