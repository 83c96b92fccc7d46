"""audit_features(): what is wrong with the feature files of a folder."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s4mil_monai.errors import FeatureFileError, S4MilError
from s4mil_monai.features.store import (
    CHECKSUM_REASON,
    FeatureBag,
    FeatureOrigin,
    OtherFormatError,
    content_sha256,
    find_wrong_shape,
    is_leftover,
    read_stored,
)
from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.reader import open_slide

TOGETHER = (
    "encoder",
    "encoder_sha256",
    "encoder_runtime",
    "encoder_precision",
    "patch_side_px",
    "overlap_px",
    "min_tissue",
    "scan_order",
    "patch_stage",
)
"""Facts in which all files of one folder agree if they were made for one model."""

MPP_TOLERANCE = 0.02
"""Share by which the resolutions of patches in one folder may differ: each is that of a whole number of its
slide's pixels, and at 256 px and 40x half of one is 0.1 %."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one file."""

    path: Path
    code: str
    """Fixed word for machines: ``unreadable``, ``other_format``, ``wrong_shape``, ``empty``, ``checksum``,
    ``no_checksum``, ``not_finite``, ``duplicate_places``, ``outside_slide``, ``slide_missing``,
    ``slide_unreadable``, ``slide_changed``, ``other_slide``, ``same_slide``, ``other_encoder``, ``mixed``,
    ``leftover``."""
    text: str
    """One sentence for a person, without the path."""


def audit_features(
    folder: Path, *, slides: Path | None = None, encoder_sha256: str | None = None
) -> list[Finding]:
    """Check every feature file under a folder; an empty list says that nothing is wrong.

    One slide's features are in memory at a time. With ``slides``, every slide is read from end to end.

    Args:
        folder: With feature files, in folders of any depth.
        slides: Where the slides lie, in folders of any depth; their content is compared with what the features
            were made from.
        encoder_sha256: Fingerprint of the encoder that all features have to come from.

    Raises:
        FeatureFileError: There is no such folder.
    """
    for place in (folder, slides):
        if place is not None and not place.is_dir():
            raise FeatureFileError(str(place), "there is no such folder")
    found: list[Finding] = []
    origins: dict[Path, FeatureOrigin] = {}
    by_name = _index(slides) if slides is not None else None
    for path in sorted(folder.rglob("*.h5")):
        if path.name.startswith("."):
            continue
        try:
            stored = read_stored(path)
        except FeatureFileError as error:
            code = "other_format" if isinstance(error, OtherFormatError) else "unreadable"
            found.append(Finding(path, code, error.reason))
            continue
        origins[path] = stored.bag.origin
        found.extend(_check_arrays(path, stored.bag, stored.content_sha256))
        found.extend(_check_origin(path, stored.bag.origin, encoder_sha256))
        if by_name is not None:
            found.extend(_check_slide(path, stored.bag, by_name))
    found.extend(_check_together(origins))
    found.extend(
        Finding(path, "leftover", "half-written by a process that was killed; a next run removes it")
        for path in folder.rglob(".*.part")
        if is_leftover(path)
    )
    return sorted(found, key=lambda finding: (finding.path, finding.code))


# One file -----------------------------------------------------------------------------------------------------


def _check_arrays(path: Path, bag: FeatureBag, stored_sha256: str | None) -> Iterator[Finding]:
    problem = find_wrong_shape(bag)
    if problem:
        yield Finding(path, "wrong_shape", problem)
        return
    if len(bag) == 0:
        yield Finding(path, "empty", "has no patches")
        return
    if stored_sha256 is None:
        yield Finding(path, "no_checksum", "has no checksum, so damage would not be seen; embed the slide again")
    elif stored_sha256 != content_sha256(bag):
        yield Finding(path, "checksum", CHECKSUM_REASON)
    odd = np.count_nonzero(~np.isfinite(bag.features).all(axis=1))
    if odd:
        yield Finding(path, "not_finite", f"{odd} of {len(bag)} patches have features that are no numbers")
    twice = len(bag) - len(np.unique(bag.top_left_px0, axis=0))
    if twice:
        yield Finding(path, "duplicate_places", f"{twice} of {len(bag)} patches lie where another one does")


def _check_origin(path: Path, origin: FeatureOrigin, encoder_sha256: str | None) -> Iterator[Finding]:
    # Beside a result, the file is called features.h5 and its folder after the slide.
    stem = path.parent.name if path.name == "features.h5" else path.stem
    if stem not in (origin.slide, Path(origin.slide).stem):
        yield Finding(path, "other_slide", f"holds the features of {origin.slide}, by its name those of {stem}")
    if encoder_sha256 is not None and origin.encoder_sha256 != encoder_sha256:
        there = f"{origin.encoder} {origin.encoder_sha256[:12] or 'without fingerprint'}"
        yield Finding(path, "other_encoder", f"embedded with {there}, wanted weights {encoder_sha256[:12]}")


def _check_slide(path: Path, bag: FeatureBag, by_name: Mapping[str, Sequence[Path]]) -> Iterator[Finding]:
    origin = bag.origin
    candidates = by_name.get(origin.slide, ())
    if not candidates:
        yield Finding(path, "slide_missing", f"its slide {origin.slide} is not among the slides")
        return
    try:
        same = (slide for slide in candidates if fingerprint_slide(slide) == origin.slide_sha256)
        slide = next(same, None)
        if slide is None and origin.slide_sha256:  # files of other tools do not know it
            yield Finding(
                path, "slide_changed", f"{origin.slide} is not the slide that was embedded; embed it again"
            )
        with open_slide(slide or candidates[0]) as opened:
            outside = _count_outside(bag.top_left_px0, opened.size_px0)
            width, height = opened.size_px0
    except OSError as error:
        yield Finding(path, "slide_unreadable", f"{origin.slide}: cannot be read ({error.strerror or error})")
    except S4MilError as error:
        yield Finding(path, "slide_unreadable", str(error))
    else:
        if outside:
            yield Finding(
                path,
                "outside_slide",
                f"{outside} of {len(bag)} patches begin outside the slide of {width}x{height}",
            )


def _count_outside(top_left_px0: NDArray[np.int64], size_px0: tuple[int, int]) -> int:
    if top_left_px0.ndim != 2 or top_left_px0.shape[1] != 2:
        return 0
    return int(np.count_nonzero(((top_left_px0 < 0) | (top_left_px0 >= np.array(size_px0))).any(axis=1)))


def _index(slides: Path) -> dict[str, list[Path]]:
    """Files and folders, for a slide is either, by their names and by those without ending."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(slides.rglob("*")):
        for name in {path.name, path.stem}:
            by_name[name].append(path)
    return by_name


# Files beside each other --------------------------------------------------------------------------------------


def _check_together(origins: Mapping[Path, FeatureOrigin]) -> Iterator[Finding]:
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in origins:
        folders[path.parent].append(path)
    for paths in folders.values():
        yield from _find_odd_ones(paths, origins)
        yield from _find_same_slides(paths, origins)


def _find_odd_ones(paths: Sequence[Path], origins: Mapping[Path, FeatureOrigin]) -> Iterator[Finding]:
    usual = {fact: _most_common(getattr(origins[path], fact) for path in paths) for fact in TOGETHER}
    usual_mpp = float(np.median([origins[path].patch_mpp for path in paths]))
    for path in paths:
        origin = origins[path]
        odd = [
            f"{fact} {_short(getattr(origin, fact))}, but {_short(value)} in {count} of {len(paths)} files here"
            for fact, (value, count) in usual.items()
            if getattr(origin, fact) != value
        ]
        if abs(origin.patch_mpp - usual_mpp) > MPP_TOLERANCE * abs(usual_mpp):
            odd.append(f"patch_mpp {origin.patch_mpp:.4g}, but about {usual_mpp:.4g} in files here")
        if odd:
            yield Finding(path, "mixed", "; ".join(odd))


def _most_common(values: Iterable[object]) -> tuple[object, int]:
    """The value most files have, and how many; of two as common, the one that came first."""
    return Counter(values).most_common(1)[0]


def _find_same_slides(paths: Sequence[Path], origins: Mapping[Path, FeatureOrigin]) -> Iterator[Finding]:
    first: dict[str, Path] = {}
    for path in paths:
        sha256 = origins[path].slide_sha256
        if sha256 and first.setdefault(sha256, path) != path:
            yield Finding(path, "same_slide", f"holds the same slide as {first[sha256].name}, under another name")


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else (text or "(none)")
