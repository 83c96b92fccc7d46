"""run_piece(): one training of an experiment, in the process that is given it."""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from s4mil_monai.experiments.plan import Piece, load_data, load_folds
from s4mil_monai.experiments.settings import ExperimentError, ExperimentSettings
from s4mil_monai.training.datasets import Dataset
from s4mil_monai.training.places import find_bundle
from s4mil_monai.training.splits import Split


def run_piece(settings: ExperimentSettings, piece: Piece, tracking_uri: str) -> None:
    """Train one model on one fold through its bundle; goes on where an earlier start was stopped.

    Raises:
        ExperimentError: The bundle's configuration or its training failed; the text says how.
    """
    from monai.bundle.workflows import ConfigWorkflow

    started = time.perf_counter()
    configs = Path(find_bundle(piece.model.bundle)) / "configs"
    files = [configs / name for name in ("train.yaml", *piece.model.overlays)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ExperimentError(missing[0], f"is not there, but the model {piece.model.name} wants it")
    _refuse_unknown_settings(settings, piece, files)
    try:
        workflow = ConfigWorkflow(
            config_file=[str(file) for file in files],
            logging_file=False,
            workflow_type="train",
            **_overrides(settings, piece, tracking_uri),
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    except Exception as error:
        first = error
        while first.__cause__ is not None:
            first = first.__cause__
        raise ExperimentError(
            str(piece.folder), f"{type(first).__name__}: {' '.join(str(first).split())}"
        ) from error
    piece.finish(time.perf_counter() - started)


def _overrides(settings: ExperimentSettings, piece: Piece, tracking_uri: str) -> dict[str, Any]:
    dataset = _dataset(settings.dataset, piece.seed)
    return {
        "output_dir": str(piece.folder),
        "model_name": piece.model.name,
        "experiment_name": settings.name,
        "tracking_uri": tracking_uri,
        "fold": piece.fold,
        "seed": piece.seed,
        "weight_decay": dataset.settings.weight_decay,
        "split": {
            "_target_": "s4mil_monai.experiments.run_piece.load_split",
            "dataset": str(settings.dataset),
            "folds_table": str(piece.folds_table),
            "fold": piece.fold,
            "seed": piece.seed,
        },
        "bags": None,
        "dataset_dir": str(settings.dataset),
        **settings.settings,
        **piece.model.settings,
    }


def _refuse_unknown_settings(settings: ExperimentSettings, piece: Piece, files: list[Path]) -> None:
    """Refuse a setting that nothing in the bundle's configuration reads, such as a misspelled one."""
    from monai.bundle.config_parser import ConfigParser

    config = ConfigParser.load_config_files([str(file) for file in files])
    unknown = [key for key in {**settings.settings, **piece.model.settings} if not _has_place(config, key)]
    if unknown:
        raise ExperimentError(
            str(piece.folder), f"{piece.model.bundle} has no setting {', '.join(unknown)}; a misspelling?"
        )


def _has_place(config: Any, key: str) -> bool:
    """Whether ``train::trainer::max_epochs``, say, is there, or is an argument of what is made there."""
    *parents, name = key.replace("#", "::").split("::")
    for parent in parents:
        config = _entry(config, parent)
    return _entry(config, name) is not _ABSENT or (isinstance(config, dict) and "_target_" in config)


_ABSENT = object()


def _entry(config: Any, name: str) -> Any:
    if isinstance(config, list) and name.isdigit() and int(name) < len(config):
        return config[int(name)]
    return config.get(name, _ABSENT) if isinstance(config, dict) else _ABSENT


def load_split(dataset: str, folds_table: str, fold: int, seed: int) -> Split:
    """The bags of one fold; the data set is read once a process.

    Args:
        dataset: YAML of the data set.
        folds_table: CSV of its folds.
        fold: Which, counted from 0.
        seed: Of composed bags.
    """
    found = _dataset(Path(dataset), seed)
    return found.split(load_folds(found, Path(folds_table)), fold)


@lru_cache(maxsize=2)
def _dataset(path: Path, seed: int) -> Dataset:
    return load_data(path, seed)


def start_process(parent: int, threads: int) -> None:
    """Make a process ready for pieces: its share of the cores, quiet, and gone with its parent."""
    import ctypes
    import os
    import signal
    import sys
    import warnings

    import torch

    from s4mil_monai.allocator import keep_large_buffers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    keep_large_buffers()
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
