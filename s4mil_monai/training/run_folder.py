"""The folder of one training: what was run, so that a second start goes on with the same and nothing else."""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
from monai.bundle.config_parser import ConfigParser

from s4mil_monai.errors import BundleError
from s4mil_monai.training.engines import find_checkpoint

MAY_CHANGE = (
    "output_dir",
    "device",
    "resume",
    "tracking_uri",
    "train::trainer::max_epochs",
    "early_stop::patience",
)
"""Settings that a run may go on with although they are others than before."""


DESCRIPTION = ("config.json", "environment.txt", "history.csv", "curves.png", "predictions.csv", "metrics.json")
"""What a run writes about itself."""

WEIGHTS = ("model.pt", "forest.skops")
"""The one or the other: a network's, or a forest."""


@dataclass(frozen=True)
class RunFolder:
    """A folder and what is run in it."""

    folder: Path
    name: str
    """Of the MLflow run: the folder and when it was started, the same when it goes on."""
    settings: dict[str, Any]
    """Plain values at the top of the configuration, such as ``seed``: MLflow's parameters."""

    @property
    def artifacts(self) -> list[str]:
        """Files for MLflow."""
        return [str(self.folder / name) for name in (*DESCRIPTION, *WEIGHTS)]


def open_run(folder: str | Path, *, resume: bool = True, config: Mapping[str, Any] | None = None) -> RunFolder:
    """Make the folder of a run, or open it again; writes ``config.json`` and ``environment.txt``.

    Args:
        folder: Made where there is none.
        resume: Go on if there is something to go on with.
        config: What is executed; None takes it from the MONAI configuration that calls this function.

    Raises:
        BundleError: There is a run with other settings to go on with.
    """
    path = Path(folder).resolve()
    config = executed_config() if config is None else dict(config)
    before = _read_run(path) if resume and find_checkpoint(path) else None
    if before is not None:
        _refuse_other_settings(path, before["config"], config)
    started = before["started"] if before else datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    if idist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        run = {"started": started, "config": config}
        (path / "config.json").write_text(json.dumps(run, indent=2, default=str) + "\n", encoding="utf-8")
        (path / "environment.txt").write_text(describe_environment(), encoding="utf-8")
    return RunFolder(path, f"{path} {started}", plain_settings(config))


def executed_config() -> dict[str, Any]:
    """The configuration, overlays and overrides merged, under whose evaluation this function is called.

    MONAI gives a configuration no name for itself; its parser is found on the call stack.

    Raises:
        LookupError: No MONAI configuration is being evaluated.
    """
    for frame in inspect.stack(context=0):
        parser = frame.frame.f_locals.get("self")
        if isinstance(parser, ConfigParser):
            config: dict[str, Any] = cast(Any, parser).get()
            return {key: value for key, value in config.items() if key != "_meta_"}
    raise LookupError("no MONAI configuration is being evaluated")


def plain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values at the top that are no expressions and cannot change when a run goes on.

    >>> plain_settings({"seed": 0, "device": "$torch.device('cpu')", "train": {"a": 1}, "bags": None})
    {'seed': 0}
    """
    return {
        key: value
        for key, value in config.items()
        if key not in MAY_CHANGE
        and isinstance(value, bool | int | float | str)
        and not str(value).startswith(("$", "@", "%"))
    }


def describe_environment() -> str:
    """Python, machine and all installed packages, one a line, as ``pip freeze`` has them."""
    packages = {f"{found.metadata['Name']}=={found.version}" for found in distributions()}
    head = f"# Python {platform.python_version()}, {platform.platform()}\n"
    return head + "\n".join(sorted(packages, key=str.lower)) + "\n"


def _read_run(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {"started": found["started"], "config": found["config"]}
    except (OSError, ValueError, KeyError):
        return None


def _refuse_other_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = _leaves(before), _leaves(json.loads(json.dumps(now, default=str)))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changed = [key for key in changed if key not in MAY_CHANGE]
    if changed:
        raise BundleError(
            str(folder),
            f"holds a run with other settings ({', '.join(changed[:5])}); give another --output_dir, "
            "or --resume false to start anew",
        )


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(f"{key}::{name}" if key else str(name), entry) for name, entry in value.items()]
    elif isinstance(value, list):
        items = [(f"{key}::{i}", entry) for i, entry in enumerate(value)]
    else:
        return {key: value}
    return {leaf: found for name, entry in items for leaf, found in _leaves(entry, name).items()}
