"""Labelled bags, from feature files and a table of labels, and as MONAI reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import torch
from numpy.typing import NDArray

from s4mil_monai.errors import TableError
from s4mil_monai.features.store import FeatureBag, count_patches, load_bag
from s4mil_monai.training.labels import SlideTable, name_rows, read_slide_table, without_ending
from s4mil_monai.training.origins import check_origins

LabelPatches = Callable[[NDArray[np.int64], float], NDArray[np.int64] | None]
"""(n, 2) corners in level-0 pixels and a patch's side in them → (n,) classes, or None where they are unknown."""


class Bag(Protocol):
    """What training wants of a slide, whether its features are in memory or in a file."""

    @property
    def slide(self) -> str: ...
    @property
    def label(self) -> int: ...
    @property
    def patient(self) -> str: ...
    @property
    def site(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def features(self) -> NDArray[np.float32]: ...
    @property
    def patch_labels(self) -> NDArray[np.int64] | None: ...
    @property
    def top_left_px0(self) -> NDArray[np.int64] | None: ...
    def loaded(self) -> LabelledBag: ...


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
    """(L,) classes of the patches, -1 for one that is not known; None where none is."""
    site: str = ""
    """Hospital or laboratory; empty where it is unknown."""
    top_left_px0: NDArray[np.int64] | None = None
    """(L, 2) corners (x, y) of the patches in level-0 pixels, where they are known."""

    @property
    def length(self) -> int:
        """L."""
        return len(self.features)

    def loaded(self) -> LabelledBag:
        """Itself."""
        return self


@dataclass(frozen=True)
class StoredBag:
    """A slide whose features are read from their file each time they are asked for, and then let go.

    A cohort of 400 slides with 10,000 patches of 1024 features takes 16 GB. Patch labels are kept.
    """

    slide: str
    path: Path
    """Feature file."""
    label: int
    patient: str
    site: str = ""
    label_patches: LabelPatches | None = None

    @property
    def length(self) -> int:
        """L, without reading the features.

        Raises:
            FeatureFileError: The file is missing or damaged.
        """
        return count_patches(self.path)

    @property
    def features(self) -> NDArray[np.float32]:
        """(L, D), in scan order.

        Raises:
            FeatureFileError: The file is damaged.
        """
        return load_bag(self.path).features

    @property
    def patch_labels(self) -> NDArray[np.int64] | None:
        """(L,) classes of the patches, -1 for one that is not known; None where none is.

        Raises:
            FeatureFileError: The file is damaged.
            AnnotationError: The slide's annotations are.
        """
        return self._label(None)

    @cached_property
    def _kept(self) -> dict[str, NDArray[np.int64] | None]:
        return {}

    def _label(self, bag: FeatureBag | None) -> NDArray[np.int64] | None:
        """Patch labels, worked out once; ``bag`` spares reading the file."""
        if self.label_patches is not None and not self._kept:
            bag = bag or load_bag(self.path)
            self._kept["labels"] = self.label_patches(bag.top_left_px0, bag.origin.patch_side_px0)
        return self._kept.get("labels")

    @property
    def top_left_px0(self) -> NDArray[np.int64]:
        """(L, 2) corners (x, y) of the patches in level-0 pixels.

        Raises:
            FeatureFileError: The file is damaged.
        """
        return load_bag(self.path).top_left_px0

    def loaded(self) -> LabelledBag:
        """The bag with its features in memory.

        Raises:
            FeatureFileError: The file is damaged.
            AnnotationError: The slide's annotations are.
        """
        bag = load_bag(self.path)
        return LabelledBag(
            slide=self.slide,
            features=bag.features,
            label=self.label,
            patient=self.patient,
            patch_labels=self._label(bag),
            site=self.site,
            top_left_px0=bag.top_left_px0,
        )


class BagItems(Sequence[dict[str, Any]]):
    """Bags as MONAI's dictionaries, each made when it is asked for, so that features are let go again."""

    def __init__(self, bags: Iterable[Bag]):
        self.bags = list(bags)

    def __len__(self) -> int:
        return len(self.bags)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> BagItems: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | BagItems:
        return BagItems(self.bags[index]) if isinstance(index, slice) else as_item(self.bags[index])


def as_items(bags: Iterable[Bag]) -> Sequence[dict[str, Any]]:
    """Bags as MONAI's dictionaries, see :func:`as_item`; made when they are asked for unless all are in memory."""
    bags = list(bags)
    in_memory = all(isinstance(bag, LabelledBag) for bag in bags)
    return [as_item(bag) for bag in bags] if in_memory else BagItems(bags)


def as_item(bag: Bag) -> dict[str, Any]:
    """``image`` (D, L) channel first, ``label`` () int64, ``slide``; ``patch_label`` (L,) int64 where it is known.

    Raises:
        FeatureFileError: The file of a stored bag is damaged.
        AnnotationError: Its annotations are.
    """
    loaded = bag.loaded()
    item = {
        "image": torch.from_numpy(np.ascontiguousarray(loaded.features.T)),
        "label": torch.tensor(loaded.label),
        "slide": loaded.slide,
    }
    if loaded.patch_labels is not None:
        item["patch_label"] = torch.from_numpy(loaded.patch_labels)
    return item


def load_feature_bags(
    folder: str | Path,
    table: str | Path,
    *,
    encoder: str | None = None,
    patches: Mapping[str, Any] | None = None,
) -> list[LabelledBag]:
    """Load ``<slide>.h5`` for each row of a table of labels.

    Args:
        folder: Where the feature files lie.
        table: CSV with the columns ``slide`` (file name without ending) and ``label`` (0, 1, …), and ``patient``
            if patients have several slides.
        encoder: Refuse features of another one.
        patches: Refuse features of other patches than a model's; see
            :func:`~s4mil_monai.training.origins.check_origins`.

    Raises:
        TableError: The table is wrong, see :func:`read_slide_table`, names a slide without features, or features
            that do not go together.
        FeatureFileError: A feature file is damaged.
    """
    slides = read_slide_table(table)
    paths = find_feature_files(slides, folder)
    loaded = [load_bag(path) for path in paths]
    check_origins(slides, [bag.origin for bag in loaded], encoder=encoder, patches=patches)
    return [
        LabelledBag(row.slide, bag.features, row.label, row.patient, site=row.site, top_left_px0=bag.top_left_px0)
        for row, bag in zip(slides.entries(), loaded, strict=True)
    ]


def find_feature_files(table: SlideTable, folder: str | Path) -> list[Path]:
    """The feature file of each slide; ``Tumor_001.h5`` does for ``tumor_001`` where there is no other.

    Raises:
        TableError: A slide has none; the rows are named.
    """
    found = find_slide_files(table.slides, folder, (".h5",))
    missing = table.rows[[path is None for path in found]]
    if len(missing):
        ended = [slide for slide in missing["slide"] if without_ending(slide) != slide]
        hint = "; slides are named without ending" if ended else ""
        raise TableError(table.path, f"no features in {folder} for {name_rows(missing)}{hint}")
    return [path for path in found if path is not None]


def find_slide_files(slides: Sequence[str], folder: str | Path, endings: Sequence[str]) -> list[Path | None]:
    """For each slide the file of its name in a folder, in small or capital letters, with one of the endings."""
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    exact, folded = set(names), {name.casefold(): name for name in names}
    found: list[Path | None] = []
    for slide in slides:
        wanted = [slide + ending for ending in endings]
        there = [name for name in wanted if name in exact]
        there += [folded[name.casefold()] for name in wanted if name.casefold() in folded]
        found.append(folder / there[0] if there else None)
    return found
