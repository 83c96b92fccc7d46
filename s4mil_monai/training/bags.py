"""Labelled bags, from feature files and a table of labels, and as MONAI reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from s4mil_monai.errors import TableError
from s4mil_monai.features.store import FeatureOrigin, load_bag


@dataclass(frozen=True)
class LabelledBag:
    """The patch features of one slide and what is known of it."""

    slide: str
    features: NDArray[np.float32]
    """(L, D), in scan order."""
    label: int
    """Class of the slide, counted from 0."""
    patient: str
    """Slides of one patient never meet in different folds; the slide's own name where patients are unknown."""
    patch_labels: NDArray[np.int64] | None = None
    """(L,) classes of the patches, where they are known."""


def as_items(bags: Iterable[LabelledBag]) -> list[dict[str, Any]]:
    """Bags as MONAI's dictionaries: ``image`` (D, L) channel first, ``label`` () int64, ``slide``."""
    return [
        {
            "image": torch.from_numpy(np.ascontiguousarray(bag.features.T)),
            "label": torch.tensor(bag.label),
            "slide": bag.slide,
        }
        for bag in bags
    ]


def load_feature_bags(folder: str | Path, table: str | Path, *, encoder: str | None = None) -> list[LabelledBag]:
    """Load ``<slide>.h5`` for each row of a table of labels.

    Args:
        folder: Where the feature files lie.
        table: CSV with the columns ``slide`` (file name without ending) and ``label`` (0, 1, …), and ``patient``
            if patients have several slides.

    Raises:
        TableError: The table lacks a column, names a slide twice or without features, or has an odd label.
        FeatureFileError: A feature file is damaged.
    """
    rows = read_label_table(table)
    paths = [Path(folder) / f"{slide}.h5" for slide in rows["slide"]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise TableError(str(table), f"no features in {folder} for {_listed(missing)}")
    loaded = [load_bag(path) for path in paths]
    _same_origin(table, [bag.origin for bag in loaded])
    if encoder is not None and loaded[0].origin.encoder != encoder:
        raise TableError(str(table), f"features are of {loaded[0].origin.encoder}, wanted {encoder}")
    return [
        LabelledBag(slide, bag.features, label, patient)
        for slide, label, patient, bag in zip(rows["slide"], rows["label"], rows["patient"], loaded, strict=True)
    ]


def read_label_table(table: str | Path) -> pd.DataFrame:
    """Read a table of labels and check it; gives the columns ``slide``, ``label`` and ``patient``.

    Raises:
        TableError: It is missing, lacks a column, names a slide twice, or has a label that is no class number.
    """
    try:
        rows = pd.read_csv(table, dtype={"slide": str, "patient": str})
    except (OSError, ValueError) as error:
        raise TableError(str(table), f"cannot be read as CSV ({error})") from error
    for column in ("slide", "label"):
        if column not in rows:
            raise TableError(str(table), f"lacks the column {column!r}; it has {', '.join(rows.columns)}")
    twice = rows["slide"][rows["slide"].duplicated()]
    if len(twice):
        raise TableError(str(table), f"names twice {_listed(list(twice))}")
    labels = pd.Series(pd.to_numeric(rows["label"], errors="coerce"))
    odd = rows[labels.isna() | (labels < 0) | (labels % 1 != 0)]
    if len(odd):
        raise TableError(
            str(table), f"labels are class numbers 0, 1, …; they are not for {_listed(list(odd['slide']))}"
        )
    patients = rows["patient"] if "patient" in rows else rows["slide"]
    return pd.DataFrame({"slide": rows["slide"], "label": labels.astype(int), "patient": patients})


def _same_origin(table: str | Path, origins: Sequence[FeatureOrigin]) -> None:
    """Refuse features of different encoders, resolutions or scan orders in one training."""
    for what in ("encoder", "encoder_sha256", "patch_side_px", "scan_order"):
        found = {getattr(origin, what) for origin in origins}
        if len(found) > 1:
            raise TableError(
                str(table), f"its slides were embedded with different {what}: {_listed(sorted(found))}"
            )


def _listed(names: Sequence[Any]) -> str:
    shown = ", ".join(str(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
