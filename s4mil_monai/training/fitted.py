"""Models that are fitted at once, without epochs, through the same folds, folder and table as the networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from ignite.engine import Engine
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score
from sklearn.preprocessing import label_binarize

from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.pooled import PooledForest, PooledModel, Pooling, fit_logistic
from s4mil_monai.training.engines import DurableFiles
from s4mil_monai.training.predictions import tabulate_bags, write_metrics
from s4mil_monai.training.splits import Split


class Handler(Protocol):
    """Of MONAI or Ignite."""

    def attach(self, engine: Engine) -> None: ...


def train_logistic(
    split: Split, network: SlideLogits, output_dir: str | Path, *, inverse_penalty: float = 1.0
) -> None:
    """Solve the logistic regression of a pooled model on the training bags, and write it as ``model.pt``.

    Validation bags are not trained on: it sees what the networks see.
    """
    model = cast(PooledModel, network.model)
    labels = [bag.label for bag in split.train]
    fit_logistic(model, (bag.features for bag in split.train), labels, C=inverse_penalty)
    DurableFiles(output_dir)(network.state_dict(), "model.pt")


def train_forest(
    split: Split,
    output_dir: str | Path,
    *,
    pooling: Pooling,
    model: str,
    fold: int | None = None,
    trees: int = 200,
    seed: int = 0,
    handlers: Sequence[Handler] = (),
) -> dict[str, float]:
    """Fit a forest on the training bags and report on the test bags, or on the validation bags if there are none.

    Writes ``forest.skops``, ``predictions.csv`` and ``metrics.json``. A forest has nothing to choose an epoch by,
    so validation bags are not trained on either: it sees what the networks see. ``handlers``, such as MLflow's,
    are shown the metrics as those of an evaluator.

    Returns:
        Metrics of the bags reported on, under the names the networks' have.
    """
    forest = PooledForest(pooling=pooling, classes=split.classes, trees=trees, seed=seed)
    forest.fit((bag.features for bag in split.train), [bag.label for bag in split.train])
    bags = split.test or split.validation
    probabilities = forest.predict_proba(bag.features for bag in bags)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    forest.save(folder / "forest.skops")
    tabulate_bags(probabilities, bags, model=model, fold=fold).to_csv(folder / "predictions.csv", index=False)
    labels = [bag.label for bag in bags]
    one_hot = label_binarize(labels, classes=list(range(split.classes)))
    of_classes = probabilities[:, 1] if split.classes == 2 else probabilities
    metrics = {
        "auroc": float(roc_auc_score(one_hot, of_classes)),
        "average_precision": float(average_precision_score(one_hot, of_classes)),
        "accuracy": float(accuracy_score(labels, probabilities.argmax(1))),
    }
    write_metrics(folder / "metrics.json", metrics)
    _show(metrics, handlers)
    return metrics


def _show(metrics: dict[str, float], handlers: Sequence[Handler]) -> None:
    evaluator = Engine(lambda engine, found: engine.state.metrics.update(found))
    for handler in handlers:
        handler.attach(evaluator)
    evaluator.run([metrics])
