"""One HDF5 file a slide, written whole or not at all, readable by CLAM, TRIDENT and STAMP users.

Datasets ``features`` (n, d) float32 and ``coords`` (n, 2) int64 level-0 pixels (x, y); everything else is in
the file's attributes, under the names of :class:`FeatureOrigin`, and on ``coords`` as TRIDENT has it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from s4mil_monai.errors import FeatureFileError, OutputError

FEATURE_FORMAT = "s4mil.features/1"


@dataclass(frozen=True)
class FeatureOrigin:
    """Where features come from: enough to know whether two files, or a file and a model, go together."""

    slide: str
    slide_sha256: str
    slide_mpp: float
    """µm per level-0 pixel."""
    slide_mpp_source: str
    backend: str
    encoder: str
    encoder_sha256: str
    patch_mpp: float
    """µm/px the encoder saw."""
    patch_side_px: int
    patch_side_px0: float
    patch_note: str
    """What to know of how they were read, such as upsampling."""
    min_tissue: float
    scan_order: str
    patch_stage: str
    """``torch`` or ``dali``."""
    software: str
    """``s4mil_monai`` and its version."""


@dataclass(frozen=True)
class FeatureBag:
    """All patch features of one slide, in scan order."""

    features: NDArray[np.float32]
    """(n, d)."""
    top_left_px0: NDArray[np.int64]
    """(n, 2) corners (x, y) in level-0 pixels."""
    origin: FeatureOrigin

    def __len__(self) -> int:
        return len(self.features)


def save_bag(path: Path, bag: FeatureBag) -> None:
    """Write a feature file, and its folder where there is none; the name appears when the file is whole.

    Raises:
        OutputError: The folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(part, "w") as file:
            _fill(file, bag)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OutputError(str(path), f"cannot be written ({error.strerror or error})") from error


def _fill(file: Any, bag: FeatureBag) -> None:
    file.attrs["format"] = FEATURE_FORMAT
    for key, value in asdict(bag.origin).items():
        file.attrs[key] = value
    file.create_dataset("features", data=bag.features)
    coords = file.create_dataset("coords", data=bag.top_left_px0)
    coords.attrs["patch_size"] = bag.origin.patch_side_px
    coords.attrs["patch_size_level0"] = round(bag.origin.patch_side_px0)
    coords.attrs["name"] = bag.origin.slide


def load_bag(path: Path) -> FeatureBag:
    """Read a feature file.

    Raises:
        FeatureFileError: It is missing, damaged, or lacks something a bag needs.
    """
    if not path.is_file():
        raise FeatureFileError(str(path), "there is no such feature file")
    try:
        with h5py.File(path, "r") as file:
            found = file.attrs.get("format")
            if found != FEATURE_FORMAT:
                raise FeatureFileError(str(path), f"format is {found!r}, wanted {FEATURE_FORMAT!r}")
            features, corners = np.asarray(file["features"]), np.asarray(file["coords"])
            origin = FeatureOrigin(
                **{field.name: _plain(file.attrs[field.name]) for field in fields(FeatureOrigin)}
            )
    except (OSError, KeyError) as error:
        raise FeatureFileError(str(path), f"damaged or incomplete ({error}); embed the slide again") from error
    if features.ndim != 2 or corners.shape != (len(features), 2):
        raise FeatureFileError(
            str(path), f"features {features.shape} and coords {corners.shape} do not go together"
        )
    return FeatureBag(features, corners, origin)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
