"""Predictions as a table, one row a slide: ``model, fold, slide, patient, label, p_0, p_1, …``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
import pandas as pd
from ignite.engine import Engine, Events
from numpy.typing import ArrayLike
from sklearn.metrics import roc_auc_score
from torch import Tensor

from s4mil_monai.models.bag_model import BagModel, BagOutput
from s4mil_monai.training.bags import Bag
from s4mil_monai.training.objective import UNKNOWN


def tabulate_predictions(
    probabilities: ArrayLike,
    *,
    slides: Sequence[str],
    model: str,
    fold: int | None = None,
    patients: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Lay out (n, C) probabilities of n slides; what is not known stays empty."""
    p = np.asarray(probabilities, np.float64).reshape(len(slides), -1)
    columns: dict[str, Any] = {
        "model": model,
        "fold": pd.Series([fold] * len(slides), dtype="Int64"),
        "slide": list(slides),
        "patient": list(slides if patients is None else patients),
        "label": pd.Series([None] * len(slides) if labels is None else list(labels), dtype="Int64"),
    }
    return pd.DataFrame(columns | {f"p_{c}": p[:, c] for c in range(p.shape[1])})


def tabulate_bags(probabilities: ArrayLike, bags: Sequence[Bag], *, model: str, fold: int | None) -> pd.DataFrame:
    """Lay out (n, C) probabilities of n labelled bags."""
    return tabulate_predictions(
        probabilities,
        slides=[bag.slide for bag in bags],
        model=model,
        fold=fold,
        patients=[bag.patient for bag in bags],
        labels=[bag.label for bag in bags],
    )


class PredictionTable:
    """Ignite handler that writes an evaluator's predictions and metrics when it is done.

    Args:
        folder: Gets ``predictions.csv`` and, where the evaluator has metrics, ``metrics.json``.
        model: Name in the table.
        fold: Number in the table.
        bags: What is known of the slides; None where nothing is.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str,
        fold: int | None = None,
        bags: Sequence[Bag] | None = None,
    ):
        self.folder, self.model, self.fold = Path(folder), model, fold
        self._bags = None if bags is None else {bag.slide: bag for bag in bags}
        self._found: dict[str, np.ndarray] = {}

    def attach(self, engine: Engine) -> None:
        """Listen to an evaluator whose data has ``slide`` and whose output has probabilities as ``pred``."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._take)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        self._found.clear()

    def _take(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):  # type: ignore[arg-type]
            self._found[item["slide"]] = np.asarray(output["pred"].detach().cpu(), np.float64)

    def _write(self, engine: Engine) -> None:
        if idist.get_rank() > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tabulate().to_csv(self.folder / "predictions.csv", index=False)
        if engine.state.metrics:
            write_metrics(self.folder / "metrics.json", engine.state.metrics)

    def _tabulate(self) -> pd.DataFrame:
        slides = list(self._found)
        probabilities = np.stack(list(self._found.values()))
        if self._bags is None:
            return tabulate_predictions(probabilities, slides=slides, model=self.model, fold=self.fold)
        bags = [self._bags[slide] for slide in slides]
        return tabulate_bags(probabilities, bags, model=self.model, fold=self.fold)


class PatchMetrics:
    """Ignite handler that adds an evaluator's metrics of patches: Table 4's right half.

    ``patch_auroc`` and ``patch_accuracy`` are over all patches whose label is known, ``patch_auroc_per_slide`` is
    the mean over the slides that have patches of several classes. Where no label is known, none is added. Attach
    it before the handlers that show or write metrics.

    Args:
        model: Whose patch logits are measured, as the evaluator runs it, a bag at a time; one without any adds
            nothing.
        bags: What is known of the slides.
    """

    def __init__(self, model: BagModel, bags: Sequence[Bag]):
        self.model = model
        self._bags = {bag.slide: bag for bag in bags}
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._last: Tensor | None = None

    def attach(self, engine: Engine) -> None:
        """Listen to an evaluator whose data has ``slide``."""
        self.model.register_forward_hook(self._keep)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._take)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._measure)

    def _keep(self, model: BagModel, inputs: Any, output: BagOutput) -> None:
        self._last = output.patch_logits

    def _start(self, engine: Engine) -> None:
        self._scores.clear()
        self._labels.clear()

    def _take(self, engine: Engine) -> None:
        (item,) = cast(Any, engine.state.batch)
        labels = self._bags[item["slide"]].patch_labels
        if self._last is None or labels is None or not (known := labels != UNKNOWN).any():
            return
        self._scores.append(self._last[0].softmax(-1).double().cpu().numpy()[known])
        self._labels.append(labels[known])

    def _measure(self, engine: Engine) -> None:
        if not self._labels:
            return
        scores, labels = np.concatenate(self._scores), np.concatenate(self._labels)
        per_slide = [_auroc(*slide) for slide in zip(self._labels, self._scores, strict=True)]
        engine.state.metrics |= {
            "patch_auroc": _auroc(labels, scores),
            "patch_accuracy": float((scores.argmax(1) == labels).mean()),
            "patch_auroc_per_slide": float(np.nanmean(per_slide)) if np.isfinite(per_slide).any() else np.nan,
        }


def _auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the curve of (n, P) scores, one class against the rest; not a number where a class is missing."""
    if len(np.unique(labels)) < scores.shape[1]:
        return np.nan
    return float(roc_auc_score(labels, scores[:, 1] if scores.shape[1] == 2 else scores, multi_class="ovr"))


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write numbers as JSON; those that are not defined, as AUROC of one class, as null."""
    plain = {name: float(value) for name, value in metrics.items()}
    finite = {name: value if np.isfinite(value) else None for name, value in plain.items()}
    path.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
