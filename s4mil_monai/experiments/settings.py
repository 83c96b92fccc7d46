"""What an experiment is: one YAML file, checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from s4mil_monai.errors import PathError, first_wrong

FoldKind = Literal["stratified", "site_preserved", "site_preserved_test"]


class ExperimentError(PathError):
    """An experiment's file or folder is missing, says something wrong, or belongs to another experiment."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Settings):
    """One model of an experiment: a bundle's training with overlays and overrides."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.+-]+$")
    """In tables and folder names."""
    bundle: str = "s4mil_slide"
    overlays: tuple[str, ...] = ()
    """Files of the bundle's ``configs``, such as ``models/transmil.yaml``."""
    settings: dict[str, Any] = {}
    """Overrides of its configuration, such as ``network_def::model::state_dim: 128``."""


class ExperimentSettings(_Settings):
    """Which models are trained on which data in which folds."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.+-]+$")
    dataset: Path
    """YAML of the data set; relative to the experiment's file."""
    models: tuple[ModelSettings, ...] = Field(min_length=1)
    folds: int = Field(10, ge=1)
    fold_kind: FoldKind = "stratified"
    folds_table: Path | None = None
    """Folds to use instead of drawing them, relative to the experiment's file: a CSV with ``slide``, ``fold`` and
    ``part``, or the authors' six columns, ``train``, ``train_label``, ``val``, …, one CSV a fold in a folder."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Each draws folds anew and initialises anew."""
    settings: dict[str, Any] = {}
    """Overrides for all models, such as ``train::trainer::max_epochs: 50``."""
    metrics: tuple[str, ...] = ("accuracy", "balanced_accuracy", "auroc", "auprc", "f1", "calibration_error")
    reference: str | None = None
    """Model the others are compared with."""
    percentile_long: float = Field(85.0, gt=0, lt=100)
    """Slides at or above this percentile of length make the table of long slides."""

    @model_validator(mode="after")
    def _names_are_told_apart(self) -> ExperimentSettings:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"two models have one name among {', '.join(names)}")
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"reference {self.reference!r} is none of the models {', '.join(names)}")
        if self.folds_table is not None and len(self.seeds) > 1:
            raise ValueError("a table of folds is for one seed")
        return self


def read_experiment(path: Path) -> ExperimentSettings:
    """Read an experiment; relative paths in it become relative to the working directory.

    Raises:
        ExperimentError: The file is missing, no YAML, or says something unknown or wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = ExperimentSettings.model_validate(content)
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(str(path), f"cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ExperimentError(str(path), f"is not YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        raise ExperimentError(str(path), first_wrong(error)) from error
    moved: dict[str, Any] = {"dataset": path.parent / found.dataset}
    if found.folds_table is not None:
        moved["folds_table"] = path.parent / found.folds_table
    return found.model_copy(update=moved)
