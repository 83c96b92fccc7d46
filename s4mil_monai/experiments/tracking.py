"""One MLflow run for an experiment, with the runs of its pieces as children."""

from __future__ import annotations

import json
from pathlib import Path

from s4mil_monai.experiments.plan import Plan, write_json
from s4mil_monai.training.mlflow_store import find_experiment, open_client


def open_parent_run(tracking_uri: str, plan: Plan) -> str:
    """The id of the experiment's run; it is made at the first call, and found after."""
    kept = plan.folder / "mlflow_run.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))["run_id"]
    client = open_client(tracking_uri)
    run = client.create_run(find_experiment(client, plan.settings.name), run_name=plan.settings.name)
    for key in ("dataset", "folds", "fold_kind", "seeds", "models"):
        value = getattr(plan.settings, key)
        text = ", ".join(model.name for model in value) if key == "models" else str(value)
        client.log_param(run.info.run_id, key, text[:500])
    write_json(kept, {"run_id": run.info.run_id})
    return run.info.run_id


def adopt_children(tracking_uri: str, plan: Plan) -> None:
    """Make the runs of all pieces children of the experiment's run."""
    client, parent = open_client(tracking_uri), open_parent_run(tracking_uri, plan)
    experiment = find_experiment(client, plan.settings.name)
    names = {f"{piece.folder.resolve()} " for piece in plan.pieces}
    token = None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        for run in page:
            known = any((run.info.run_name or "").startswith(name) for name in names)
            if known and "mlflow.parentRunId" not in run.data.tags:
                client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
        token = page.token
        if not token:
            return


def close_parent_run(tracking_uri: str, plan: Plan, artifacts: list[Path]) -> None:
    """Log the tables and figures, and end the experiment's run."""
    client, parent = open_client(tracking_uri), open_parent_run(tracking_uri, plan)
    for file in artifacts:
        client.log_artifact(parent, str(file))
    client.set_terminated(parent, "FINISHED")
