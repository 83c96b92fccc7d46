"""Training through the bundles, as a user runs it: one command, or the same configuration in this process."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigWorkflow
from sklearn.metrics import roc_auc_score

from s4mil_monai.features.store import save_bag
from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.training.composed import BagRecipe, compose_split
from tests.features.test_store import make_bag
from tests.training.test_composed import tiles

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
MODELS = sorted(path.stem for path in (BUNDLES / "s4mil_slide" / "configs" / "models").glob("*.yaml"))
TINY = {"network_def::model::width": 8, "network_def::model::state_dim": 4}
BAGS = {
    "split::train": 8, "split::validation": 6, "split::test": 6,
    "split::recipe::length": [50, 300], "split::apart": "tile",
}  # fmt: skip
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # two libraries of threads on two cores wait for each other

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]


@pytest.fixture(autouse=True)
def one_thread():
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Features of tiles whose kinds a model can tell apart, to compose bags of."""
    folder = tmp_path_factory.mktemp("tiles")
    generator = np.random.default_rng(0)
    labels = tiles().labels
    features = generator.normal(size=(len(labels), 6)).astype(np.float32)
    features[:, 0] += 3 * (labels == "AC")
    np.savez(folder / "tiles.npz", features=features, labels=labels)
    return folder


def configs(*overlays: str, bundle: str = "s4mil_slide") -> list[str]:
    return [str(BUNDLES / bundle / "configs" / f"{name}.yaml") for name in ("train", *overlays)]


def train(output: Path, *overlays: str, bundle: str = "s4mil_slide", epochs: int = 2, **overrides) -> Path:
    """In this process, without MLflow and logs."""
    options = {"output_dir": str(output), "quiet": True, "train::trainer::max_epochs": epochs, **overrides}
    workflow = ConfigWorkflow(configs(*overlays, bundle=bundle), logging_file=False, run_id="training", **options)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return output


def compose(output: Path, folder: Path, *overlays: str, **overrides) -> Path:
    """The same on composed bags, with a small model where no overlay brings another."""
    tiny = {} if overlays else TINY
    return train(output, "composed", *overlays, **{"dataset_dir": str(folder), **BAGS, **tiny, **overrides})


def history(output: Path) -> pd.DataFrame:
    return pd.read_csv(output / "history.csv").drop(columns="seconds")


def command(*arguments: str, launcher: tuple[str, ...] = ("-m", "monai.bundle")) -> list[str]:
    return [sys.executable, *launcher, "run", "training", *arguments]


def options_of(**options) -> list[str]:
    return [f"--{key}={value}" for key, value in options.items()]


def test_command_trains_from_anywhere_and_tracks_the_run(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"config_file": configs()[0], "output_dir": "out", **TINY}))
    finished = subprocess.run(
        command("--args_file=args.json", *options_of(**{"train::trainer::max_epochs": 2, "learning_rate": 0.001})),
        cwd=tmp_path, capture_output=True, text=True, env=ONE_THREAD,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "val_auroc" in finished.stdout
    out = tmp_path / "out"
    state = torch.load(out / "model.pt", weights_only=True)
    SlideLogits(S4MIL(708, width=8, state_dim=4)).load_state_dict(state)
    with sqlite3.connect(out / "mlruns.db") as database:
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]
        parameters = dict(database.execute("select key, value from params"))
        metrics = database.execute("select key, step, value from metrics").fetchall()
        (artifacts,) = database.execute("select artifact_uri from runs").fetchone()
    assert (parameters["learning_rate"], parameters["max_epochs"]) == ("0.001", "2")
    steps = {key: [step for name, step, _ in metrics if name == key] for key, _, _ in metrics}
    for name in ("train_loss", "train_auroc", "val_auroc", "val_accuracy", "learning_rate", "epoch_s"):
        assert steps[name] == [1, 2]
    assert {"auroc", "accuracy", "average_precision"} <= steps.keys()
    kept = {path.name for path in Path(artifacts.removeprefix("file://")).iterdir()}
    assert kept == {
        "config.json", "environment.txt", "history.csv", "curves.png", "predictions.csv", "metrics.json",
        "model.pt",
    }  # fmt: skip
    executed = json.loads((out / "config.json").read_text())["config"]
    assert executed["train"]["trainer"]["max_epochs"] == 2  # overrides are part of it
    rows = pd.read_csv(out / "predictions.csv")
    assert list(rows.columns) == ["model", "fold", "slide", "patient", "label", "p_0", "p_1"]
    assert len(rows) == 12  # a fifth of 58


CHANCE = {"bag_dropout": 0.3, "feature_noise": 0.5, "accumulate_bags": 3, "learning_rate": 0.01}


def test_two_runs_with_one_seed_give_the_same_numbers_and_another_seed_others(tmp_path, folder):
    first, second = (compose(tmp_path / name, folder, **CHANCE) for name in ("a", "b"))
    assert history(first).equals(history(second))
    assert (first / "predictions.csv").read_bytes() == (second / "predictions.csv").read_bytes()
    other = compose(tmp_path / "c", folder, **CHANCE, **{"seed": 1, "split::seed": 0})
    assert not history(first)["train_loss"].equals(history(other)["train_loss"])


def test_killed_run_goes_on_to_the_numbers_of_one_that_was_not(tmp_path, folder):
    settings = {**CHANCE, **TINY, **BAGS, "quiet": True, "dataset_dir": folder}
    settings |= {"lr_scheduler::_target_": "torch.optim.lr_scheduler.ExponentialLR", "lr_scheduler::gamma": 0.9}
    settings["lr_scheduler"] = {"_target_": settings.pop("lr_scheduler::_target_")}
    settings["lr_scheduler"] |= {"optimizer": "@optimizer", "gamma": settings.pop("lr_scheduler::gamma")}
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(
            f"--config_file={configs('composed')}",
            *options_of(output_dir=killed, **{"train::trainer::max_epochs": 100000}, **settings),
            "--early_stop::patience=100000",
        ),
        env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: last_epoch(killed) >= 4, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = last_epoch(killed)
    settings["dataset_dir"] = str(folder)
    settings["early_stop::patience"] = 1000
    resumed = train(killed, "composed", epochs=done + 4, **settings)
    whole = train(tmp_path / "whole", "composed", epochs=done + 4, **settings)
    assert len(history(whole)) == done + 4
    pd.testing.assert_frame_equal(history(resumed), history(whole), rtol=1e-6)
    table, wanted = (pd.read_csv(run / "predictions.csv") for run in (resumed, whole))
    pd.testing.assert_frame_equal(table, wanted, rtol=1e-5)


def last_epoch(run: Path) -> int:
    """Of the checkpoints of a run; 0 before there is one."""
    return max((int(path.stem.removeprefix("checkpoint_")) for path in run.glob("checkpoint_*.pt")), default=0)


def wait_for(condition, process: subprocess.Popen, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < end, "the training did not get so far"
        time.sleep(0.01)


def test_training_stops_when_validation_no_longer_improves_and_stays_stopped(tmp_path, folder):
    settings = {"learning_rate": 0.0, "early_stop::patience": 3}  # nothing is learned
    out = compose(tmp_path / "out", folder, epochs=50, **settings)
    assert len(history(out)) == 4  # the first, and three that were not better
    before = (out / "predictions.csv").read_bytes()
    compose(out, folder, epochs=60, **settings)
    assert len(history(out)) == 4
    assert (out / "predictions.csv").read_bytes() == before


def test_other_settings_do_not_go_on_in_the_same_folder_unless_started_anew(tmp_path, folder):
    out = compose(tmp_path / "out", folder, epochs=1)
    with pytest.raises(RuntimeError, match="open_run") as raised:
        compose(out, folder, epochs=2, weight_decay=0.5)
    assert "other settings (weight_decay)" in str(raised.value.__cause__)
    assert len(history(compose(out, folder, epochs=1, weight_decay=0.5, resume=False))) == 1


def test_two_processes_give_the_metrics_of_one_that_reads_two_bags_a_step(tmp_path, folder):
    # Two processes do not draw the patches to leave out that one draws.
    settings = {**BAGS, **TINY, "learning_rate": 0.01, "quiet": False, "bag_dropout": 0.0}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle")
    finished = subprocess.run(
        command(
            f"--config_file={configs('composed', 'multi_gpu_train')}",
            *options_of(output_dir=tmp_path / "two", dataset_dir=folder, **{"train::trainer::max_epochs": 2}),
            *options_of(**{key: value for key, value in settings.items() if key != "quiet"}),
            launcher=launcher,
        ),
        env=ONE_THREAD, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    one = compose(tmp_path / "one", folder, accumulate_bags=2, learning_rate=0.01, bag_dropout=0.0)
    # The sums of two gradients may differ in their last digit.
    pd.testing.assert_frame_equal(history(tmp_path / "two"), history(one), rtol=1e-5)
    tables = [pd.read_csv(tmp_path / name / "predictions.csv") for name in ("two", "one")]
    pd.testing.assert_frame_equal(*tables, rtol=1e-5)
    with sqlite3.connect(tmp_path / "two" / "mlruns.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)  # rank 0 alone


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the names of threads are read from /proc")
def test_no_thread_of_the_group_of_processes_is_left_when_python_goes(tmp_path, folder):
    # One that is left may abort a process whose training was complete: rarely, so its presence is what is tested.
    script = tmp_path / "train.py"
    script.write_text(
        "import atexit, pathlib, sys\n"
        "def threads(): return {p.read_text().strip() for p in pathlib.Path('/proc/self/task').glob('*/comm')}\n"
        "atexit.register(lambda: print('left:', *(name for name in threads() if 'gloo' in name)))\n"
        "from monai.bundle import run\n"
        "def train(options):\n"
        "    run('training', config_file=options.pop('config_file'), **options)\n"
        "    print('in training:', *(name for name in threads() if 'gloo' in name))\n"
        "train(eval(sys.argv[1]))\n"
    )
    options = {"config_file": configs("composed", "multi_gpu_train"), **BAGS, **TINY}
    options |= {"output_dir": str(tmp_path / "out"), "dataset_dir": str(folder), "train::trainer::max_epochs": 1}
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    finished = subprocess.run(
        (sys.executable, str(script), repr(options)), env={**ONE_THREAD, **alone}, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert any(line.startswith("in training: ") and "pt_gloo_runloop" in line for line in lines), lines
    assert lines[-1] == "left:"


@pytest.mark.parametrize("model", MODELS)
def test_every_compared_model_is_one_overlay_and_writes_the_same_table(tmp_path, folder, model):
    small = {"network_def::model::width": 16} if model == "transmil" else {}
    out = compose(tmp_path / "out", folder, f"models/{model}", epochs=1, **small)
    rows = pd.read_csv(out / "predictions.csv")
    assert list(rows.columns) == ["model", "fold", "slide", "patient", "label", "p_0", "p_1"]
    assert set(rows["model"]) == {model}
    assert list(rows["slide"]) == [f"test_seed0_{i:04d}" for i in range(6)]
    np.testing.assert_allclose(rows["p_0"] + rows["p_1"], 1, rtol=1e-5)
    assert json.loads((out / "metrics.json").read_text()).keys() == {"auroc", "average_precision", "accuracy"}


def test_all_eight_compared_models_are_there():
    assert MODELS == [
        "clam_mb", "clam_sb", "forest_max", "forest_mean", "lstm", "max_pooling", "mean_pooling", "transformer",
        "transmil",
    ]  # fmt: skip


def test_balanced_sampling_and_decay_of_the_time_scales_are_settings(tmp_path, folder):
    plain = history(compose(tmp_path / "plain", folder, epochs=1))
    for name in ("balanced_sampling", "ssm_weight_decay"):
        changed = history(compose(tmp_path / name, folder, epochs=1, **{name: True, "weight_decay": 0.5}))
        assert changed["train_loss"][0] != plain["train_loss"][0]


@pytest.mark.filterwarnings(
    "ignore:`torch.cuda.amp.GradScaler:FutureWarning",
    "ignore:torch.cuda.amp.GradScaler is enabled, but CUDA is not available:UserWarning",
    "ignore:CUDA is not available or torch_xla is imported:UserWarning",
)
def test_class_weights_and_mixed_precision_are_settings_too(tmp_path, folder):
    plain = history(compose(tmp_path / "plain", folder, epochs=1))
    amp = history(compose(tmp_path / "amp", folder, epochs=1, amp=True))
    weighted = history(compose(tmp_path / "weighted", folder, epochs=1, class_weights=True))
    assert np.isfinite(amp["train_loss"][0])
    # Half of the composed bags are positive: every weight is 1.
    assert weighted["train_loss"][0] == pytest.approx(plain["train_loss"][0])
    unequal = train(tmp_path / "unequal", epochs=1, **TINY)  # UCSB breast: 26 of 58 are malignant
    even = train(tmp_path / "even", epochs=1, **TINY, class_weights=True)
    assert history(even)["train_loss"][0] != pytest.approx(history(unequal)["train_loss"][0], rel=1e-4)


def test_multitask_bundle_learns_where_from_patch_labels(tmp_path, folder):
    counts = {"split::train": 30, "split::validation": 10, "split::test": 10}
    out = compose(tmp_path / "out", folder, bundle="s4mil_multitask", epochs=3, **counts, learning_rate=0.02)
    state = torch.load(out / "model.pt", weights_only=True)
    network = SlideLogits(S4MIL(6, width=8, state_dim=4, patch_classes=2))
    network.load_state_dict(state)
    found = tiles().labels == "AC"
    with np.load(folder / "tiles.npz") as file:
        features = file["features"]
    with torch.inference_mode():
        scores = network.model(torch.from_numpy(features)[None]).patch_logits[0].softmax(1)[:, 1]
    assert scores[found].mean() > scores[~found].mean() + 0.2
    check_patch_metrics(out, network, folder, counts)


def check_patch_metrics(out: Path, network: SlideLogits, folder: Path, counts: dict[str, int]) -> None:
    """Those of Table 4, worked out again from the test bags."""
    sizes = {name.removeprefix("split::"): count for name, count in counts.items()}
    recipe = BagRecipe(length=tuple(BAGS["split::recipe::length"]))
    test = compose_split(folder / "tiles.npz", **sizes, seed=0, recipe=recipe).test
    with torch.inference_mode():
        scores = [
            network.model(torch.from_numpy(bag.features)[None]).patch_logits[0].softmax(1)[:, 1] for bag in test
        ]
    labels = [bag.patch_labels for bag in test]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["patch_auroc"] == pytest.approx(roc_auc_score(np.concatenate(labels), np.concatenate(scores)))
    of_slides = [roc_auc_score(*slide) for slide in zip(labels, scores, strict=True) if len(set(slide[0])) == 2]
    assert len(of_slides) == 5  # the positive half
    assert metrics["patch_auroc_per_slide"] == pytest.approx(np.mean(of_slides))
    right = [(of_slide > 0.5).numpy() == known for of_slide, known in zip(scores, labels, strict=True)]
    assert metrics["patch_accuracy"] == pytest.approx(np.concatenate(right).mean())


def test_multitask_bundle_trains_on_bags_without_patch_labels(tmp_path):
    out = train(tmp_path / "out", bundle="s4mil_multitask", epochs=1, **TINY)  # UCSB breast has none
    assert len(history(out)) == 1
    assert json.loads((out / "metrics.json").read_text()).keys() == {"auroc", "average_precision", "accuracy"}


def test_best_epoch_may_be_chosen_by_validation_loss(tmp_path, folder):
    settings = {"choose_by": "val_loss", "learning_rate": 0.1, "early_stop::patience": 3}
    out = compose(tmp_path / "out", folder, epochs=30, **settings)
    losses = history(out)["val_loss"]
    best = int(losses.argmin())
    assert len(losses) == min(30, best + 4)  # three epochs that were not better
    rows = pd.read_csv(out / "predictions.csv")
    again = compose(tmp_path / "again", folder, epochs=best + 1, **settings)  # ends with the best epoch
    pd.testing.assert_frame_equal(pd.read_csv(again / "predictions.csv"), rows)


@pytest.mark.parametrize("model", ["mean_pooling", "forest_max"])
def test_models_that_are_fitted_at_once_are_tracked_like_those_that_train(tmp_path, folder, model):
    out = tmp_path / "out"
    files = f"--config_file={configs('composed', f'models/{model}')}"
    options = options_of(output_dir=out, dataset_dir=folder, **BAGS)
    finished = subprocess.run(command(files, *options), env=ONE_THREAD, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    with sqlite3.connect(out / "mlruns.db") as database:
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]
        parameters = dict(database.execute("select key, value from params"))
        metrics = dict(database.execute("select key, value from metrics"))
        (artifacts,) = database.execute("select artifact_uri from runs").fetchone()
    assert (parameters["model_name"], parameters["seed"]) == (model, "0")
    assert metrics == pytest.approx(json.loads((out / "metrics.json").read_text()))
    kept = {path.name for path in Path(artifacts.removeprefix("file://")).iterdir()}
    weights = "forest.skops" if model == "forest_max" else "model.pt"
    assert kept == {"config.json", "environment.txt", "predictions.csv", "metrics.json", weights}


@pytest.mark.parametrize("encoder", ["resnet50_block3", "x"])
def test_overlay_of_the_papers_encoder_takes_its_features_and_no_others(tmp_path, encoder):
    for i in range(20):
        bag = make_bag(4, 1024)
        save_bag(tmp_path / f"s{i}.h5", replace(bag, origin=replace(bag.origin, encoder=encoder)))
    rows = "".join(f"s{i},{i % 2}\n" for i in range(20))
    (tmp_path / "labels.csv").write_text("slide,label\n" + rows)
    run = {"dataset_dir": str(tmp_path), "epochs": 1}
    if encoder == "x":
        with pytest.raises(RuntimeError) as raised:
            train(tmp_path / "out", "features", "resnet50", **run)
        assert "features are of x, wanted resnet50_block3" in str(raised.value.__cause__)
        return
    train(tmp_path / "out", "features", "resnet50", **run)
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert sum(value.numel() for value in state.values()) == 1_184_258  # Table 2, N = 128
