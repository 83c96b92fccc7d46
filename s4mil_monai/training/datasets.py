"""Data sets: declared in ``configs/datasets``, loaded by one call whatever they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from s4mil_monai.errors import PathError, TableError, first_wrong
from s4mil_monai.features.store import read_origin
from s4mil_monai.training.annotations import EXCLUSION_GROUPS, POSITIVE_GROUPS, SUFFIXES, PatchLabelRule
from s4mil_monai.training.bags import Bag, StoredBag, find_feature_files, find_slide_files
from s4mil_monai.training.composed import Apart, BagRecipe, compose_split
from s4mil_monai.training.folds import Fold, Folds
from s4mil_monai.training.labels import (
    CAMELYON16_CLASSES,
    MUTATION_CLASSES,
    RCC_CLASSES,
    SlideTable,
    list_names,
    read_camelyon16,
    read_slide_table,
    read_tcga_genes,
    read_tcga_subtypes,
    with_test_slides,
)
from s4mil_monai.training.origins import check_origins
from s4mil_monai.training.splits import Split
from s4mil_monai.training.ucsb import TABLE as UCSB_TABLE
from s4mil_monai.training.ucsb import find_ucsb_breast, load_ucsb_breast

Kind = Literal["table", "camelyon16", "tcga_genes", "tcga_subtypes", "ucsb_breast", "composed_colon"]
STORED: tuple[Kind, ...] = ("table", "camelyon16", "tcga_genes", "tcga_subtypes")
"""Kinds with a table of labels and one feature file a slide."""


class DatasetSettingsError(PathError):
    """The settings of a data set are missing, no YAML, or say something that cannot be."""


class DatasetSettings(BaseModel):
    """What a data set is and where it lies; relative paths start at ``data_folder``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    """Names the data set in tables and file names."""
    kind: Kind = "table"
    """How its labels are read."""
    data_folder: Path = Path()
    """Where the relative paths below start; itself relative to the working directory."""
    label_table: Path | None = None
    """CSV, one row a slide."""
    feature_folder: Path | None = None
    """One ``<slide>.h5`` a slide; ``mil``'s folder of tables for UCSB; of composed bags, the file of tiles."""
    encoder: str | None = None
    """Refuse features of another encoder."""
    classes: tuple[str, ...] | None = Field(None, min_length=2)
    """Names, class 0 first; without, those of the kind, or class numbers."""
    slide_column: str | None = None
    label_column: str | None = None
    """Of genes, the gene."""
    patient_column: str | None = None
    site_column: str | None = None
    metadata_table: Path | None = None
    """CAMELYON16's hospitals."""
    test_table: Path | None = None
    """CSV of the official test set: slides, for CAMELYON16 the challenge's reference."""
    annotations_folder: Path | None = None
    """``<slide>.xml``, ``.json`` or ``.geojson``; without, no patch label is known."""
    negative_classes: tuple[str, ...] = ()
    """Slides of these classes have no positive patch; others without annotations have unknown patch labels."""
    partly_annotated: tuple[str, ...] = ()
    """Slides whose unmarked patches may be positive too: unknown rather than negative."""
    min_share: float = Field(0.5, gt=0, le=1)
    """Share of a patch that is annotated before it is positive."""
    positive_groups: tuple[str, ...] = POSITIVE_GROUPS
    exclusion_groups: tuple[str, ...] = EXCLUSION_GROUPS
    resolution_overrides: Path | None = None
    """CSV of µm/px for slides whose files do not say it (``s4mil embed --overrides``)."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of Adam."""
    standardize: bool = False
    """Give features mean 0 and deviation 1 over the training patches (of composed bags: tiles); for features made
    by hand, or where it is seen to help."""
    bags: tuple[int, int, int] = (200, 80, 200)
    """How many composed bags train, validate and test."""
    seed: int = Field(0, ge=0)
    """Of composed bags."""
    apart: Apart = "tile"
    """What composed bags of different parts never share: a tile, or tiles of like colour."""
    recipe: BagRecipe = BagRecipe()
    """How bags are composed."""

    @model_validator(mode="after")
    def _fits_together(self) -> DatasetSettings:
        if self.kind in STORED and (self.label_table is None or self.feature_folder is None):
            raise ValueError(f"a data set of kind {self.kind} wants label_table and feature_folder")
        if self.kind == "composed_colon" and self.feature_folder is None:
            raise ValueError("composed bags want the file of tile features as feature_folder")
        unused = [name for name in _UNUSED.get(self.kind, ()) if getattr(self, name) is not None]
        if unused:
            raise ValueError(f"a data set of kind {self.kind} has no use for {', '.join(unused)}")
        return self

    def place(self, path: Path | None) -> Path | None:
        """A path as seen from the working directory."""
        return None if path is None else self.data_folder / path


# A setting that is silently without effect is taken for one that works.
_UNUSED: Mapping[str, tuple[str, ...]] = {
    "table": ("metadata_table",),
    "camelyon16": ("slide_column", "label_column", "patient_column", "site_column"),
    "tcga_genes": ("slide_column", "patient_column", "site_column", "metadata_table"),
    "tcga_subtypes": ("patient_column", "site_column", "metadata_table"),
    "ucsb_breast": ("label_table", "test_table", "metadata_table", "annotations_folder", "encoder"),
    "composed_colon": ("label_table", "test_table", "metadata_table", "annotations_folder", "encoder"),
}


@dataclass(frozen=True)
class Dataset:
    """A data set ready to be divided and trained on."""

    settings: DatasetSettings
    table: SlideTable
    bags: Sequence[Bag]
    """In the order of the table; features of stored slides are read when they are asked for."""
    folds: Folds | None = None
    """Where they come with the data: composed bags, whose parts share no tile."""

    def split(self, folds: Folds, fold: int) -> Split:
        """The bags of one fold, standardised if the data set wants it; composed bags already are, as tiles."""
        standardize = self.settings.standardize and self.settings.kind != "composed_colon"
        return folds.split(fold, self.bags, standardize=standardize)


# Settings -----------------------------------------------------------------------------------------------------


def read_dataset(source: str | Path | Mapping[str, Any], **changes: Any) -> DatasetSettings:
    """Read the settings of a data set.

    Args:
        source: A YAML file as in ``configs/datasets``, or its content.
        changes: Settings to use instead, such as ``data_folder``.

    Raises:
        DatasetSettingsError: They are missing, no YAML, incomplete, or have something unknown.
    """
    name, content = (
        ("data set", dict(source)) if isinstance(source, Mapping) else (str(source), _read_yaml(source))
    )
    try:
        return DatasetSettings.model_validate({**content, **changes})
    except ValidationError as error:
        raise DatasetSettingsError(name, first_wrong(error)) from error


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetSettingsError(str(path), f"cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise DatasetSettingsError(str(path), f"is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise DatasetSettingsError(str(path), "is no table of settings: name, kind, label_table, …")
    return content


# Loading ------------------------------------------------------------------------------------------------------


def load_dataset(settings: DatasetSettings) -> Dataset:
    """Bring labels, features and patch labels together.

    Raises:
        TableError: The table is wrong, names a slide without features, or features of different kinds.
        FeatureFileError: A feature file is damaged.
        DatasetSettingsError: A setting names a class or slide that is not there.
        MissingExtraError: The data come with a package that is not installed.
    """
    return _LOADERS[settings.kind](settings)


def load_table(settings: DatasetSettings) -> SlideTable:
    """Read the label table of a stored data set, with its official test set.

    Raises:
        TableError: It is wrong.
        ValueError: The data set has none.
    """
    path = settings.place(settings.label_table)
    if path is None:
        raise ValueError(f"a data set of kind {settings.kind} has no table of labels")
    test = settings.place(settings.test_table)
    if settings.kind == "camelyon16":
        return read_camelyon16(
            path,
            metadata=settings.place(settings.metadata_table),
            reference=test,
            classes=settings.classes or CAMELYON16_CLASSES,
        )
    table = _read_labels(settings, path)
    return table if test is None else with_test_slides(table, test)


def _read_labels(settings: DatasetSettings, path: Path) -> SlideTable:
    if settings.kind == "tcga_genes":
        gene = settings.label_column or "TP53"
        return read_tcga_genes(path, gene=gene, classes=settings.classes or MUTATION_CLASSES)
    if settings.kind == "tcga_subtypes":
        return read_tcga_subtypes(
            path,
            classes=settings.classes or RCC_CLASSES,
            slide_column=settings.slide_column,
            label_column=settings.label_column,
        )
    return read_slide_table(
        path,
        classes=settings.classes,
        slide_column=settings.slide_column or "slide",
        label_column=settings.label_column or "label",
        patient_column=settings.patient_column,
        site_column=settings.site_column,
    )


def _load_stored(settings: DatasetSettings) -> Dataset:
    table = load_table(settings)
    _refuse_unknown_names(settings, table)
    features = settings.place(settings.feature_folder)
    assert features is not None  # the settings were checked
    paths = find_feature_files(table, features)
    check_origins(table, [read_origin(path) for path in paths], encoder=settings.encoder)
    rules = _patch_label_rules(settings, table)
    bags = [
        StoredBag(row.slide, path, row.label, row.patient, row.site, rule)
        for row, path, rule in zip(table.entries(), paths, rules, strict=True)
    ]
    return Dataset(settings, table, bags)


def _refuse_unknown_names(settings: DatasetSettings, table: SlideTable) -> None:
    """A class or slide that is misspelled would change what its patches are taken for."""
    for field, named, known in (
        ("negative_classes", settings.negative_classes, table.classes),
        ("partly_annotated", settings.partly_annotated, table.slides),
    ):
        strangers = sorted(set(named) - set(known))
        if strangers:
            raise DatasetSettingsError(settings.name, f"{field}: the table has no {list_names(strangers)}")


def _patch_label_rules(settings: DatasetSettings, table: SlideTable) -> list[PatchLabelRule | None]:
    """How the patches of each slide are labelled; None for all where there are no annotations."""
    folder = settings.place(settings.annotations_folder)
    if folder is None:
        return [None] * len(table)
    files = find_slide_files(table.slides, folder, SUFFIXES)
    if not any(files):
        raise TableError(table.path, f"none of its slides has annotations in {folder}")
    return [
        PatchLabelRule(
            path=None if file is None else str(file),
            negative=table.classes[row.label] in settings.negative_classes,
            partly=row.slide in settings.partly_annotated,
            min_share=settings.min_share,
            positive_groups=settings.positive_groups,
            exclusion_groups=settings.exclusion_groups,
        )
        for row, file in zip(table.entries(), files, strict=True)
    ]


def _load_ucsb(settings: DatasetSettings) -> Dataset:
    folder = settings.place(settings.feature_folder) or Path(find_ucsb_breast())
    bags = load_ucsb_breast(folder)
    return Dataset(
        settings, _tabulate(bags, folder / UCSB_TABLE, settings.classes or ("benign", "malignant")), bags
    )


def _load_composed(settings: DatasetSettings) -> Dataset:
    tiles = settings.place(settings.feature_folder)
    assert tiles is not None  # the settings were checked
    train, validation, test = settings.bags
    split = compose_split(
        tiles,
        train=train,
        validation=validation,
        test=test,
        seed=settings.seed,
        apart=settings.apart,
        recipe=settings.recipe,
        standardize=settings.standardize,
    )
    bags = [bag for part in (split.train, split.validation, split.test) for bag in part]
    table = _tabulate(bags, tiles, settings.classes or ("healthy", "adenocarcinoma"))
    fold = Fold(*(tuple(bag.slide for bag in part) for part in (split.train, split.validation, split.test)))
    return Dataset(settings, replace(table, test_slides=fold.test), bags, Folds((fold,)))


def _tabulate(bags: Sequence[Bag], path: Path, classes: tuple[str, ...]) -> SlideTable:
    """A table of slides for bags that come with their labels."""
    rows = pd.DataFrame(
        {
            "slide": [bag.slide for bag in bags],
            "label": [bag.label for bag in bags],
            "patient": [bag.patient for bag in bags],
            "site": [bag.site for bag in bags],
            "line": range(1, len(bags) + 1),
        }
    )
    return SlideTable(str(path), rows, classes)


_LOADERS: Mapping[str, Callable[[DatasetSettings], Dataset]] = {
    **dict.fromkeys(STORED, _load_stored),
    "ucsb_breast": _load_ucsb,
    "composed_colon": _load_composed,
}
