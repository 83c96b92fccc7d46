"""Composed bags: sequences put together from labelled tiles, so that every patch label is known.

Not slides of a cohort. A bag is background with, if positive, one contiguous run of the finding; distractor
runs (lesions that are not the finding) come in bags of both classes alike, without which the task is trivial.
Tiles are split before bags are made, so that no tile is seen in training and in testing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s4mil_monai.errors import TableError
from s4mil_monai.training.bags import LabelledBag
from s4mil_monai.training.splits import Split


@dataclass(frozen=True)
class TileFeatures:
    """Features of single tiles."""

    features: NDArray[np.float32]
    """(n, D)."""
    labels: NDArray[np.str_]
    """(n,) names of tissue classes."""

    def take(self, indices: NDArray[np.int64]) -> TileFeatures:
        """Some of the tiles."""
        return TileFeatures(self.features[indices], self.labels[indices])


@dataclass(frozen=True)
class BagRecipe:
    """How a bag is composed."""

    background: str = "H"
    finding: str = "AC"
    distractors: tuple[str, ...] = ("S", "T", "V")
    length: tuple[int, int] = (50, 1000)
    """Shortest and longest bag; log-uniform between."""
    run_share: tuple[float, float] = (0.02, 0.2)
    """Length of a run as a share of the bag; uniform between."""
    distractor_share: float = 0.7
    """Share of bags, of both classes, that have a run of distractors."""


def load_tile_features(path: str | Path) -> TileFeatures:
    """Load ``features`` and ``labels`` from an ``.npz`` file.

    Raises:
        TableError: It is missing or lacks one of them.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return TileFeatures(file["features"], file["labels"])
    except (OSError, KeyError, ValueError) as error:
        raise TableError(str(path), f"is no file of tile features ({error})") from error


def compose_split(
    tiles: str | Path, *, train: int = 200, validation: int = 80, test: int = 200, seed: int = 0
) -> Split:
    """Split tiles 50 : 20 : 30 by class, then compose bags of each part, half of them positive.

    Args:
        tiles: File of tile features.
        train: Bags to train on.
        validation: Bags to choose the best epoch by.
        test: Bags to report on.
        seed: Of the split and of the bags.
    """
    parts = split_tiles(load_tile_features(tiles), shares=(0.5, 0.2, 0.3), seed=seed)
    counts = {"train": train, "validation": validation, "test": test}
    bags = [
        compose_bags(part, BagRecipe(), count=count, seed=seed + 1000 * i, name=name)
        for i, (part, (name, count)) in enumerate(zip(parts, counts.items(), strict=True), start=1)
    ]
    return Split(*bags)


def split_tiles(tiles: TileFeatures, *, shares: Sequence[float], seed: int) -> list[TileFeatures]:
    """Split tiles at random into parts with the given shares of every class."""
    generator = np.random.default_rng(seed)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in shares]
    for name in np.unique(tiles.labels):
        indices = generator.permutation(np.flatnonzero(tiles.labels == name))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(int)
        for part, piece in zip(parts, np.split(indices, cuts), strict=True):
            part.append(piece)
    return [tiles.take(np.concatenate(part)) for part in parts]


def compose_bags(
    tiles: TileFeatures, recipe: BagRecipe, *, count: int, seed: int, name: str = "bag"
) -> list[LabelledBag]:
    """Compose bags, positive and negative in turn; patch label 1 is the finding."""
    generator = np.random.default_rng(seed)
    return [_compose(tiles, recipe, bool(i % 2), generator, f"{name}_{i:04d}") for i in range(count)]


def _compose(
    tiles: TileFeatures, recipe: BagRecipe, positive: bool, generator: np.random.Generator, name: str
) -> LabelledBag:
    low, high = recipe.length
    length = int(np.exp(generator.uniform(np.log(low), np.log(high))))
    kinds = np.full(length, recipe.background, dtype=tiles.labels.dtype)
    if generator.random() < recipe.distractor_share:
        kinds[_run(length, recipe, generator)] = generator.choice(recipe.distractors)
    if positive:  # laid last, so that it is never covered
        kinds[_run(length, recipe, generator)] = recipe.finding
    drawn = np.empty(length, np.int64)
    for kind in np.unique(kinds):
        places = np.flatnonzero(kinds == kind)
        drawn[places] = generator.choice(np.flatnonzero(tiles.labels == kind), len(places))
    return LabelledBag(
        slide=name,
        features=tiles.features[drawn],
        label=int(positive),
        patient=name,
        patch_labels=(kinds == recipe.finding).astype(np.int64),
    )


def _run(length: int, recipe: BagRecipe, generator: np.random.Generator) -> slice:
    size = max(1, round(length * generator.uniform(*recipe.run_share)))
    start = int(generator.integers(0, length - size + 1))
    return slice(start, start + size)
