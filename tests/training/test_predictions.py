"""The table of predictions, of networks and of forests."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from s4mil_monai.models.pooled import load_forest
from s4mil_monai.training.bags import LabelledBag
from s4mil_monai.training.fitted import train_forest
from s4mil_monai.training.predictions import tabulate_predictions, write_metrics
from s4mil_monai.training.splits import Split


def test_table_has_a_column_for_each_class_and_leaves_what_is_not_known_empty(tmp_path):
    table = tabulate_predictions([[0.1, 0.2, 0.7]], slides=["007"], model="m")
    table.to_csv(tmp_path / "p.csv", index=False)
    assert (
        tmp_path / "p.csv"
    ).read_text() == "model,fold,slide,patient,label,p_0,p_1,p_2\nm,,007,007,,0.1,0.2,0.7\n"


def test_metric_that_is_not_defined_is_null(tmp_path):
    write_metrics(tmp_path / "m.json", {"auroc": np.float64("nan"), "accuracy": np.float32(0.5)})
    assert json.loads((tmp_path / "m.json").read_text()) == {"auroc": None, "accuracy": 0.5}


def bags(count: int, classes: int, name: str) -> list[LabelledBag]:
    generator = np.random.default_rng(count)
    features = generator.normal(size=(count, 5, 4)).astype(np.float32)
    labels = np.arange(count) % classes
    features[:, :, 0] += labels[:, None]
    return [LabelledBag(f"{name}{i}", features[i], int(labels[i]), f"p{i}") for i in range(count)]


@pytest.mark.parametrize("classes", [2, 3])
def test_forest_reports_on_the_test_bags_in_the_same_table(tmp_path, classes):
    split = Split(bags(30, classes, "a"), bags(9, classes, "b"), bags(12, classes, "c"))
    metrics = train_forest(split, tmp_path, pooling="mean", model="forest_mean", fold=3, trees=20)
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert list(table.columns) == [
        "model",
        "fold",
        "slide",
        "patient",
        "label",
        *[f"p_{c}" for c in range(classes)],
    ]
    assert list(table["slide"]) == [f"c{i}" for i in range(12)]
    assert (table["fold"] == 3).all()
    scores = table[[f"p_{c}" for c in range(classes)]].to_numpy()
    wanted = roc_auc_score(table["label"], scores[:, 1] if classes == 2 else scores, multi_class="ovr")
    assert metrics["auroc"] == pytest.approx(wanted)
    again = load_forest(tmp_path / "forest.skops").predict_proba([bag.features for bag in split.test])
    np.testing.assert_allclose(again, scores)


def test_forest_without_test_bags_reports_on_those_of_validation(tmp_path):
    train_forest(Split(bags(10, 2, "a"), bags(4, 2, "b")), tmp_path, pooling="max", model="forest_max", trees=5)
    assert list(pd.read_csv(tmp_path / "predictions.csv")["slide"]) == ["b0", "b1", "b2", "b3"]
