"""Composed bags: sequences put together from labelled tiles, so that every patch label is known.

Not slides of a cohort. A bag is background with, if positive, one contiguous run of the finding; distractor
runs (lesions that are not the finding) come in bags of both classes alike, without which the task is trivial.
Tiles are split before bags are made, so that no tile is seen in training and in testing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sklearn.cluster import KMeans
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

from s4mil_monai.errors import TableError
from s4mil_monai.training.bags import LabelledBag
from s4mil_monai.training.splits import Split

Apart = Literal["tile", "stain"]
"""What never meets in two parts: a tile, or tiles of like colour."""

SHARES = (5, 2, 3)
"""Tenths of the tiles to train on, to validate on and to test on."""

STAINS = 20
"""Groups of like colour."""


@dataclass(frozen=True)
class TileFeatures:
    """Features of single tiles."""

    features: NDArray[np.float32]
    """(n, D)."""
    labels: NDArray[np.str_]
    """(n,) names of tissue classes."""
    colours: NDArray[np.float32] | None = None
    """(n, 6) mean and deviation of red, green and blue, where they are known."""

    def take(self, indices: NDArray[np.int64]) -> TileFeatures:
        """Some of the tiles."""
        colours = None if self.colours is None else self.colours[indices]
        return TileFeatures(self.features[indices], self.labels[indices], colours)

    def resample(self, generator: np.random.Generator) -> TileFeatures:
        """As many tiles of every class, drawn with replacement: one sample of a bootstrap over tiles."""
        places = [np.flatnonzero(self.labels == name) for name in np.unique(self.labels)]
        return self.take(np.concatenate([generator.choice(of_class, len(of_class)) for of_class in places]))


class BagRecipe(BaseModel):
    """How a bag is composed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    background: str = "H"
    finding: str = "AC"
    distractors: tuple[str, ...] = ("S", "T", "V")
    length: tuple[int, int] = (100, 5000)
    """Patches of the shortest and of the longest bag; log-uniform between."""
    run_share: tuple[float, float] = (0.02, 0.2)
    """Length of a run as a share of the bag; uniform between."""
    distractor_share: float = Field(default=0.7, ge=0, le=1)
    """Share of bags, of both classes, that have a run of distractors."""
    finding_share: tuple[float, float] = (1.0, 1.0)
    """Share of the finding in the features of its patches, uniform between; the rest is of a background tile."""
    noise: float = Field(default=0.0, ge=0)
    """Gaussian noise on every patch: its deviation, in deviations of each feature over the tiles."""

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> BagRecipe:
        for name, highest in (("length", np.inf), ("run_share", 1.0), ("finding_share", 1.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= highest:
                raise ValueError(f"{name} is lowest and highest, above 0 and up to {highest:g}, got {low}, {high}")
        return self


@dataclass(frozen=True)
class ComposedBag:
    """A bag that knows which tiles it is made of; its features are put together when they are asked for.

    400 bags of 100 to 5,000 patches would take 3 GB, their tiles take 9 MB.
    """

    slide: str
    label: int
    patch_labels: NDArray[np.int64]
    """(L,) 1 for the finding."""
    tiles: TileFeatures
    drawn: NDArray[np.int64]
    """(L,) the tile of each patch."""
    mixed_with: NDArray[np.int64]
    """(L,) the tile that is blended in."""
    share: NDArray[np.float32]
    """(L,) share of the first of the two in the features."""
    noise: NDArray[np.float32] | None
    """(D,) deviation of the noise."""
    noise_seed: int

    site: str = ""
    top_left_px0: None = None

    @property
    def patient(self) -> str:
        """Bags have none: its own name."""
        return self.slide

    @property
    def length(self) -> int:
        """L."""
        return len(self.drawn)

    @property
    def features(self) -> NDArray[np.float32]:
        """(L, D), the same whenever they are asked for."""
        found = self.tiles.features[self.drawn]
        mixed = np.flatnonzero(self.share < 1)
        share = self.share[mixed, None]
        found[mixed] = share * found[mixed] + (1 - share) * self.tiles.features[self.mixed_with[mixed]]
        if self.noise is not None:
            generator = np.random.default_rng(self.noise_seed)
            found += self.noise * generator.standard_normal(found.shape, dtype=np.float32)
        return found

    def loaded(self) -> LabelledBag:
        """The bag with its features in memory."""
        return LabelledBag(self.slide, self.features, self.label, self.patient, self.patch_labels)


def load_tile_features(path: str | Path) -> TileFeatures:
    """Load ``features``, ``labels`` and, where they are, ``colours`` from an ``.npz`` file.

    Raises:
        TableError: It is missing, or lacks features or labels.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            colours = file.get("colours", None)
            return TileFeatures(file["features"], file["labels"], colours)
    except (OSError, KeyError, ValueError) as error:
        raise TableError(str(path), f"is no file of tile features ({error})") from error


def compose_split(
    tiles: str | Path,
    *,
    train: int = 200,
    validation: int = 80,
    test: int = 200,
    seed: int = 0,
    apart: Apart = "tile",
    recipe: BagRecipe | None = None,
    standardize: bool = False,
) -> Split:
    """Split tiles 50 : 20 : 30, then compose bags of each part, half of them positive.

    Bags are named after their part and the seed: those of two seeds are different bags.

    Args:
        tiles: File of tile features.
        train: Bags to train on.
        validation: Bags to choose the best epoch by.
        test: Bags to report on.
        seed: Of the split and of the bags.
        apart: What never meets in two parts.
        recipe: How bags are composed.
        standardize: Give each feature mean 0 and deviation 1 over the training tiles.

    Raises:
        TableError: The file is no file of tile features, or its tiles cannot be split that way.
    """
    parts = split_tile_file(tiles, seed=seed, apart=apart)
    if standardize:
        parts = standardize_tiles(parts)
    counts = {"train": train, "validation": validation, "test": test}
    bags = [
        compose_bags(part, recipe or BagRecipe(), count=count, seed=seed + 1000 * i, name=f"{name}_seed{seed}")
        for i, (part, (name, count)) in enumerate(zip(parts, counts.items(), strict=True), start=1)
    ]
    return Split(*bags)


def split_tile_file(path: str | Path, *, seed: int, apart: Apart) -> list[TileFeatures]:
    """Load tiles and split them into those to train on, to validate on and to test on.

    Raises:
        TableError: The file is no file of tile features, lacks the colours that are wanted, or a part lacks a
            class.
    """
    tiles = load_tile_features(path)
    if apart == "tile":
        return split_tiles(tiles, shares=[share / sum(SHARES) for share in SHARES], seed=seed)
    if tiles.colours is None:
        raise TableError(str(path), "has no colours to keep like stains apart by; embed the tiles again")
    parts = split_stains(tiles, seed=seed)
    if any(set(part.labels) != set(tiles.labels) for part in parts):
        raise TableError(str(path), f"seed {seed} leaves a part without a class; take another seed")
    return parts


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


def split_stains(tiles: TileFeatures, *, seed: int) -> list[TileFeatures]:
    """Split tiles about 5 : 2 : 3 so that tiles of like colour stay together.

    Colour tells slides and laboratories apart; where nobody wrote down which slide a tile is of, this is as near
    as one comes to testing on another source. Shares of the classes are as even as the groups allow.
    """
    assert tiles.colours is not None
    scaled = StandardScaler().fit_transform(tiles.colours)
    # scikit-learn has no types; n_init is taken for a text as its default is
    groups = KMeans(STAINS, n_init=4, random_state=seed).fit_predict(scaled)  # pyright: ignore[reportArgumentType]
    splitter = StratifiedGroupKFold(sum(SHARES), shuffle=True, random_state=seed)
    tenths = [test for _, test in splitter.split(scaled, tiles.labels, groups)]
    ends = np.cumsum((0, *SHARES))
    return [tiles.take(np.concatenate(tenths[a:b])) for a, b in pairwise(ends)]


def standardize_tiles(parts: Sequence[TileFeatures]) -> list[TileFeatures]:
    """Give each feature mean 0 and deviation 1 over the tiles of the first part; constant features become 0."""
    scaler = StandardScaler().fit(parts[0].features)
    return [replace(part, features=np.asarray(scaler.transform(part.features), np.float32)) for part in parts]


def compose_bags(
    tiles: TileFeatures, recipe: BagRecipe, *, count: int, seed: int, name: str = "bag"
) -> list[ComposedBag]:
    """Compose bags, negative and positive in turn; patch label 1 is the finding."""
    generator = np.random.default_rng(seed)
    noise = (recipe.noise * tiles.features.std(0)).astype(np.float32) if recipe.noise else None
    return [_compose(tiles, recipe, bool(i % 2), generator, noise, f"{name}_{i:04d}") for i in range(count)]


def _compose(
    tiles: TileFeatures,
    recipe: BagRecipe,
    positive: bool,
    generator: np.random.Generator,
    noise: NDArray[np.float32] | None,
    name: str,
) -> ComposedBag:
    kinds = _lay_out(recipe, positive, generator)
    is_finding = kinds == recipe.finding
    share = generator.uniform(*recipe.finding_share, len(kinds))
    return ComposedBag(
        slide=name,
        label=int(positive),
        patch_labels=is_finding.astype(np.int64),
        tiles=tiles,
        drawn=_draw(tiles, kinds, generator),
        mixed_with=_draw(tiles, np.full(len(kinds), recipe.background), generator),
        share=np.where(is_finding, share, 1).astype(np.float32),
        noise=noise,
        noise_seed=int(generator.integers(2**32)),
    )


def _lay_out(recipe: BagRecipe, positive: bool, generator: np.random.Generator) -> NDArray[np.str_]:
    """(L,) kinds of tissue along a bag."""
    low, high = recipe.length
    length = int(np.exp(generator.uniform(np.log(low), np.log(high))))
    names = np.array((recipe.background, recipe.finding, *recipe.distractors))
    kinds = np.full(length, recipe.background, names.dtype)
    if generator.random() < recipe.distractor_share:
        kinds[_run(length, recipe, generator)] = generator.choice(recipe.distractors)
    if positive:  # laid last, so that it is never covered
        kinds[_run(length, recipe, generator)] = recipe.finding
    return kinds


def _draw(tiles: TileFeatures, kinds: NDArray[np.str_], generator: np.random.Generator) -> NDArray[np.int64]:
    """(L,) a tile of each kind, drawn with replacement."""
    drawn = np.empty(len(kinds), np.int64)
    for kind in np.unique(kinds):
        places = np.flatnonzero(kinds == kind)
        drawn[places] = generator.choice(np.flatnonzero(tiles.labels == kind), len(places))
    return drawn


def _run(length: int, recipe: BagRecipe, generator: np.random.Generator) -> slice:
    size = max(1, round(length * generator.uniform(*recipe.run_share)))
    start = int(generator.integers(0, length - size + 1))
    return slice(start, start + size)
