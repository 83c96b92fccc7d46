"""``s4mil register``: a trained model into MLflow's model registry."""

from __future__ import annotations

import os
from pathlib import Path

from s4mil_monai.cli.console import say


def register(folder: str, *, name: str, tracking_uri: str | None = None, alias: str | None = None) -> int:
    """Register the model of a training's folder or of a bundle, with its SHA-256, metrics and run.

    Weights that are registered under the name already keep their version.

    Args:
        folder: output_dir of a training, or a bundle.
        name: Of the registered model.
        tracking_uri: sqlite:///FILE or a server; MLFLOW_TRACKING_URI, or where the training was tracked, or
            mlruns.db here, by default.
        alias: Points to this version from now on, such as champion.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 by default: minutes for a mistyped server
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two more lines
    from s4mil_monai.training.mlflow_store import uri_of_folder
    from s4mil_monai.training.registry import SHA256, read_candidate, register_model

    candidate = read_candidate(folder)
    asked = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or candidate.tracking_uri
    uri = asked or uri_of_folder(Path.cwd())
    found = register_model(candidate, name, tracking_uri=uri, alias=alias)
    state = "registered as" if found.is_new else "is already"
    named, sha256 = f", {alias}" if alias else "", candidate.tags[SHA256][:12]
    say(f"{folder}: {state} {name} version {found.version}{named} (SHA-256 {sha256}…) in {uri}")
    return 0
