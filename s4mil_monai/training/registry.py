"""Trained models in MLflow's model registry: which weights, from which run, with which metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s4mil_monai import __version__
from s4mil_monai.errors import BundleError, PathError, WeightsError
from s4mil_monai.features.encoder_cache import sha256_of
from s4mil_monai.models.bundle import load_bundle
from s4mil_monai.training.mlflow_store import SQLITE, find_experiment, open_client, uri_of_folder
from s4mil_monai.training.run_folder import DESCRIPTION, WEIGHTS

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = re.compile(r"[A-Za-z0-9_.+ -]+")
"""What a registered model may be called; MLflow forbids slashes and colons."""

SHA256 = "weights_sha256"
"""Tag of a version: two versions of a model never have the same."""


class RegistryError(PathError):
    """A model cannot be registered where it was asked for."""


@dataclass(frozen=True)
class Candidate:
    """A model to register, as its folder describes it."""

    folder: Path
    weights: Path
    tags: Mapping[str, str]
    """For the version; SHA-256 of the weights among them."""
    metrics: Mapping[str, float]
    files: tuple[Path, ...]
    """That go with it: settings, predictions, calibration."""
    experiment: str
    run_name: str
    """Of the MLflow run that made it; a new one gets this name where the store has none."""
    tracking_uri: str | None
    """Where its training was tracked, if it says so."""


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: int
    is_new: bool
    """False where a version with the same weights was there."""


def read_candidate(folder: str | Path) -> Candidate:
    """Read the folder of a training, or a bundle.

    Raises:
        BundleError: It is neither, or contradicts itself.
        WeightsError: Its weights are not there, or not those it describes.
    """
    folder = Path(folder).resolve()
    if (folder / "configs" / "metadata.json").is_file():
        return _read_bundle(folder)
    if (folder / "config.json").is_file():
        return _read_training(folder)
    raise BundleError(
        str(folder), "is neither the folder of a training (config.json) nor a bundle (configs/metadata.json)"
    )


def register_model(candidate: Candidate, name: str, *, tracking_uri: str, alias: str | None = None) -> Registered:
    """Make a model the next version of a registered one; the same weights are registered once.

    Args:
        candidate: What :func:`read_candidate` gives.
        name: Of the registered model; made where there is none.
        tracking_uri: ``sqlite:///…`` or a server.
        alias: Moved to this version, such as ``champion``.

    Raises:
        RegistryError: The name is not possible, or the store cannot be reached or refuses.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if not NAME.fullmatch(name):
        raise RegistryError(name, "is no name for a registered model; use letters, digits, space and _ . + -")
    if not tracking_uri.startswith((SQLITE, "http://", "https://", "postgresql", "mysql", "mssql", "databricks")):
        raise RegistryError(tracking_uri, "is no MLflow store; give sqlite:///FILE or the URI of a server")
    try:
        client = open_client(tracking_uri)
        version = _find_version(client, name, candidate.tags[SHA256])
        found = version if version is not None else _add_version(client, name, candidate)
        if alias is not None:
            client.set_registered_model_alias(name, alias, str(found))
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise RegistryError(tracking_uri, _explain(error, candidate)) from error
    return Registered(name, found, is_new=version is None)


def _explain(error: Exception, candidate: Candidate) -> str:
    text = " ".join(str(error).split())
    if "Max retries exceeded" in text:
        return "does not answer; is it the URI of an MLflow server that runs?"
    return f"{candidate.folder.name} was not registered ({text[:300]})"


def _find_version(client: MlflowClient, name: str, sha256: str) -> int | None:
    """The version of the same weights."""
    versions = client.search_model_versions(f"name = '{name}'")
    same = [int(version.version) for version in versions if version.tags.get(SHA256) == sha256]
    return max(same, default=None)


def _add_version(client: MlflowClient, name: str, candidate: Candidate) -> int:
    from mlflow.exceptions import MlflowException

    run = _find_run(client, candidate) or _add_run(client, candidate)
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    source = f"{run.info.artifact_uri}/{candidate.weights.name}"
    made = client.create_model_version(name, source, run_id=run.info.run_id, tags=dict(candidate.tags))
    return int(made.version)


def _find_run(client: MlflowClient, candidate: Candidate) -> Any:
    """The finished run of this training that has the weights, or None."""
    experiment = client.get_experiment_by_name(candidate.experiment)
    if experiment is None:
        return None
    quoted = candidate.run_name.replace("'", "''")
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{quoted}'")
    for run in runs:
        if run.info.status != "FINISHED":
            continue
        if candidate.weights.name in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}:
            return run
    return None


def _add_run(client: MlflowClient, candidate: Candidate) -> Any:
    """A run that holds what was not tracked here: a bundle, or a training that was tracked elsewhere."""
    run = client.create_run(find_experiment(client, candidate.experiment), run_name=candidate.run_name)
    for key, value in candidate.metrics.items():
        client.log_metric(run.info.run_id, key, value)
    for file in (candidate.weights, *candidate.files):
        client.log_artifact(run.info.run_id, str(file))
    client.set_terminated(run.info.run_id, "FINISHED")
    return run


# What a folder says --------------------------------------------------------------------------------------------


def _read_training(folder: Path) -> Candidate:
    run = _read_json(folder / "config.json")
    config = run.get("config", {})
    weights = next((file for name in WEIGHTS if (file := folder / name).is_file()), None)
    if weights is None:
        raise WeightsError(str(folder), "has no model.pt or forest.skops; has its training ended?")
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        raise BundleError(str(folder), "has no metrics.json: its training has not ended; start it again")
    measured = {key: value for key, value in _read_json(metrics).items() if value is not None}
    told = {key: str(config[key]) for key in ("model_name", "fold", "seed") if config.get(key) is not None}
    told |= {f"metric.{key}": f"{value:.6g}" for key, value in measured.items()}
    uri = config.get("tracking_uri", "")
    return Candidate(
        folder=folder,
        weights=weights,
        tags=_tags(sha256_of(weights)) | told,
        metrics=measured,
        files=tuple(file for name in DESCRIPTION if (file := folder / name).is_file()),
        experiment=str(config.get("experiment_name", "s4mil")),
        run_name=f"{folder} {run.get('started', '')}",
        tracking_uri=uri_of_folder(folder) if not uri or uri.startswith("$") else uri,
    )


def _read_bundle(folder: Path) -> Candidate:
    bundle = load_bundle(folder)
    record, weights = bundle.record, folder / bundle.settings.weights.path
    told = {"bundle": record.bundle, "bundle_version": record.version, "intended_use": record.intended_use}
    told |= {f"encoder_{key}": str(value) for key, value in bundle.settings.encoder.model_dump().items()}
    beside = [path for pattern in ("configs/metadata.json", "models/*.json") for path in folder.glob(pattern)]
    return Candidate(
        folder=folder,
        weights=weights,
        tags=_tags(record.sha256) | told,
        metrics={},
        files=tuple(sorted(beside)),
        experiment="bundles",
        run_name=f"{record.bundle} {record.version}",
        tracking_uri=None,
    )


def _tags(sha256: str) -> dict[str, str]:
    return {SHA256: sha256, "software": f"s4mil_monai {__version__}"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(str(path), f"is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise BundleError(str(path), "is no table of settings")
    return found
