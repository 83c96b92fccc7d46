"""Figures: what is drawn is what was measured."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

from s4mil_monai.errors import OutputError, TableError, UnknownNameError
from s4mil_monai.statistics.figures import (
    ROC_GRID,
    plot_confusion,
    plot_reliability,
    plot_roc,
    plot_training_curves,
    save_figure,
)
from tests.statistics.examples import simulate


def drawn(axes, label: str) -> np.ndarray:
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return np.asarray(line.get_xydata())


def test_roc_is_that_of_scikit_learn_with_its_auroc():
    frame = simulate({"a": 1.0})
    axes = plot_roc(frame, resamples=50).axes[0]
    alarms, hits, _ = roc_curve(frame["label"], frame["p_1"], drop_intermediate=False)
    np.testing.assert_allclose(drawn(axes, "a:"), np.stack([alarms, hits], -1))
    area = roc_auc_score(frame["label"], frame["p_1"])
    assert axes.get_legend().get_texts()[0].get_text().startswith(f"a: {area:.3f} (")


def test_roc_of_several_seeds_is_their_mean_at_equal_specificity():
    frame = simulate({"a": 1.0}, seeds=2)
    found = drawn(plot_roc(frame, resamples=20).axes[0], "a:")
    wanted = []
    for _, part in frame.groupby("seed"):
        alarms, hits, _ = roc_curve(part["label"], part["p_1"], drop_intermediate=False)
        wanted.append(np.interp(ROC_GRID, alarms, hits))
    np.testing.assert_allclose(found[1:, 1], np.mean(wanted, 0))
    np.testing.assert_array_equal(found[0], [0, 0])


def test_band_lies_about_the_curve_and_narrows_with_more_slides():
    def width(slides):
        axes = plot_roc(simulate({"a": 1.0}, slides=slides), resamples=200).axes[0]
        band = np.asarray(axes.collections[0].get_paths()[0].vertices)
        at_half = band[np.isclose(band[:, 0], 0.3)]
        curve = drawn(axes, "a:")
        assert at_half[:, 1].min() <= np.interp(0.3, *curve.T) <= at_half[:, 1].max()
        return np.ptp(at_half[:, 1])

    # spread falls with the square root of the number
    assert width(1600) == pytest.approx(width(100) / 4, rel=0.5)


def test_roc_of_one_class_of_three_is_against_the_rest():
    frame = simulate({"a": 1.5}, classes=3)
    text = plot_roc(frame, positive=2, resamples=20).axes[0].get_legend().get_texts()[0].get_text()
    assert text.startswith(f"a: {roc_auc_score(frame['label'] == 2, frame['p_2']):.3f}")


def test_roc_without_negatives_or_of_an_unknown_model_is_refused():
    frame = simulate({"a": 1.0})
    with pytest.raises(TableError, match="a ROC of class 1 needs slides of it and of others"):
        plot_roc(frame[frame["label"] == 1])
    with pytest.raises(UnknownNameError, match="unknown model 'b'"):
        plot_roc(frame, ["b"])


def test_confusion_shows_counts_by_true_and_predicted_class():
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 2])
    axes = plot_confusion(labels, predicted, ["x", "y", "z"]).axes[0]
    counts = np.array([int(text.get_text().split()[0]) for text in axes.texts]).reshape(3, 3)
    np.testing.assert_array_equal(counts, confusion_matrix(labels, predicted))
    assert axes.texts[0].get_text() == "2\n67%"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Predicted", "True")


def test_confusion_of_a_class_without_a_slide_is_drawn():
    assert plot_confusion(np.array([0]), np.array([0]), ["x", "y"]).axes[0].texts[3].get_text() == "0\n0%"


def test_confusion_with_more_classes_than_names_is_refused():
    with pytest.raises(ValueError, match="classes are 0 to 1, one for each of x, y"):
        plot_confusion(np.array([0, 2]), np.array([0, 1]), ["x", "y"])


def test_reliability_has_the_points_of_scikit_learn():
    frame = simulate({"a": 1.0}, slides=300)
    p = frame[["p_0", "p_1"]].to_numpy()
    axes = plot_reliability(frame["label"].to_numpy(), p).axes[0]
    points = np.asarray(axes.containers[0].lines[0].get_xydata())
    share, mean = calibration_curve(frame["label"], frame["p_1"], n_bins=10)
    np.testing.assert_allclose(points, np.stack([mean, share], -1))
    (bars,) = axes.containers[0].lines[2]
    low, high = np.array([segment[:, 1] for segment in bars.get_segments()]).T
    assert ((low <= share) & (share <= high)).all()
    assert ((low >= 0) & (high <= 1)).all()


def test_reliability_of_three_classes_is_of_the_predicted_one():
    frame = simulate({"a": 1.0}, classes=3)
    figure = plot_reliability(frame["label"].to_numpy(), frame[["p_0", "p_1", "p_2"]].to_numpy())
    assert figure.axes[1].get_xlabel() == "Probability of the predicted class"


def history() -> pd.DataFrame:
    rows = [
        (epoch, "loss", 1 / epoch + fold, fold, part)
        for fold, last in ((0, 6), (1, 4), (2, 2))
        for epoch in range(1, last + 1)
        for part in ("train", "validation")
    ]
    return pd.DataFrame(rows, columns=["epoch", "metric", "value", "fold", "part"])


def test_curves_show_every_fold_and_their_mean_while_half_of_them_train():
    axes = plot_training_curves(history()).axes[0]
    # folds of 6, 4 and 2 epochs: two of three are there until 4
    np.testing.assert_allclose(drawn(axes, "train"), [[1, 2], [2, 1.5], [3, 1 / 3 + 0.5], [4, 0.75]])
    assert len(axes.lines) == 2 * (3 + 1)


def test_part_has_one_colour_in_every_panel():
    only_validation = history().query("part == 'validation'").assign(metric="auroc")
    first, second = plot_training_curves(pd.concat([history(), only_validation])).axes
    assert first.lines[-1].get_color() == second.lines[-1].get_color()


def test_single_run_needs_neither_fold_nor_part():
    axes = plot_training_curves(pd.DataFrame({"epoch": [1, 2], "metric": "loss", "value": [1.0, 0.5]})).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 1], [2, 0.5]])


def test_history_without_a_column_is_refused():
    with pytest.raises(TableError, match="training history: lacks value"):
        plot_training_curves(history().drop(columns="value"))


def test_figure_is_written_in_every_format_and_twice_the_same(tmp_path):
    def written(folder):
        return save_figure(
            plot_training_curves(history()), tmp_path / folder / "curves.png", ("png", "svg", "pdf")
        )

    first, second = written("a"), written("b")
    assert [path.name for path in first] == ["curves.png", "curves.svg", "curves.pdf"]
    assert [path.read_bytes()[:4] for path in first] == [b"\x89PNG", b"<?xm", b"%PDF"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert "Epoch" in first[1].read_text()  # text stays text


def test_name_with_a_point_keeps_it(tmp_path):
    (path,) = save_figure(plot_training_curves(history()), tmp_path / "fold0.v2", ["png"])
    assert path.name == "fold0.v2.png"


def test_format_or_place_that_is_none_is_refused(tmp_path):
    figure = plot_training_curves(history())
    with pytest.raises(ValueError, match="written as png, svg, pdf, got gif"):
        save_figure(figure, tmp_path / "curves", ["gif"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_figure(figure, tmp_path / "file" / "curves")


def test_drawing_leaves_pyplot_and_torch_alone():
    code = "import sys, s4mil_monai.statistics.figures; print({'matplotlib.pyplot', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
