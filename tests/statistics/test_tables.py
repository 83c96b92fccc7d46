"""Tables: the numbers in them, and the text of every format."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pandas as pd
import pytest

from s4mil_monai.errors import OutputError, TableError, UnknownNameError
from s4mil_monai.statistics.metrics import METRICS, measure
from s4mil_monai.statistics.predictions import check_predictions
from s4mil_monai.statistics.tables import (
    Table,
    long_slides,
    summarize,
    table_of_differences,
    table_of_long_slides,
    table_of_models,
    table_of_multitask,
    table_of_summary,
    to_csv,
    to_latex,
    to_markdown,
    write_table,
)
from tests.statistics.examples import simulate


def hand_made() -> pd.DataFrame:
    """Two folds of four slides: a is right in 4 and 2 of them, b in 3 and 3."""
    p = {"a": [0.1, 0.2, 0.8, 0.9, 0.6, 0.2, 0.4, 0.9], "b": [0.6, 0.2, 0.8, 0.9, 0.2, 0.2, 0.4, 0.9]}
    facts = {"fold": [0] * 4 + [1] * 4, "slide": list("stuvwxyz"), "patient": list("stuvwxyz")}
    facts |= {"label": [0, 0, 1, 1] * 2}
    parts = [pd.DataFrame({"model": m} | facts | {"p_0": 1 - np.array(q), "p_1": q}) for m, q in p.items()]
    return check_predictions(pd.concat(parts))


def cell(table: Table, model: str, column) -> str:
    cells = table.cells
    name = ("", "Model") if cells.columns.nlevels == 2 else "Model"
    return cells.loc[cells[name] == model, column].item()


def test_summary_holds_fold_means_and_pooled_values_of_every_metric():
    frame = simulate({"a": 1.5, "b": 0.5}, slides=200)
    summary = summarize(frame, list(METRICS), resamples=100).set_index(["model", "metric"])
    rows = frame[frame["model"] == "b"]
    for metric in METRICS:
        found = summary.loc[("b", metric)]
        assert found["pooled"] == pytest.approx(
            measure(metric, rows["label"].to_numpy(), rows[["p_0", "p_1"]].to_numpy()).value
        )
        by_fold = [
            measure(metric, part["label"].to_numpy(), part[["p_0", "p_1"]].to_numpy()).value
            for _, part in rows.groupby("fold")
        ]
        assert (found["fold_mean"], found["fold_sd"]) == pytest.approx((np.mean(by_fold), np.std(by_fold, ddof=1)))
        if metric != "calibration_error":
            assert found["low"] < found["pooled"] < found["high"]
    assert (summary["folds"] == 5).all()
    assert (summary["note"] == "").all()


def test_summary_has_delongs_interval_beside_the_bootstraps_of_the_auroc_alone():
    frame = simulate({"a": 1.5}, slides=240, per_patient=2)
    summary = summarize(frame, ["accuracy", "auroc"], resamples=400).set_index("metric")
    found = summary.loc["auroc", ["delong_low", "delong_high"]].astype(float)
    assert found.tolist() == pytest.approx(summary.loc["auroc", ["low", "high"]].astype(float).tolist(), abs=0.02)
    assert summary.loc["accuracy", ["delong_low", "delong_high"]].isna().all()
    of_slides = summarize(frame.assign(patient=frame["slide"]), ["auroc"], resamples=50)
    assert (
        found["delong_high"] - found["delong_low"] > 1.2 * (of_slides["delong_high"] - of_slides["delong_low"])[0]
    )


def test_fold_of_one_class_is_left_out_and_the_summary_says_so():
    frame = hand_made()
    lonely = frame.assign(fold=[0, 0, 0, 0, 1, 1, 2, 2] * 2)
    summary = summarize(lonely, ["auroc", "accuracy"], resamples=50).set_index(["model", "metric"])
    found = summary.loc[("a", "auroc")]
    assert (found["folds"], found["fold_mean"]) == (1, 1.0)
    assert math.isnan(found["fold_sd"])
    assert found["note"].startswith("2 of 3 folds left out (fold 1: none of the 2 slides is of class 1)")
    assert summary.loc[("a", "accuracy"), "folds"] == 3
    table = table_of_models({"hand": lonely})
    assert cell(table, "a", ("hand", "AUROC")) == "1.000"
    assert "hand, AUROC: folds without a value left out (1, 2)." in table.notes


def test_table_1_has_means_and_deviations_over_folds_by_data_set():
    table = table_of_models({"one": hand_made(), "two": hand_made().query("model == 'a'")}, title="T")
    # a: 4/4 and 2/4; b: 3/4 and 3/4. The deviation of 1 and 1/2 is .354
    assert cell(table, "a", ("one", "Accuracy")) == "0.750 ± 0.354"
    assert cell(table, "b", ("one", "Accuracy")) == "0.750 ± 0.000"
    # a in fold 1: negatives .6 .2, positives .4 .9: 3 of 4 pairs; mean of 1 and .75
    assert cell(table, "a", ("one", "AUROC")) == "0.875 ± 0.177"
    assert cell(table, "b", ("two", "AUROC")) == ""


def test_table_3_has_differences_from_the_reference_with_p_values():
    frame = simulate({"good": 2.5, "poor": 0.3}, slides=200)
    table = table_of_differences(frame, "good", test="delong", resamples=200)
    assert table.cells.columns.tolist() == ["Model", "Accuracy", "AUROC", "Difference", "p", "p (Holm)"]
    assert cell(table, "good", "Difference") == cell(table, "good", "p") == ""
    assert cell(table, "poor", "Difference").startswith("−0.")
    assert " to −0." in cell(table, "poor", "Difference")
    assert cell(table, "poor", "p") == cell(table, "poor", "p (Holm)") == "<0.001"
    assert any("Difference in AUROC from good; p-values of the test delong" in note for note in table.notes)


def test_table_3_of_another_test_than_there_are_is_refused():
    with pytest.raises(
        UnknownNameError, match="unknown test 'wilcoxon'; known: delong, paired_t, corrected_t, mcnemar"
    ):
        table_of_differences(hand_made(), "a", test="wilcoxon", resamples=20)


def test_table_4_has_the_metrics_of_patches_where_a_model_has_them():
    patches = [("b", 0, 0, 0.9), ("b", 0, 1, 0.7), ("b", 1, 0, 0.6), ("b", 1, 1, 0.6)]
    values = pd.DataFrame(patches, columns=["model", "fold", "seed", "value"]).assign(metric="auroc")
    table = table_of_multitask(hand_made(), values)
    # means over seeds .8 and .6
    assert cell(table, "b", ("Patches", "AUROC")) == "0.700 ± 0.141"
    assert cell(table, "a", ("Patches", "AUROC")) == "–"
    assert cell(table, "a", ("Slides", "Accuracy")) == "0.750 ± 0.354"


def test_patch_values_of_unknown_models_or_without_columns_are_refused():
    values = pd.DataFrame({"model": ["c"], "fold": [0], "metric": ["auroc"], "value": [0.5]})
    with pytest.raises(TableError, match="patch values: are of c, which the predictions do not have"):
        table_of_multitask(hand_made(), values)
    with pytest.raises(TableError, match="patch values: lack metric"):
        table_of_multitask(hand_made(), values.drop(columns="metric"))


def test_long_slides_are_those_at_or_above_the_percentile_of_length():
    # lengths 1 to 8; the 85th percentile lies 0.85 * 7 = 5.95 steps above 1
    lengths = {slide: n for n, slide in enumerate("stuvwxyz", 1)}
    kept = long_slides(hand_made(), lengths)
    assert sorted(set(kept["slide"])) == ["y", "z"]
    assert set(kept["model"]) == {"a", "b"}
    equal = long_slides(hand_made(), dict.fromkeys("stuvwxyz", 100))
    assert equal["slide"].nunique() == 8
    assert set(long_slides(hand_made(), lengths, percentile=100)["slide"]) == {"z"}


def test_length_of_a_slide_counts_once_however_many_models_and_seeds_there_are():
    frame = hand_made()
    more_of_one = pd.concat([frame, frame[frame["slide"] == "z"].assign(seed=1)])
    lengths = {slide: n for n, slide in enumerate("stuvwxyz", 1)}
    assert set(long_slides(more_of_one, lengths)["slide"]) == {"y", "z"}


def test_slides_of_unknown_length_are_named():
    with pytest.raises(
        TableError, match="CAMELYON16: the number of patches is not known of t, u, v, w, x and 2 more"
    ):
        long_slides(hand_made(), {"s": 3}, where="CAMELYON16")
    with pytest.raises(ValueError, match="between 0 and 100, got 850"):
        long_slides(hand_made(), {}, percentile=850)


def test_table_5_says_how_many_slides_it_is_of():
    lengths = {slide: 1000 * n for n, slide in enumerate("stuvwxyz", 1)}
    table = table_of_long_slides({"hand": hand_made()}, {"hand": lengths}, percentile=50)
    assert table.notes[-1] == "hand: 4 of 8 slides, from 5,000 patches on."
    # the last four slides: a is right in 2, b in 3
    assert cell(table, "a", ("hand", "Accuracy")) == "0.500"
    assert cell(table, "b", ("hand", "Accuracy")) == "0.750"


def test_summary_is_printed_with_both_readings_and_its_notes():
    table = table_of_summary(summarize(hand_made(), ["accuracy", "brier"], resamples=200), title="T")
    assert cell(table, "a", ("Accuracy", "folds")) == "0.750 ± 0.354"
    assert cell(table, "a", ("Accuracy", "pooled")).startswith("0.750 (0.")
    assert "Lower is better: Brier score." in table.notes


AWKWARD = Table(
    "50 % & more",
    pd.DataFrame(
        {("", "Model"): ["S4_MIL", "a|b"], ("RCC", "Acc"): ["0.9 ± 0.1", "–"], ("RCC", "p"): ["<0.001", "−0.2"]}
    ),
    ("Note #1.",),
)


def test_markdown_text():
    assert to_markdown(AWKWARD) == (
        "**50 % & more**\n"
        "\n"
        "| Model | RCC Acc | RCC p |\n"
        "| :-- | --: | --: |\n"
        "| S4_MIL | 0.9 ± 0.1 | <0.001 |\n"
        "| a\\|b | – | −0.2 |\n"
        "\n"
        "Note #1.\n"
    )


def test_csv_text_is_read_back():
    rows = list(csv.reader(io.StringIO(to_csv(AWKWARD))))
    assert rows == [["Model", "RCC Acc", "RCC p"], ["S4_MIL", "0.9 ± 0.1", "<0.001"], ["a|b", "–", "−0.2"]]


def test_latex_text_is_escaped_and_ruled():
    assert to_latex(AWKWARD) == (
        "\\begin{table}\n"
        "\\centering\n"
        "\\caption{50 \\% \\& more}\n"
        "\\begin{tabular}{lrr}\n"
        "\\toprule\n"
        "\\multicolumn{1}{c}{} & \\multicolumn{2}{c}{RCC} \\\\\n"
        "\\cmidrule(lr){2-3}\n"
        "Model & Acc & p \\\\\n"
        "\\midrule\n"
        "S4\\_MIL & 0.9 $\\pm$ 0.1 & \\textless{}0.001 \\\\\n"
        "a|b & -- & $-$0.2 \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
        "\\par\\smallskip {\\footnotesize Note \\#1.}\n"
        "\\end{table}\n"
    )


@pytest.mark.parametrize("text", ["\\input{x}", "a~b^c", "{}$%"])
def test_names_cannot_command_latex(text):
    table = Table("", pd.DataFrame({"Model": [text]}))
    (row,) = [line for line in to_latex(table).splitlines() if line.endswith(r"\\") and "Model" not in line]
    for harmless in (
        r"\textbackslash{}",
        r"\textasciitilde{}",
        r"\textasciicircum{}",
        *(f"\\{c}" for c in "{}$%_&#"),
    ):
        row = row.replace(harmless, "")
    assert not set(row.removesuffix(r" \\")) & set("\\{}$%_&#~^")


def test_table_is_written_in_the_format_of_its_name(tmp_path):
    for suffix, writer in ((".md", to_markdown), (".csv", to_csv), (".tex", to_latex)):
        path = write_table(AWKWARD, tmp_path / f"table{suffix}")
        assert path.read_text(encoding="utf-8") == writer(AWKWARD)
    with pytest.raises(ValueError, match=r"written as \.md, \.csv, \.tex, got table\.xlsx"):
        write_table(AWKWARD, tmp_path / "table.xlsx")
    with pytest.raises(OutputError, match="cannot be written"):
        write_table(AWKWARD, tmp_path / "no folder" / "table.md")
