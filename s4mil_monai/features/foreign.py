"""import_features(): feature files of CLAM, TRIDENT and STAMP, and of this package, as one type.

What was read of the tools' files, and nothing of their code:

- CLAM: ``.pt``, a tensor (n, d); ``.h5``, ``features`` (n, d) and ``coords`` (n, 2) in level-0 pixels. Both of
  one slide lie side by side in ``pt_files/`` and ``h5_files/``. Nothing says which encoder it was.
- TRIDENT: the same ``.h5``, in older files (1, n, d), with attributes on ``coords`` (patch size, overlap,
  magnifications) and the encoder's name on ``features``.
- STAMP: ``.h5`` with ``feats``, often float16, and ``coords`` in µm. Version 2.1 and newer say ``tile_size_um``
  and ``tile_size_px``, version 2.0 ``tile_size`` with ``unit``; version 1 says neither and counts 224 for each
  256 µm. Files of slide embeddings have another ``feat_type``.

What a file does not say stays unknown in the origin, in the form :mod:`s4mil_monai.features.store` describes,
unless the caller knows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from s4mil_monai import __version__
from s4mil_monai.errors import FeatureFileError, UnknownNameError
from s4mil_monai.features.store import (
    DAMAGE,
    FEATURE_FORMAT,
    UNKNOWN,
    UNKNOWN_NUMBER,
    FeatureBag,
    FeatureOrigin,
    load_bag,
)
from s4mil_monai.slides.grid import SCAN_ORDERS

GRIDLESS = ("row_major", "column_major")
"""Scan orders that corners alone decide; the others go by rows and columns of a grid."""

STAMP_1_TILE = (224, 256.0)
"""In version 1, so many units of ``coords`` are so many µm."""


@dataclass(frozen=True)
class ForeignFeatures:
    """Patch features of one slide from another tool: those of a :class:`FeatureBag`, perhaps without places."""

    path: Path
    features: NDArray[np.float32]
    """(n, d), in the file's order or the one asked for."""
    top_left_px0: NDArray[np.int64] | None
    """(n, 2) corners (x, y) in level-0 pixels; None where they are not known."""
    no_places_reason: str
    """Why they are not known, and what to give; empty where they are."""
    origin: FeatureOrigin

    def __len__(self) -> int:
        return len(self.features)

    def to_bag(self) -> FeatureBag:
        """The features as a bag.

        Raises:
            FeatureFileError: Nobody knows where the patches lie.
        """
        if self.top_left_px0 is None:
            raise FeatureFileError(str(self.path), self.no_places_reason)
        return FeatureBag(self.features, self.top_left_px0, self.origin)


@dataclass(frozen=True)
class _Found:
    """What a file says, in its own units."""

    tool: str
    features: NDArray[Any]
    coords: NDArray[Any] | None = None
    um_per_unit: float | None = None
    """µm for each unit of ``coords``; None where they are level-0 pixels."""
    slide: str = ""
    encoder: str = ""
    patch_side_px: int = UNKNOWN_NUMBER
    patch_side_px0: float = UNKNOWN_NUMBER
    patch_side_um: float = UNKNOWN_NUMBER
    overlap_px: int = UNKNOWN_NUMBER
    note: str = ""


def import_features(
    path: Path,
    *,
    slide: str | None = None,
    slide_mpp: float | None = None,
    encoder: str | None = None,
    encoder_sha256: str = "",
    patch_side_px: int | None = None,
    patch_side_px0: float | None = None,
    top_left_px0: NDArray[np.int64] | None = None,
    scan_order: str | None = None,
) -> ForeignFeatures:
    """Read a feature file of CLAM, TRIDENT, STAMP or this package.

    Whatever is given here wins over what the file says, except for files of this package, which say everything
    themselves.

    Args:
        path: A ``.pt`` or ``.h5`` file. The corners of CLAM's ``.pt`` come from the ``.h5`` of the same stem
            beside it, or in ``h5_files`` beside its folder, if there is one.
        slide: Name of the slide; by default the one in the file, or else the file's stem.
        slide_mpp: µm per level-0 pixel. STAMP's places are known only with it.
        encoder: Name of the encoder.
        encoder_sha256: Fingerprint of its weights.
        patch_side_px: Side of a patch as the encoder saw it.
        patch_side_px0: Side of a patch in level-0 pixels.
        top_left_px0: (n, 2) corners (x, y) of the patches.
        scan_order: Sort the patches into this order; by default they stay as they are, and the origin names the
            order only if the corners are in one.

    Raises:
        FeatureFileError: The file is missing, damaged, empty, has values that are no numbers, is none of
            these, or cannot be sorted as asked.
        UnknownNameError: No such scan order.
    """
    if scan_order is not None and scan_order not in SCAN_ORDERS:
        raise UnknownNameError("scan order", scan_order, tuple(SCAN_ORDERS))
    if not path.is_file():
        raise FeatureFileError(str(path), "there is no such feature file")
    if _is_ours(path):
        bag = load_bag(path)
        return _sort(ForeignFeatures(path, bag.features, bag.top_left_px0, "", bag.origin), scan_order)
    found = _read_pt(path) if path.suffix in (".pt", ".pth") else _read_h5(path)
    features = _check_features(path, found.features)
    found = replace(found, features=features)
    corners, no_places_reason = _place(path, found, slide_mpp, top_left_px0)
    side_px = patch_side_px or found.patch_side_px
    side_px0, patch_mpp = _measure(found, slide_mpp, side_px, patch_side_px0)
    origin = FeatureOrigin(
        slide=slide or found.slide or path.stem,
        slide_sha256="",
        slide_mpp=slide_mpp or UNKNOWN_NUMBER,
        slide_mpp_source="override" if slide_mpp else UNKNOWN,
        backend=UNKNOWN,
        encoder=encoder or found.encoder or UNKNOWN,
        encoder_sha256=encoder_sha256,
        patch_mpp=patch_mpp,
        patch_side_px=side_px,
        patch_side_px0=side_px0,
        patch_note=found.note,
        min_tissue=UNKNOWN_NUMBER,
        scan_order=find_scan_order(corners),
        patch_stage=UNKNOWN,
        software=f"{found.tool}, imported by s4mil_monai {__version__}",
        overlap_px=found.overlap_px,
        encoder_runtime=UNKNOWN,
        encoder_precision=UNKNOWN,
        damaged_patches=UNKNOWN_NUMBER,
        quality=UNKNOWN,
    )
    return _sort(ForeignFeatures(path, features, corners, no_places_reason, _floats(origin)), scan_order)


def find_scan_order(top_left_px0: NDArray[np.int64] | None) -> str:
    """Name the order that corners are in: ``row_major``, ``column_major``, or unknown.

    CLAM lays a grid over each piece of tissue, so its files are in neither as soon as there are two pieces.

    >>> find_scan_order(np.array([[0, 0], [256, 0], [0, 256]]))
    'row_major'
    >>> find_scan_order(np.array([[0, 0], [0, 256], [256, 0]]))
    'column_major'
    >>> find_scan_order(np.array([[256, 0], [0, 0]]))
    'unknown'
    """
    if top_left_px0 is None:
        return UNKNOWN
    x, y = top_left_px0.T
    in_order = np.arange(len(x))
    return next((name for name in GRIDLESS if np.array_equal(SCAN_ORDERS[name](y, x), in_order)), UNKNOWN)


def _sort(found: ForeignFeatures, scan_order: str | None) -> ForeignFeatures:
    if scan_order is None or found.origin.scan_order == scan_order:
        return found
    if found.top_left_px0 is None:
        raise FeatureFileError(str(found.path), f"cannot be sorted {scan_order}: {found.no_places_reason}")
    x, y = found.top_left_px0.T if scan_order in GRIDLESS else _find_grid(found, scan_order).T
    order = SCAN_ORDERS[scan_order](y, x)
    return replace(
        found,
        features=found.features[order],
        top_left_px0=found.top_left_px0[order],
        origin=replace(found.origin, scan_order=scan_order),
    )


def _find_grid(found: ForeignFeatures, scan_order: str) -> NDArray[np.int64]:
    """(n, 2) columns and rows of the patches on a grid that starts at the scan's corner.

    Raises:
        FeatureFileError: They lie on no such grid; CLAM starts one at each piece of tissue.
    """
    origin = found.origin
    stride_px0 = origin.patch_side_px0
    if origin.overlap_px > 0 and origin.patch_side_px > 0:
        stride_px0 *= 1 - origin.overlap_px / origin.patch_side_px
    if stride_px0 > 0 and found.top_left_px0 is not None:
        cells = np.rint(found.top_left_px0 / stride_px0).astype(np.int64)
        if (np.abs(cells * stride_px0 - found.top_left_px0) <= 1).all():
            return cells
    raise FeatureFileError(
        str(found.path),
        f"cannot be sorted {scan_order}: that follows a grid from the scan's corner, and "
        + (
            f"its patches lie on none of {stride_px0:g} px" if stride_px0 > 0 else "nothing says its patches' side"
        ),
    )


# Files --------------------------------------------------------------------------------------------------------


def _is_ours(path: Path) -> bool:
    if path.suffix in (".pt", ".pth"):
        return False
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            return _text(file.attrs.get("format")).startswith(FEATURE_FORMAT.partition("/")[0])
    except DAMAGE as error:
        raise _damaged(path, error) from error


def _read_pt(path: Path) -> _Found:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FeatureFileError(
            str(path), f"damaged, or holds more than numbers ({type(error).__name__}); copy it again"
        ) from error
    tensor: Any = held.get("features") if isinstance(held, Mapping) else held
    if not isinstance(tensor, torch.Tensor) or not tensor.dtype.is_floating_point:
        raise FeatureFileError(str(path), "holds no tensor of features, which CLAM's .pt files do")
    features = tensor.detach().float().numpy()
    beside = next((file for file in _beside(path) if file.is_file()), None)
    if beside is None:
        return _Found("CLAM", features)
    found = _read_h5(beside)
    if np.squeeze(found.features).shape != np.squeeze(features).shape or not np.array_equal(
        np.squeeze(found.features).astype(np.float32), np.squeeze(features), equal_nan=True
    ):
        raise FeatureFileError(
            str(path),
            f"features {features.shape} are not those of {beside} {found.features.shape}; one is damaged",
        )
    return found


def _beside(path: Path) -> tuple[Path, ...]:
    return path.with_suffix(".h5"), path.parent.parent / "h5_files" / f"{path.stem}.h5"


def _read_h5(path: Path) -> _Found:
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            if "feats" in file:
                return _read_stamp(path, file)
            if "features" in file:
                return _read_clam(file)
    except DAMAGE as error:
        raise _damaged(path, error) from error
    raise FeatureFileError(str(path), "has neither 'features' (CLAM, TRIDENT) nor 'feats' (STAMP)")


def _read_clam(file: Any) -> _Found:
    features, coords = file["features"], file.get("coords")
    facts = {} if coords is None else coords.attrs
    trident = "encoder" in features.attrs or "target_magnification" in facts
    target = _number(facts.get("target_magnification"))
    return _Found(
        tool="TRIDENT" if trident else "CLAM",
        features=np.asarray(features),
        coords=None if coords is None else np.asarray(coords),
        slide=_text(facts.get("name")) or _text(features.attrs.get("name")),
        encoder=_text(features.attrs.get("encoder")),
        # CLAM's patch_size is in pixels of patch_level, which nothing here gives a resolution
        patch_side_px=int(_number(facts.get("patch_size"))) if trident else UNKNOWN_NUMBER,
        patch_side_px0=_number(facts.get("patch_size_level0")),
        overlap_px=int(_number(facts.get("overlap"))),
        note=f"TRIDENT calls the patches {target:g}x" if target > 0 else "",
    )


def _read_stamp(path: Path, file: Any) -> _Found:
    kind = _text(file.attrs.get("feat_type")) or ("slide" if "encoder" in file.attrs else "tile")
    if kind != "tile":
        raise FeatureFileError(str(path), f"holds one embedding of a {kind}, not of its patches")
    coords = np.asarray(file["coords"]) if "coords" in file else None
    features = np.asarray(file["feats"])
    if "augmented" in file:  # version 1 appends copies with changed colours
        own = ~np.asarray(file["augmented"], bool)
        features = features[own]
        coords = coords[own] if coords is not None and len(coords) == len(own) else coords
    version = _text(file.attrs.get("stamp_version"))
    side_um, um_per_unit = _stamp_units(file.attrs, coords)
    return _Found(
        tool=f"STAMP {version}".rstrip(),
        features=features,
        coords=coords if um_per_unit else None,
        um_per_unit=um_per_unit,
        encoder=_text(file.attrs.get("extractor")),
        patch_side_px=int(_number(file.attrs.get("tile_size_px"))),
        patch_side_um=side_um,
    )


def _stamp_units(facts: Any, coords: NDArray[Any] | None) -> tuple[float, float | None]:
    """Side of a tile in µm and µm for each unit of ``coords``; -1 and None where the file does not say."""
    if "tile_size_um" in facts:
        return float(facts["tile_size_um"]), 1.0
    if "tile_size" in facts and _text(facts.get("unit")) == "um":
        return float(facts["tile_size"]), 1.0
    units, um = STAMP_1_TILE
    step = facts["tile_size"] if "tile_size" in facts else _smallest_step(coords)
    return (um, um / units) if step is not None and round(float(step)) == units else (UNKNOWN_NUMBER, None)


def _smallest_step(coords: NDArray[Any] | None) -> float | None:
    if coords is None or coords.ndim != 2:
        return None
    steps = np.concatenate([np.diff(np.unique(column)) for column in coords.T])
    return float(steps.min()) if len(steps) else None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):  # nothing, or TRIDENT's word for it
        return UNKNOWN_NUMBER


def _text(value: Any) -> str:
    """An attribute as text; TRIDENT writes ``None`` for what it does not know."""
    text = (
        value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value if value is not None else "")
    )
    return "" if text == "None" else text


# Checks and units ---------------------------------------------------------------------------------------------


def _check_features(path: Path, features: NDArray[Any]) -> NDArray[np.float32]:
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2 or features.dtype.kind != "f":
        raise FeatureFileError(
            str(path), f"features are {features.dtype} {features.shape}, wanted (patches, features) of decimals"
        )
    if features.size == 0:
        raise FeatureFileError(str(path), f"is empty: features {features.shape}")
    with np.errstate(over="ignore"):
        features = features.astype(np.float32, copy=False)
    if not np.isfinite(features).all():
        odd = np.flatnonzero(~np.isfinite(features).all(axis=1))
        raise FeatureFileError(
            str(path), f"{len(odd)} of {len(features)} patches have features that are no numbers"
        )
    return features


def _place(
    path: Path, found: _Found, slide_mpp: float | None, given: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64] | None, str]:
    """(n, 2) corners in level-0 pixels and nothing, or None and the reason."""
    coords = found.coords if given is None else np.asarray(given)
    if coords is None:
        return None, f"{found.tool} left no coordinates that say where the patches lie; give them"
    if coords.ndim == 3 and len(coords) == 1:
        coords = coords[0]
    if coords.shape != (len(found.features), 2):
        raise FeatureFileError(
            str(path), f"features {found.features.shape} and coords {coords.shape} do not go together"
        )
    if coords.dtype.kind not in "iuf" or not (np.abs(coords.astype(np.float64)) < 2**31).all():
        raise FeatureFileError(str(path), "has coords that are no pixels of a slide")
    if given is None and found.um_per_unit is not None:
        if not slide_mpp:
            return None, "its coordinates are in µm; give the slide's µm per pixel (--slide_mpp)"
        coords = coords.astype(np.float64) * (found.um_per_unit / slide_mpp)
    return np.rint(coords).astype(np.int64), ""


def _measure(found: _Found, slide_mpp: float | None, side_px: int, given_px0: float | None) -> tuple[float, float]:
    """Side of a patch in level-0 pixels and µm/px the encoder saw, from what is known; -1 for what is not."""
    side_px0, side_um = given_px0 or found.patch_side_px0, found.patch_side_um
    if side_px0 <= 0 and side_um > 0 and slide_mpp:
        side_px0 = side_um / slide_mpp
    if side_um <= 0 and side_px0 > 0 and slide_mpp:
        side_um = side_px0 * slide_mpp
    return side_px0, side_um / side_px if side_um > 0 and side_px > 0 else UNKNOWN_NUMBER


def _floats(origin: FeatureOrigin) -> FeatureOrigin:
    """Unknown numbers in the type of their field, as a feature file gives them back."""
    return replace(
        origin,
        slide_mpp=float(origin.slide_mpp),
        patch_mpp=float(origin.patch_mpp),
        patch_side_px0=float(origin.patch_side_px0),
        min_tissue=float(origin.min_tissue),
    )


def _damaged(path: Path, error: BaseException) -> FeatureFileError:
    reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return FeatureFileError(str(path), f"damaged, or not a feature file ({reason}); copy it again")
