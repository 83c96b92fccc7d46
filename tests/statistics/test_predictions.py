"""The table of out-of-fold predictions: what is refused, with the rows named, and how runs are made."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from s4mil_monai.errors import TableError, UnknownNameError
from s4mil_monai.statistics.predictions import (
    check_predictions,
    has_same_folds,
    is_cross_validation,
    models_of,
    pool_runs,
    read_predictions,
    rows_of,
)
from tests.statistics.examples import simulate


def table(**changes: list) -> pd.DataFrame:
    columns = {
        "model": ["a", "a"],
        "fold": [0, 1],
        "slide": ["s1", "s2"],
        "patient": ["p1", "p2"],
        "label": [0, 1],
        "p_0": [0.75, 0.25],
        "p_1": [0.25, 0.75],
    }
    return pd.DataFrame(columns | changes)


def test_table_comes_back_from_csv_as_it_was_written(tmp_path):
    frame = simulate({"a": 1.0, "b": 0.5}, seeds=2)
    frame.to_csv(tmp_path / "predictions.csv", index=False)
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "predictions.csv"), frame)


def test_names_that_look_like_numbers_or_nothing_stay_text(tmp_path):
    table(slide=["007", "NA"], patient=["1e5", "null"]).to_csv(tmp_path / "t.csv", index=False)
    frame = read_predictions(tmp_path / "t.csv")
    assert frame["slide"].tolist() == ["007", "NA"]
    assert frame["patient"].tolist() == ["1e5", "null"]


def test_seed_is_0_where_the_column_is_absent():
    assert check_predictions(table())["seed"].tolist() == [0, 0]


def test_probabilities_rounded_by_whoever_wrote_them_are_made_to_add_up():
    frame = check_predictions(table(p_0=[0.7504, 0.25]))
    np.testing.assert_allclose(frame[["p_0", "p_1"]].sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": [0, 2]}, r"label is none of the classes 0 to 1: row 2 \(slide s2\)"),
        ({"label": [0, 0.5]}, r"label is no whole number from 0 on: row 2 \(slide s2\)"),
        ({"fold": [-1, 0]}, r"fold is no whole number from 0 on: row 1 \(slide s1\)"),
        ({"p_0": [0.75, 0.5]}, r"do not add up to 1: row 2 \(slide s2\)"),
        ({"p_0": [1.25, 0.25], "p_1": [-0.25, 0.75]}, r"outside \[0, 1\]: row 1 \(slide s1\)"),
        ({"p_0": [1.0005, 0.25], "p_1": [0.0, 0.75]}, r"outside \[0, 1\]: row 1 \(slide s1\)"),
        ({"p_1": [0.25, None]}, r"p_1 is no number: row 2 \(slide s2\)"),
        ({"p_1": ["high", 0.75]}, r"p_1 is no number: row 1 \(slide s1\)"),
        ({"patient": ["p1", " "]}, r"patient is empty: row 2 \(slide s2\)"),
        ({"slide": ["s1", "s1"], "fold": [0, 0]}, r"comes twice in one fold of one model and seed: row 2"),
        ({"slide": ["s1", "s1"]}, r"more than one label: row 1 \(slide s1\), row 2 \(slide s1\)"),
        ({"patient": ["p1", "p1"]}, r"one patient lie in more than one fold: row 1 \(slide s1\), row 2"),
        ({"logit_0": [1.0, 2.0]}, "has 1 logits and 2 probabilities"),
    ],
)
def test_wrong_table_is_refused_with_its_rows_named(changes, message):
    with pytest.raises(TableError, match=message):
        check_predictions(table(**changes), "oof.csv")


def test_missing_columns_are_named_beside_those_there_are():
    with pytest.raises(TableError, match=r"oof\.csv: lacks patient; it has model, fold, slide"):
        check_predictions(table().drop(columns="patient"), "oof.csv")
    with pytest.raises(TableError, match="lacks p_0 and p_1"):
        check_predictions(table().rename(columns={"p_0": "p0"}))


def test_only_the_first_rows_of_many_are_named():
    frame = pd.concat([table(label=[7, 7], slide=[f"s{i}", f"t{i}"]) for i in range(5)])
    with pytest.raises(TableError, match=r"row 5 \(slide s2\) and 5 more$"):
        check_predictions(frame)


def test_table_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    for name in ("missing.csv", "empty.csv"):
        with pytest.raises(TableError, match=f"{name}: cannot be read"):
            read_predictions(tmp_path / name)
    table().head(0).to_csv(tmp_path / "header.csv", index=False)
    with pytest.raises(TableError, match="holds no rows"):
        read_predictions(tmp_path / "header.csv")


def test_checked_table_is_a_copy():
    frame = table(label=["0", "1"])
    check_predictions(frame)
    assert frame["label"].tolist() == ["0", "1"]


def test_folds_of_a_seed_make_one_run_in_cross_validation():
    frame = simulate({"a": 1.0}, seeds=3)
    pooled = pool_runs(frame, "a")
    assert pooled.probabilities.shape == (3, 120, 2)
    assert pooled.is_complete
    row = frame[(frame["seed"] == 1) & (frame["slide"] == "s0017")].iloc[0]
    at = pooled.slides.tolist().index("s0017")
    assert pooled.probabilities[1, at, 1] == row["p_1"]
    assert (pooled.labels[at], pooled.patients[at]) == (row["label"], row["patient"])


def test_each_fold_is_a_run_where_all_are_tested_on_the_same_slides():
    official = check_predictions(pd.concat([table(fold=[fold, fold]) for fold in range(4)]))
    assert not is_cross_validation(official)
    assert pool_runs(official, "a").probabilities.shape == (4, 2, 2)


def test_run_that_has_not_seen_a_slide_has_nan_there():
    overlapping = pd.concat([table(fold=[0, 0]), table(fold=[1, 1]).head(1)])
    pooled = pool_runs(check_predictions(overlapping), "a")
    assert not pooled.is_complete
    np.testing.assert_array_equal(np.isnan(pooled.probabilities[:, :, 0]), [[False, False], [False, True]])


def test_folds_drawn_anew_for_each_seed_are_told_from_the_same_ones():
    frame = simulate({"a": 1.0}, seeds=2)
    assert has_same_folds(frame)
    redrawn = frame.assign(fold=(frame["fold"] + frame["seed"]) % 5)
    assert not has_same_folds(redrawn)


def test_unknown_model_is_refused_and_the_known_are_listed():
    frame = simulate({"b": 1.0, "a": 1.0})
    assert models_of(frame) == ["b", "a"]
    with pytest.raises(UnknownNameError, match="unknown model 'c'; known: b, a"):
        rows_of(frame, "c")
