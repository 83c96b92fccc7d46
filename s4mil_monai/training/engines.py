"""Ignite handlers that MONAI and Ignite lack: seeds by epoch, checkpoints that outlast a power cut, going on."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol
from zipfile import BadZipFile

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from ignite.handlers.checkpoint import BaseSaveHandler
from ignite.utils import manual_seed
from monai.data.utils import set_rnd
from monai.handlers.checkpoint_loader import CheckpointLoader
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint_{global_step:05d}.pt"
"""File of the state after an epoch."""


class Stateful(Protocol):
    """What a checkpoint holds."""

    def state_dict(self) -> Mapping[str, Any]: ...


class EpochSeed:
    """Seeds every source of chance anew at each epoch, from the run's seed, the epoch and the process's rank.

    So an epoch draws the same whether the ones before it ran in the same process or in one that was killed.

    Args:
        seed: Of the run.
        transform: MONAI transform of the training bags, which has random numbers of its own.
    """

    def __init__(self, seed: int, transform: Any = None):
        self.seed, self.transform = seed, transform

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed Python, NumPy, PyTorch and the transform."""
        parts = [self.seed, engine.state.epoch, idist.get_rank()]
        seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
        manual_seed(seed)
        set_rnd(self.transform, seed)


class EpochHistory:
    """Writes a row an epoch into ``history.csv``, and draws it as ``curves.png`` when training ends.

    Seconds of the epoch, without its validation, and the learning rate are left in the engine's state for other
    handlers, such as MLflow's ``state_attributes``: attach this one after validation and before them.

    Args:
        folder: That gets the files.
        evaluator: Whose metrics stand in the row as well.
    """

    def __init__(self, folder: str | Path, evaluator: Engine):
        self.folder, self.evaluator = Path(folder), evaluator
        self.rows: list[dict[str, float]] = []

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._draw)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the rows of a :meth:`state_dict`."""
        self.rows = [dict(row) for row in state_dict["rows"]]

    def _start(self, engine: Engine) -> None:
        self.evaluator.state.metrics = {}  # of an epoch that is not validated, no figures of the one before

    def __call__(self, engine: Engine) -> None:
        """Add the row of the epoch that ended."""
        state: Any = engine.state
        state.epoch_s = state.times[Events.EPOCH_COMPLETED.name]
        state.learning_rate = engine.optimizer.param_groups[0]["lr"]  # type: ignore[attr-defined]
        row = {"epoch": state.epoch, "seconds": state.epoch_s, "learning_rate": state.learning_rate}
        for metrics in (engine.state.metrics, self.evaluator.state.metrics):
            row |= {name: float(value) for name, value in metrics.items()}
        self.rows.append(row)
        if idist.get_rank() == 0:
            pd.DataFrame(self.rows).to_csv(self.folder / "history.csv", index=False)

    def _draw(self, engine: Engine) -> None:
        if self.rows and idist.get_rank() == 0:
            draw_curves(pd.DataFrame(self.rows), self.folder / "curves.png")


def draw_curves(history: pd.DataFrame, path: Path) -> None:
    """Draw losses above metrics, by epoch."""
    from matplotlib.figure import Figure  # half a second, and only here

    figure = Figure(figsize=(7, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name in history.columns.difference(["epoch", "seconds", "learning_rate"]):
        axes = upper if name.endswith("loss") else lower
        axes.plot(history["epoch"], history[name], label=name, marker=".")
    upper.set_ylabel("loss")
    lower.set_xlabel("epoch")
    for axes in (upper, lower):
        if axes.get_lines():
            axes.legend()
    figure.savefig(path, dpi=120)


class DurableFiles(BaseSaveHandler):
    """Where Ignite's ``Checkpoint`` writes: a file has its name only when it is whole and on the disk.

    The file it replaces is removed after that, so there is one at any moment a process can be killed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._outdated: str | None = None

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        """Write a checkpoint."""
        if idist.get_rank() > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{filename}.part"
        with part.open("wb") as file:
            torch.save(_plain(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / filename)
        if self._outdated not in (None, filename):
            (self.folder / str(self._outdated)).unlink(missing_ok=True)
        self._outdated = None

    def remove(self, filename: str) -> None:
        """Remove a file once its successor is there."""
        self._outdated = filename


def _plain(value: Any) -> Any:
    """Without NumPy's numbers, as metrics give them, which safe loading refuses."""
    if isinstance(value, Mapping):
        return type(value)((key, _plain(entry)) for key, entry in value.items())  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        return type(value)(_plain(entry) for entry in value)
    return value.item() if isinstance(value, np.generic) else value


class Resume:
    """Goes on from the newest whole checkpoint of a folder, or starts anew where there is none.

    Attach it last: what it loads is what the checkpoint's ``to_save`` holds. A run that had ended stays ended.

    Args:
        folder: With files named as :data:`CHECKPOINT`.
        objects: The same as the checkpoint's ``to_save``.
        early_stop: One of them; training does not go on when its patience was at its end.
        enabled: False starts anew and removes the checkpoints that are there.
    """

    def __init__(
        self, folder: str | Path, objects: dict[str, Any], *, early_stop: EarlyStopping, enabled: bool = True
    ):
        self.folder, self.objects = Path(folder), objects
        self.early_stop, self.enabled = early_stop, enabled

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Load the state."""
        if not self.enabled:
            remove_checkpoints(self.folder)
            return
        newest = find_checkpoint(self.folder)
        if newest is None:
            return
        CheckpointLoader(str(newest), self.objects, map_location=engine.state.device)(engine)
        logger.info("going on after epoch %d, from %s", engine.state.epoch, newest)
        if self.early_stop.counter >= self.early_stop.patience:
            engine.terminate()


def find_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that can be read; damaged ones are passed over with a warning."""
    for path in sorted(Path(folder).glob("checkpoint_[0-9]*.pt"), reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, BadZipFile, pickle.UnpicklingError) as error:
            logger.warning("%s is damaged and passed over (%s)", path, str(error).partition("\n")[0])
        else:
            return path
    return None


def remove_checkpoints(folder: str | Path) -> None:
    """Remove all checkpoints, so that a run starts anew."""
    if idist.get_rank() == 0:
        for path in Path(folder).glob("checkpoint_[0-9]*.pt"):
            path.unlink()


def run_objects(trainer: Any, **parts: Stateful) -> dict[str, Any]:
    """All that a run needs to go on: the trainer, the parts, and what scales gradients in half precision."""
    scaler = {} if trainer.scaler is None else {"scaler": trainer.scaler}
    return {"trainer": trainer, **parts, **scaler}


def current_epoch(engine: Engine, event: Any) -> int:
    """The number in a checkpoint's name."""
    return engine.state.epoch


def first_loss(output: list[dict[str, Any]]) -> float:
    """The loss of a batch, from the engine's output for its bags, each of which has it."""
    return float(output[0]["loss"])


def log_loss(scores: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of (B, C) probabilities and (B,) classes, the mean over the bags; 0 counts as 1e-7."""
    return F.nll_loss(scores.clamp_min(1e-7).log(), classes)


def choose_epoch_by(metric: str) -> Callable[[Engine], float]:
    """Score of an epoch, higher is better, for early stopping and the best checkpoint.

    Args:
        metric: Of the validation, or several joined by ``+``, whose mean is taken; one whose name ends in ``loss``
            is the better the lower. With a handful of validation bags ``val_auroc`` is 1 by chance after an epoch
            or two, and the first such epoch is kept. ``val_loss``, which the authors' released code goes by, has
            no such ties; ``val_auroc+val_accuracy`` has fewer.
    """
    parts = [(-1.0 if name.endswith("loss") else 1.0, name) for name in metric.split("+")]
    return lambda engine: fmean(sign * float(engine.state.metrics[name]) for sign, name in parts)


def scores_and_classes(output: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(B, C) probabilities and (B,) classes, of predictions and one-hot labels as MONAI's metrics take them."""
    scores = torch.stack([torch.as_tensor(item["pred"]) for item in output])
    return scores, torch.stack([torch.as_tensor(item["label"]) for item in output]).argmax(1)
