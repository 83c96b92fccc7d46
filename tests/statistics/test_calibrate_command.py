"""``s4mil calibrate`` from a table of predictions to the file in the bundle."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from s4mil_monai.cli.calibrate import calibrate
from s4mil_monai.scoring import CALIBRATION_FILE
from s4mil_monai.statistics.calibration import Calibration, read_calibration
from tests.statistics.examples import simulate


def calibrate_on(folder, bundle, *, slides: int, per_patient: int) -> Calibration:
    shutil.copytree(bundle, folder, dirs_exist_ok=True)
    table = folder / "predictions.csv"
    simulate({"a": 1.5}, slides=slides, per_patient=per_patient).to_csv(table, index=False)
    assert calibrate(str(table), bundle=str(folder), model="a", alpha=0.1) == 0
    return read_calibration(folder / CALIBRATION_FILE)


def test_copies_of_a_patients_slide_make_nothing_surer(tmp_path, bundle):
    once = calibrate_on(tmp_path, bundle, slides=80, per_patient=1)
    copied = calibrate_on(tmp_path, bundle, slides=240, per_patient=3)
    assert (once.n, once.n_patients) == (80, 80)
    assert (copied.n, copied.n_patients) == (240, 80)
    for fact in ("sensitivity_low", "sensitivity_high", "specificity_low", "specificity_high"):
        assert getattr(copied, fact) == pytest.approx(getattr(once, fact)), fact
    # labels are drawn in by slides, which moves the temperature a little; on the scale of logits edges stay
    for edge in ("threshold", "refer_low", "refer_high"):
        logits = [
            found.temperature * np.log(getattr(found, edge) / (1 - getattr(found, edge)))
            for found in (once, copied)
        ]
        assert logits[0] == pytest.approx(logits[1]), edge
