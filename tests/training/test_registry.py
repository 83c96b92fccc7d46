"""Models in MLflow's registry, on a real SQLite store."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest

from s4mil_monai.cli.register import register
from s4mil_monai.errors import BundleError, WeightsError
from s4mil_monai.training.mlflow_store import find_experiment, open_client, uri_of_folder
from s4mil_monai.training.registry import SHA256, RegistryError, read_candidate, register_model

# of MLflow's tables, under SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

STARTED = "2026-11-24T20:00:00.000+00:00"


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """A store with MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("empty")
    open_client(uri_of_folder(folder))
    return folder / "mlruns.db"


@pytest.fixture
def training(tmp_path) -> Path:
    """What a training leaves behind, untracked."""
    return make_training(tmp_path / "training")


@pytest.fixture
def store(tmp_path, empty) -> str:
    """An empty store that is no training's own."""
    shutil.copy(empty, tmp_path / "mlruns.db")
    return uri_of_folder(tmp_path)


def track(training: Path, empty: Path) -> str:
    """Put the run of a training into the database of its folder, as MONAI's handler does."""
    shutil.copy(empty, training / "mlruns.db")
    client = open_client(uri_of_folder(training))
    run = client.create_run(find_experiment(client, "tp53"), run_name=f"{training} {STARTED}")
    client.log_artifact(run.info.run_id, str(training / "model.pt"))
    client.set_terminated(run.info.run_id, "FINISHED")
    return uri_of_folder(training)


def make_training(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir()
    config = {"model_name": "s4mil", "fold": 3, "seed": 1, "experiment_name": "tp53", "tracking_uri": "$'sqlite'"}
    (folder / "config.json").write_text(json.dumps({"started": STARTED, "config": config}))
    (folder / "metrics.json").write_text('{"auroc": 0.875, "average_precision": null}')
    (folder / "model.pt").write_bytes(content)
    return folder


def test_version_of_a_training_has_its_run_weights_and_metrics(training, empty):
    uri = track(training, empty)
    candidate = read_candidate(training)
    assert candidate.tracking_uri == uri
    found = register_model(candidate, "tp53 of lung", tracking_uri=uri, alias="champion")
    assert (found.version, found.is_new) == (1, True)
    client = open_client(uri)
    version = client.get_model_version_by_alias("tp53 of lung", "champion")
    assert version.tags[SHA256] == hashlib.sha256(b"weights").hexdigest()
    assert version.tags["metric.auroc"] == "0.875"
    assert "metric.average_precision" not in version.tags  # not defined, so not said
    assert (version.tags["model_name"], version.tags["fold"], version.tags["seed"]) == ("s4mil", "3", "1")
    assert client.get_run(version.run_id).info.run_name == f"{training} {STARTED}"
    assert Path(version.source.removeprefix("file://")).read_bytes() == b"weights"
    assert len(client.search_runs([find_experiment(client, "tp53")])) == 1  # the one that trained


def test_same_weights_are_registered_once_and_others_get_the_next_version(training, store, tmp_path):
    first = register_model(read_candidate(training), "m", tracking_uri=store)
    again = register_model(read_candidate(training), "m", tracking_uri=store, alias="champion")
    assert (first.version, again.version, again.is_new) == (1, 1, False)
    other = make_training(tmp_path / "other", b"other weights")
    assert register_model(read_candidate(other), "m", tracking_uri=store, alias="champion").version == 2
    assert int(open_client(store).get_model_version_by_alias("m", "champion").version) == 2


def test_training_tracked_elsewhere_brings_its_files_and_metrics_along(training, store, tmp_path):
    register_model(read_candidate(training), "m", tracking_uri=store)
    client = open_client(store)
    run = client.get_run(client.get_model_version("m", "1").run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"auroc": 0.875}
    kept = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert kept == {"model.pt", "config.json", "metrics.json"}
    assert (tmp_path / "mlruns").is_dir()  # beside the database, wherever the command was started


def test_bundle_is_registered_with_its_version_and_encoder(bundle, store):
    register_model(read_candidate(bundle), "scorer", tracking_uri=store)
    tags = open_client(store).get_model_version("scorer", "1").tags
    described = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert tags[SHA256] == described["s4mil"]["weights"]["sha256"]
    assert (tags["bundle"], tags["bundle_version"]) == ("tiny", "1.0")
    assert tags["encoder_sha256"] == described["s4mil"]["encoder"]["sha256"]


def test_bundle_whose_weights_were_exchanged_is_refused(bundle, tmp_path):
    changed = tmp_path / "bundle"
    for name in ("configs/metadata.json", "models/model.pt"):
        (changed / name).parent.mkdir(parents=True)
        (changed / name).write_bytes((bundle / name).read_bytes() + (b" " if name.endswith(".pt") else b""))
    with pytest.raises(WeightsError, match="SHA-256 differs"):
        read_candidate(changed)


@pytest.mark.parametrize(
    ("gone", "error", "message"),
    [
        ("config.json", BundleError, "neither the folder of a training"),
        ("model.pt", WeightsError, "has its training ended"),
        ("metrics.json", BundleError, "its training has not ended; start it again"),
    ],
)
def test_folder_without_a_finished_training_is_one_line(training, gone, error, message):
    (training / gone).unlink()
    with pytest.raises(error, match=message):
        read_candidate(training)


@pytest.mark.parametrize(
    ("name", "uri", "message"),
    [
        ("a/b", "sqlite:///x.db", "a/b: is no name for a registered model"),
        ("m", "mlruns", "mlruns: is no MLflow store; give sqlite:///FILE or the URI of a server"),
    ],
)
def test_impossible_name_or_store_is_one_line(training, name, uri, message):
    with pytest.raises(RegistryError, match=message) as raised:
        register_model(read_candidate(training), name, tracking_uri=uri)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_server_that_is_not_there_is_one_line(training, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match=r"^http://127\.0\.0\.1:9: does not answer") as raised:
        register_model(read_candidate(training), "m", tracking_uri="http://127.0.0.1:9")
    assert "\n" not in str(raised.value)


def test_database_that_is_none_is_one_line(training, tmp_path):
    (tmp_path / "x.db").write_text("no database at all, but long enough to be looked into" * 30)
    with pytest.raises(RegistryError, match="training was not registered"):
        register_model(read_candidate(training), "m", tracking_uri=f"sqlite:///{tmp_path / 'x.db'}")


def test_command_says_what_was_registered_where(training, store, capsys, monkeypatch):
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
        monkeypatch.setenv(name, "1")  # which the command would set for good
    assert register(str(training), name="m", tracking_uri=store, alias="champion") == 0
    assert register(str(training), name="m", tracking_uri=store) == 0
    first, second = capsys.readouterr().out.splitlines()
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert first == f"{training}: registered as m version 1, champion (SHA-256 {sha256[:12]}…) in {store}"
    assert second.startswith(f"{training}: is already m version 1 (")
