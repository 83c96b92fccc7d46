"""A folder holds one run, and says which."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

from s4mil_monai.errors import BundleError
from s4mil_monai.training.run_folder import open_run, plain_settings

CONFIG = {"seed": 0, "learning_rate": 0.1, "train": {"trainer": {"max_epochs": 3}, "list": [1, "@seed"]}}


@pytest.fixture
def begun(tmp_path):
    run = open_run(tmp_path / "run", config=CONFIG)
    torch.save({}, run.folder / "checkpoint_00001.pt")
    return run


def test_configuration_and_environment_are_written(begun):
    assert json.loads((begun.folder / "config.json").read_text())["config"] == CONFIG
    assert f"torch=={version('torch')}" in (begun.folder / "environment.txt").read_text().splitlines()


def test_run_that_goes_on_keeps_its_name(begun):
    longer = {**CONFIG, "train": {**CONFIG["train"], "trainer": {"max_epochs": 5}}}
    assert open_run(begun.folder, config=longer).name == begun.name


def test_run_with_other_settings_is_refused_and_the_settings_are_named(begun):
    changed = {**CONFIG, "seed": 1, "train": {**CONFIG["train"], "list": [2, "@seed"]}}
    with pytest.raises(BundleError, match=r"other settings \(seed, train::list::0\); give another --output_dir"):
        open_run(begun.folder, config=changed)


def test_starting_anew_takes_any_settings_and_has_another_name(begun):
    assert open_run(begun.folder, resume=False, config={**CONFIG, "seed": 1}).name != begun.name


def test_outside_of_a_configuration_there_is_none(tmp_path):
    with pytest.raises(LookupError, match="no MONAI configuration"):
        open_run(tmp_path)


def test_settings_that_may_change_are_no_parameters():
    assert plain_settings({**CONFIG, "resume": True}) == {"seed": 0, "learning_rate": 0.1}
