"""`python -m monai.bundle run training`, as a user runs it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from s4mil_monai.features.store import save_bag
from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.s4mil import S4MIL
from tests.features.test_store import make_bag
from tests.training.test_composed import tiles

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "bundles" / "s4mil_slide" / "configs"


def train(output: Path, *overlays: str, run_id: str = "training", cwd: Path = REPOSITORY, **overrides) -> str:
    files = [str(CONFIGS / name) for name in ("train.yaml", *overlays)]
    options = {"config_file": files if overlays else files[0], "output_dir": output, **overrides}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    finished = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", run_id, *arguments], cwd=cwd, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def test_training_on_the_ucsb_breast_slides_leaves_a_model_and_its_history(tmp_path):
    log = train(tmp_path / "out", **{"train::trainer::max_epochs": 2})
    assert "val_auroc" in log
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    SlideLogits(S4MIL(708)).load_state_dict(state)
    with sqlite3.connect(tmp_path / "out" / "mlruns.db") as database:
        epochs = database.execute("select max(step) from metrics where key = 'val_auroc'").fetchone()[0]
        runs = database.execute("select status from runs").fetchall()
    assert epochs == 2  # the override was heard, and each epoch is recorded
    assert runs == [("FINISHED",)]


def test_run_is_its_other_name_and_bags_can_be_composed(tmp_path):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(100, 6)).astype(np.float32)
    np.savez(tmp_path / "tiles.npz", features=features, labels=tiles().labels)
    split = {"split::train": 6, "split::validation": 4, "split::test": 2}
    train(
        tmp_path / "out", "composed.yaml", run_id="run", dataset_dir=tmp_path, cwd=tmp_path,
        **{"train::trainer::max_epochs": 1}, **split,
    )  # fmt: skip
    assert torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model.project.weight"].shape == (512, 6)


@pytest.mark.parametrize("encoder", ["resnet50_block3", "x"])
def test_overlay_of_the_papers_encoder_takes_its_features_and_no_others(tmp_path, encoder):
    from dataclasses import replace

    for i in range(20):
        bag = make_bag(4, 1024)
        save_bag(tmp_path / f"s{i}.h5", replace(bag, origin=replace(bag.origin, encoder=encoder)))
    rows = "".join(f"s{i},{i % 2}\n" for i in range(20))
    (tmp_path / "labels.csv").write_text("slide,label\n" + rows)
    overlays = ("features.yaml", "resnet50.yaml")
    options = {"dataset_dir": tmp_path, "train::trainer::max_epochs": 1}
    if encoder == "x":
        with pytest.raises(AssertionError, match="features are of x, wanted resnet50_block3"):
            train(tmp_path / "out", *overlays, **options)
        return
    train(tmp_path / "out", *overlays, **options)
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert sum(value.numel() for value in state.values()) == 1_184_258  # Table 2, N = 128
