"""MLflow's database or server, as this package opens it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"


def uri_of_folder(folder: Path) -> str:
    """The database of a folder."""
    return f"{SQLITE}{folder.resolve() / 'mlruns.db'}"


def open_client(tracking_uri: str) -> MlflowClient:
    """A client that does not tell of every table it makes."""
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri)


def find_experiment(client: MlflowClient, name: str) -> str:
    """The id of an experiment, made where there is none.

    Artifacts of a database go beside it, as MONAI's handler has it; MLflow's own default is the working directory.
    """
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    uri = client.tracking_uri
    beside = Path(uri.removeprefix(SQLITE)).resolve().parent / "mlruns" if uri.startswith(SQLITE) else None
    return client.create_experiment(name, artifact_location=beside.as_uri() if beside else None)
