"""What a run leaves on the disk, and how it goes on from there."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint

from s4mil_monai.training.augment import RandPatchDropoutd
from s4mil_monai.training.engines import (
    CHECKPOINT,
    DurableFiles,
    EpochSeed,
    choose_epoch_by,
    current_epoch,
    find_checkpoint,
    log_loss,
)


def draws_of(engine: Engine, transform: RandPatchDropoutd) -> list[tuple]:
    drawn = []

    @engine.on(Events.EPOCH_COMPLETED)
    def draw(engine):
        numbers = (torch.rand(1).item(), np.random.rand(), random.random(), transform.R.rand())  # noqa: NPY002
        drawn.append(numbers)

    return drawn


def make_engine(transform: RandPatchDropoutd, seed: int = 5) -> Engine:
    engine = Engine(lambda engine, batch: None)
    EpochSeed(seed, transform).attach(engine)
    return engine


def test_an_epoch_draws_the_same_whether_or_not_others_ran_before_it():
    transform = RandPatchDropoutd("image", share=0.5)
    whole = make_engine(transform)
    drawn = draws_of(whole, transform)
    whole.run([0], max_epochs=3)

    later = make_engine(transform)
    later.load_state_dict({"epoch": 2, "max_epochs": 3, "epoch_length": 1})
    drawn_later = draws_of(later, transform)
    later.run([0])
    assert drawn_later == drawn[2:]
    assert len({numbers[0] for numbers in drawn}) == 3

    other = make_engine(transform, seed=6)
    drawn_other = draws_of(other, transform)
    other.run([0], max_epochs=1)
    assert drawn_other[0] != drawn[0]


class Counter:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": np.float64(self.count)}  # as a metric gives it


def run_with_checkpoints(folder, *, n_saved, epochs, pattern=CHECKPOINT, score=None):
    engine, counter = Engine(lambda engine, batch: None), Counter()
    checkpoint = Checkpoint(
        {"counter": counter, "again": counter},
        DurableFiles(folder),
        filename_pattern=pattern,
        global_step_transform=None if score else current_epoch,
        score_function=score,
        n_saved=n_saved,
    )

    @engine.on(Events.EPOCH_COMPLETED)
    def count(engine):
        counter.count = engine.state.epoch

    engine.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    engine.run([0], max_epochs=epochs)


def test_newest_two_checkpoints_stay_and_can_be_loaded_safely(tmp_path):
    run_with_checkpoints(tmp_path, n_saved=2, epochs=12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00011.pt", "checkpoint_00012.pt"]
    newest = find_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint_00012.pt"
    assert torch.load(newest, weights_only=True)["counter"] == {"count": 12.0}


def test_file_of_the_best_epoch_is_replaced_and_never_missing(tmp_path, monkeypatch):
    there = []
    run_with_checkpoints(tmp_path, n_saved=1, epochs=1, pattern="model.pt", score=lambda engine: 1.0)
    save = torch.save

    def watched(*args, **kwargs):
        there.append((tmp_path / "model.pt").is_file())
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", watched)
    run_with_checkpoints(
        tmp_path, n_saved=1, epochs=3, pattern="model.pt", score=lambda engine: engine.state.epoch
    )
    assert there == [True, True, True]
    assert torch.load(tmp_path / "model.pt", weights_only=True)["counter"] == {"count": 3.0}


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage, caplog):
    run_with_checkpoints(tmp_path, n_saved=2, epochs=2)
    newest = tmp_path / "checkpoint_00002.pt"
    content = newest.read_bytes()
    newest.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"no checkpoint"}[damage])
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint_00001.pt"
    assert "checkpoint_00002.pt is damaged and passed over" in caplog.text


def test_folder_without_checkpoints_has_none(tmp_path):
    assert find_checkpoint(tmp_path / "gone") is None


def test_epoch_is_chosen_by_a_high_auroc_or_by_a_low_loss():
    engine = Engine(lambda engine, batch: None)
    engine.state.metrics = {"val_auroc": 0.75, "val_loss": 0.25}
    assert choose_epoch_by("val_auroc")(engine) == 0.75
    assert choose_epoch_by("val_loss")(engine) == -0.25


def test_loss_of_probabilities_is_the_cross_entropy_of_their_logits_and_finite_where_one_is_zero():
    logits, classes = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3
    wanted = torch.nn.functional.cross_entropy(logits, classes)
    torch.testing.assert_close(log_loss(logits.softmax(1), classes), wanted)
    assert log_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).item() == pytest.approx(-np.log(1e-7))


def test_of_epochs_with_one_auroc_the_more_accurate_is_the_better():
    def value(auroc: float, accuracy: float) -> float:
        engine = Engine(lambda engine, batch: None)
        engine.state.metrics = {"val_auroc": auroc, "val_accuracy": accuracy}
        return choose_epoch_by("val_auroc+val_accuracy")(engine)

    assert value(1.0, 0.5) < value(1.0, 0.95) < value(1.0, 1.0)
    assert value(0.9, 0.8) == pytest.approx(0.85)
