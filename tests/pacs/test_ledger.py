"""What makes a series a new job, and what is kept of it between passes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from s4mil_monai.pacs.ledger import Ledger, key_of
from s4mil_monai.pacs.web import RemoteSeries
from s4mil_monai.scoring import load_scorer
from s4mil_monai.statistics.calibration import Calibration

SERIES = RemoteSeries("1.2", "1.3", ("1.4", "1.5"))
CALIBRATION = Calibration(
    method="temperature",
    classes=2,
    temperature=1.0,
    threshold=0.5,
    class_floors=(0.5, 0.5),
    alpha=0.1,
    n=10,
    n_patients=10,
    provenance="made up",
)


@pytest.fixture(scope="module")
def scorer(bundle):
    return replace(load_scorer(bundle), calibration=CALIBRATION)


def of_another_model(scorer):
    settings = scorer.bundle.settings
    other = settings.model_copy(update={"weights": settings.weights.model_copy(update={"sha256": "12" * 32})})
    return replace(scorer, bundle=replace(scorer.bundle, settings=other))


def recalibrated(scorer, **changes):
    return replace(scorer, calibration=scorer.calibration.model_copy(update=changes))


@pytest.mark.parametrize(
    ("series", "change", "target"),
    [
        (SERIES, lambda scorer: recalibrated(scorer, temperature=1.1), "pacs"),
        (SERIES, lambda scorer: recalibrated(scorer, refer_low=0.5, refer_high=0.6), "pacs"),
        (SERIES, lambda scorer: replace(scorer, calibration=None), "pacs"),
        (SERIES, of_another_model, "pacs"),
        (replace(SERIES, instances=("1.4", "1.5", "1.6")), lambda scorer: scorer, "pacs"),
        (replace(SERIES, instances=("1.4",)), lambda scorer: scorer, "pacs"),
        (SERIES, lambda scorer: scorer, "another"),
    ],
    ids=["temperature", "refer band", "no calibration", "model", "new instance", "lost instance", "target"],
)
def test_what_makes_a_series_a_new_job(scorer, series, change, target):
    known = key_of(SERIES, scorer, "pacs")
    assert key_of(SERIES, scorer, "pacs") == known
    assert key_of(series, change(scorer), target) != known


def test_series_is_known_since_it_was_first_seen_with_what_it_has(tmp_path):
    assert Ledger(tmp_path).note(SERIES, now_s=100) == 100
    assert Ledger(tmp_path).note(SERIES, now_s=160) == 100
    assert Ledger(tmp_path).note(replace(SERIES, instances=("1.4",)), now_s=170) == 170
    assert Ledger(tmp_path).note(SERIES, now_s=180) == 180


def test_clock_that_was_set_back_makes_nothing_settled(tmp_path):
    Ledger(tmp_path).note(SERIES, now_s=1000)
    assert Ledger(tmp_path).note(SERIES, now_s=10) == 10


def test_damaged_note_is_as_none(tmp_path):
    Ledger(tmp_path).note(SERIES, now_s=100)
    (note,) = (tmp_path / ".pacs" / "seen").iterdir()
    note.write_text("{")
    assert Ledger(tmp_path).note(SERIES, now_s=200) == 200
