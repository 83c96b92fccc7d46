"""One HDF5 file a slide, written whole or not at all, which CLAM and TRIDENT users can read as it is.

A file has

- ``features`` (n, d) float32, with the attributes ``name`` and ``encoder`` as TRIDENT has them;
- ``coords`` (n, 2) int64, corners (x, y) in level-0 pixels, with TRIDENT's attributes ``patch_size``,
  ``patch_size_level0``, ``overlap`` and ``name``;
- attributes of the file: ``format``, everything in :class:`FeatureOrigin` under its own name, and
  ``content_sha256``, a checksum of both arrays.

CLAM and TRIDENT read ``features`` and ``coords`` in level-0 pixels. TRIDENT's magnifications are left out: it
derives them from rules of its own, and a nominal 20x is not what was measured.

STAMP wants ``feats`` and, under the same name ``coords``, µm; it also takes a file whose attributes name an
``encoder`` for a slide embedding. No file can be both, so STAMP gets a file of its own from
:func:`export_stamp`.

Each array carries HDF5's own checksum too (fletcher32), so that other tools stop at a damaged file as well, and
the file is in the form of HDF5 1.10, with attributes and structure under checksums; its texts have a fixed
length, which h5py gives as bytes. A number in
:class:`FeatureOrigin` that is not known, as in files of other tools, is :data:`UNKNOWN_NUMBER`, a text
:data:`UNKNOWN`, a checksum empty.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from s4mil_monai.errors import FeatureFileError, OutputError
from s4mil_monai.features.claim import BusyError, claim
from s4mil_monai.processes import name_machine, process_is_gone
from s4mil_monai.result import PatchSettings
from s4mil_monai.slides.resolution import SAME_RESOLUTION
from s4mil_monai.whole_file import sync_folder

FEATURE_FORMAT = "s4mil.features/1"

UNKNOWN = "unknown"
"""A text in :class:`FeatureOrigin` that nobody knows."""

UNKNOWN_NUMBER = -1
"""A number in :class:`FeatureOrigin` that nobody knows; no size, share or resolution is negative."""

DAY_S = 24 * 3600.0
"""After this long a half-written file is nobody's, whatever machine began it."""

CHUNK_BYTES = 1 << 20

# HDF5 raises any of these for a damaged file, depending on which byte is wrong.
DAMAGE = (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, MemoryError, OverflowError)


class OtherFormatError(FeatureFileError):
    """The file can be read, but is not a feature file of this package."""


class ChecksumError(FeatureFileError):
    """The file can be read, but its arrays are not those that were written."""


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
    overlap_px: int = 0
    """How far neighbouring patches overlap, in pixels as the encoder saw them."""
    encoder_runtime: str = "torch"
    """What ran the encoder."""
    encoder_precision: str = "float32"
    """Of the encoder's arithmetic; the features are stored as float32."""
    damaged_patches: int = 0
    """Patches left out because they could not be decoded or disagree with the rest of the slide."""
    quality: str = "pass"
    """Verdict on the slide: ``pass``, ``warn`` or ``reject``."""


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


@dataclass(frozen=True)
class WantedFeatures:
    """What a run is going to embed with; None is for what it cannot know before, or does not mind."""

    encoder: str
    encoder_sha256: str
    settings: PatchSettings
    encoder_runtime: str = "torch"
    encoder_precision: str = "float32"
    patch_stage: str | None = None
    slide_sha256: str | None = None
    slide_mpp: float | None = None
    """µm per level-0 pixel, as the operator's table or the slide says it now: it may have been corrected since."""


@dataclass(frozen=True)
class StoredFeatures:
    """What a feature file holds, before anything of it was checked."""

    bag: FeatureBag
    content_sha256: str | None
    """None in files of versions that did not write it."""


def save_bag(path: Path, bag: FeatureBag) -> None:
    """Write a feature file, and its folder where there is none; the name appears when the file is whole.

    The same bag gives the same bytes. After a return the file outlasts a power failure.

    Raises:
        OutputError: The folder cannot be written.
        ValueError: Features and corners are no bag.
    """
    problem = find_wrong_shape(bag)
    if problem:
        raise ValueError(problem)
    _write_whole(path, lambda file: _fill(file, bag))


def export_stamp(bag: FeatureBag, path: Path) -> None:
    """Write a bag for STAMP 2.1 or newer: ``feats``, ``coords`` in µm, tile size in µm and pixels.

    ``stamp_version`` is not written: STAMP did not make the file, and refuses versions newer than its own.

    Raises:
        OutputError: The folder cannot be written, or the bag does not know its resolution.
    """
    origin = bag.origin
    if origin.slide_mpp <= 0 or origin.patch_side_px0 <= 0:
        raise OutputError(str(path), f"STAMP wants µm, and the resolution of {origin.slide} is not known")

    def fill(file: Any) -> None:
        file.create_dataset("feats", data=bag.features.astype(np.float32, copy=False), **_layout(bag.features))
        coords_um = (bag.top_left_px0 * origin.slide_mpp).astype(np.float32)
        file.create_dataset("coords", data=coords_um, **_layout(coords_um))
        # STAMP compares texts, which h5py gives as str only if their length is not fixed.
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = origin.patch_side_px0 * origin.slide_mpp
        if origin.patch_side_px > 0:
            file.attrs["tile_size_px"] = origin.patch_side_px
        file.attrs["extractor"] = origin.encoder
        file.attrs["feat_type"] = "tile"

    _write_whole(path, fill)


def load_bag(path: Path) -> FeatureBag:
    """Read a feature file and check it against the checksum in it, where there is one.

    Raises:
        FeatureFileError: It is missing, damaged, or lacks something a bag needs.
    """
    stored = read_stored(path)
    problem = find_wrong_shape(stored.bag)
    if problem:
        raise FeatureFileError(str(path), problem)
    if stored.content_sha256 not in (None, content_sha256(stored.bag)):
        raise ChecksumError(str(path), CHECKSUM_REASON)
    return stored.bag


CHECKSUM_REASON = "its features or coords are not those that were written (checksum); embed the slide again"


def read_origin(path: Path) -> FeatureOrigin:
    """Read where a file's features come from, and nothing else: no array is read or checked.

    A file that was cut short is found, one whose arrays were changed is not.

    Raises:
        FeatureFileError: It is missing, damaged, of another format, or lacks a fact.
    """
    with _open(path) as file:
        return _read_origin(path, file)


def count_patches(path: Path) -> int:
    """How many patches a file has features of; no array is read or checked.

    Raises:
        FeatureFileError: It is missing, damaged, or has no features.
    """
    with _open(path) as file:
        return len(file["features"])


def read_stored(path: Path) -> StoredFeatures:
    """Read a feature file without checking its checksum and shapes, for those who report on it.

    Raises:
        FeatureFileError: It is missing, damaged, or lacks an array or a fact.
    """
    with _open(path) as file:
        origin = _read_origin(path, file)
        features, corners = np.asarray(file["features"]), np.asarray(file["coords"])
        stored = _plain(file.attrs.get("content_sha256"))
    return StoredFeatures(FeatureBag(features, corners, origin), stored)


def find_wrong_shape(bag: FeatureBag) -> str | None:
    """Why features and coords are no bag: numbers of patches that differ, text for numbers, and the like."""
    features, corners = bag.features, bag.top_left_px0
    if features.ndim != 2 or corners.shape != (len(features), 2):
        return f"features {features.shape} and coords {corners.shape} do not go together"
    if features.dtype.kind != "f" or corners.dtype.kind not in "iu":
        return f"features are {features.dtype} and coords {corners.dtype}, wanted float32 and int64"
    return None


def content_sha256(bag: FeatureBag) -> str:
    """SHA-256 over the names, types, shapes and bytes of features and coords."""
    digest = hashlib.sha256()
    for name, values in (("features", bag.features), ("coords", bag.top_left_px0)):
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def find_reason_to_embed(path: Path, wanted: WantedFeatures) -> str | None:
    """Why a slide has to be embedded, in words, or None when the file that is there is what is wanted.

    Reads attributes only; ``s4mil features verify`` reads everything.

    Raises:
        OtherFormatError: The file is another tool's, or of a version to come: not ours to replace.
    """
    if not path.is_file():
        return "not embedded yet"
    try:
        found = read_origin(path)
    except OtherFormatError:
        raise
    except FeatureFileError as error:
        return error.reason
    return mismatch(found, wanted)


def mismatch(found: FeatureOrigin, wanted: WantedFeatures) -> str | None:
    """Say in words how features differ from those that are wanted; None if they do not."""
    settings = wanted.settings
    same: list[tuple[str, Any, Any]] = [
        ("slide content", found.slide_sha256, wanted.slide_sha256),
        ("encoder", found.encoder, wanted.encoder),
        ("encoder weights", found.encoder_sha256, wanted.encoder_sha256),
        ("encoder runtime", found.encoder_runtime, wanted.encoder_runtime),
        ("encoder precision", found.encoder_precision, wanted.encoder_precision),
        ("patch stage", found.patch_stage, wanted.patch_stage),
        ("patch side in px", found.patch_side_px, settings.side_px),
        ("overlap in px", found.overlap_px, settings.overlap_px),
        ("least share of tissue", found.min_tissue, settings.min_tissue),
        ("scan order", found.scan_order, settings.scan_order),
    ]
    differing = [(what, there, want) for what, there, want in same if want is not None and there != want]
    if not has_patch_mpp(found, settings.mpp):
        differing.append(("patch resolution in µm/px", found.patch_mpp, settings.mpp))
    if wanted.slide_mpp is not None and not math.isclose(found.slide_mpp, wanted.slide_mpp, rel_tol=1e-9):
        differing.append(("slide resolution in µm/px", found.slide_mpp, wanted.slide_mpp))
    if not differing:
        return None
    return "; ".join(f"{what}: {_short(there)}, wanted {_short(want)}" for what, there, want in differing)


def has_patch_mpp(origin: FeatureOrigin, mpp: float) -> bool:
    """Whether patches were made for ``mpp`` µm/px.

    They are of a whole number of their slide's pixels, and levels within 1 % are read as they are, so they may lie
    half a pixel in their side, or 1 %, away from it.
    """
    near = SAME_RESOLUTION * mpp
    if origin.patch_side_px > 0:
        near = max(near, 0.5 * max(mpp, origin.slide_mpp) / origin.patch_side_px)
    return abs(origin.patch_mpp - mpp) <= near + 1e-9


def _short(value: Any) -> str:
    """A checksum as its first digits; anything else as it is."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{64}", text) else (text or "not known")


# Writing ------------------------------------------------------------------------------------------------------


def _write_whole(path: Path, fill: Callable[[Any], None]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}@{name_machine()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = _make_image(fill)
        with part.open("wb") as file:
            file.write(image)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _make_image(fill: Callable[[Any], None]) -> bytes:
    """The bytes of an HDF5 file of form 1.10 whose attributes lie in its header, which has a checksum.

    It is made in memory: HDF5 takes the process down with it when a disk is full. Attributes beyond the eighth
    would go to a heap without checksum, where a wrong byte is read as it is, or keeps HDF5 busy for ever.
    """
    creation, access = h5py.h5p.create(h5py.h5p.FILE_CREATE), h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    creation.set_attr_phase_change(1000, 0)
    creation.set_obj_track_times(False)  # the same bag gives the same bytes
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_fapl_core(block_size=CHUNK_BYTES, backing_store=False)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    with h5py.File(h5py.h5f.create(b"in memory", h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access)) as file:
        fill(file)
        file.flush()
        return file.id.get_file_image()


def _fill(file: Any, bag: FeatureBag) -> None:
    origin = bag.origin
    _describe(file, {"format": FEATURE_FORMAT, **asdict(origin), "content_sha256": content_sha256(bag)})
    features = file.create_dataset("features", data=bag.features, **_layout(bag.features))
    _describe(features, {"name": Path(origin.slide).stem, "encoder": origin.encoder})
    coords = file.create_dataset("coords", data=bag.top_left_px0, **_layout(bag.top_left_px0))
    sides = {
        "patch_size": origin.patch_side_px,
        "patch_size_level0": round(origin.patch_side_px0),
        "overlap": origin.overlap_px,
    }
    known = {key: side for key, side in sides.items() if side != UNKNOWN_NUMBER}
    _describe(coords, {**known, "name": origin.slide})


def _describe(thing: Any, facts: Mapping[str, str | int | float]) -> None:
    """Write attributes; texts with a fixed length, since those without lie in a heap that has no checksum."""
    for key, value in facts.items():
        if isinstance(value, str):
            text = value.encode("utf-8", "surrogateescape")
            thing.attrs.create(key, text, dtype=h5py.string_dtype("utf-8", max(len(text), 1)))
        else:
            thing.attrs[key] = value


def _layout(values: NDArray[Any]) -> dict[str, Any]:
    """HDF5's checksum needs chunks, and an empty array can have none."""
    if values.size == 0:
        return {}
    rows = max(CHUNK_BYTES // (values.itemsize * int(np.prod(values.shape[1:]))), 1)
    return {"chunks": (min(rows, len(values)), *values.shape[1:]), "fletcher32": True}


# Reading ------------------------------------------------------------------------------------------------------


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Give an open feature file; whatever HDF5 raises inside becomes an error that names it."""
    if not path.is_file():
        raise FeatureFileError(str(path), "there is no such feature file")
    try:
        # Files are never changed once they have their name, so a share without locks is no reason to stop.
        with h5py.File(path, "r", locking="best-effort") as file:
            yield file
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FeatureFileError(str(path), f"damaged or incomplete ({reason}); embed the slide again") from error


def _read_origin(path: Path, file: Any) -> FeatureOrigin:
    found = _plain(file.attrs.get("format"))
    if found != FEATURE_FORMAT:
        raise OtherFormatError(str(path), f"format is {found!r}, wanted {FEATURE_FORMAT!r}")
    facts: dict[str, Any] = {}
    for field in fields(FeatureOrigin):
        if field.name not in file.attrs and field.default is not MISSING:
            continue
        value = _plain(file.attrs[field.name])
        if type(value).__name__ != field.type:
            raise TypeError(f"{field.name} is no {field.type}")
        facts[field.name] = value
    return FeatureOrigin(**facts)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value.item() if isinstance(value, np.generic) else value


# Leftovers ----------------------------------------------------------------------------------------------------

_PART = re.compile(r"\..+\.h5\.(?P<pid>\d+)(?:@(?P<machine>.+))?\.part")
_LOCK = re.compile(r"\.(?P<name>.+\.h5)\.lock")


def is_leftover(path: Path) -> bool:
    """Whether a file was begun by a process that is gone: one of this machine that ended, or a day ago."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return False
    try:
        age_s = time.time() - path.stat().st_mtime
    except OSError:  # finished or removed meanwhile
        return False
    if age_s > DAY_S:
        return True
    return match["machine"] in (None, name_machine()) and process_is_gone(int(match["pid"]))


def clear_leftovers(folder: Path) -> list[Path]:
    """Remove what killed processes left in a folder: half-written feature files, and locks nobody holds.

    Gives the half-written files that were removed. Files that a living process writes stay.

    Raises:
        OutputError: One cannot be removed.
    """
    try:
        names = sorted(folder.iterdir()) if folder.is_dir() else []
        removed = [path for path in names if is_leftover(path)]
        for path in removed:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(str(folder), f"leftovers cannot be removed ({error.strerror or error})") from error
    for path in names:
        if match := _LOCK.fullmatch(path.name):
            with suppress(BusyError), claim(path.with_name(match["name"])):
                pass  # giving a claim back removes its lock
    return removed
