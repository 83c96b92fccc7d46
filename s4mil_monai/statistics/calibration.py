"""Calibration: what turns a model's logits into honest probabilities and a decision, as it lies in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from s4mil_monai.errors import BundleError, OutputError, first_wrong

CALIBRATION_FORMAT = "s4mil.calibration/1"
"""Raised when a field changes its meaning or goes."""

Decision = Literal["positive", "negative", "refer"]


class Scaling(BaseModel):
    """What makes probabilities of logits."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    method: Literal["temperature", "platt"]
    classes: int = Field(ge=2)
    temperature: float | None = Field(default=None, gt=0)
    """Logits are divided by it; above 1 the model was too sure of itself."""
    slope: float | None = Field(default=None, gt=0)
    """Of Platt's line on the difference of the two logits; positive, so that the order of slides stays."""
    intercept: float | None = None

    @model_validator(mode="after")
    def _of_its_method(self) -> Scaling:
        if (self.method == "temperature") != (self.temperature is not None):
            raise ValueError("temperature is for the method temperature, which needs it")
        if (self.method == "platt") != (self.slope is not None and self.intercept is not None):
            raise ValueError("slope and intercept are for the method platt, which needs both")
        if self.method == "platt" and self.classes != 2:
            raise ValueError(f"platt is for two classes, got {self.classes}")
        return self

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities.

        Args:
            logits: (C,) or (n, C); log probabilities serve as well.

        Returns:
            Of the same shape.

        Raises:
            ValueError: The last axis is not of the classes.
        """
        logits = np.asarray(logits, np.float64)
        if logits.shape[-1] != self.classes:
            raise ValueError(f"logits of {self.classes} classes are wanted, got shape {logits.shape}")
        if self.temperature is not None:
            return _softmax(logits / self.temperature)
        slope, intercept = self.slope or 0.0, self.intercept or 0.0
        line = slope * (logits[..., 1] - logits[..., 0]) + intercept
        return _softmax(np.stack([np.zeros_like(line), line], -1))


class Calibration(Scaling):
    """How to read the logits of one trained model; made by ``fit_calibration``."""

    format: Literal["s4mil.calibration/1"] = CALIBRATION_FORMAT
    threshold: float | None = Field(default=None, ge=0, le=1)
    """Calibrated probability of class 1 from which on a slide is positive; two classes only."""
    stated_sensitivity: float | None = Field(default=None, gt=0, lt=1)
    """What the threshold was chosen for."""
    sensitivity: float | None = Field(default=None, ge=0, le=1)
    """Share of positives at or above the threshold, where it was chosen."""
    sensitivity_low: float | None = Field(default=None, ge=0, le=1)
    sensitivity_high: float | None = Field(default=None, ge=0, le=1)
    """Exact 95 % interval of the sensitivity on new patients, which knows that the threshold was chosen here."""
    specificity: float | None = Field(default=None, ge=0, le=1)
    """Share of negatives below the threshold."""
    specificity_low: float | None = Field(default=None, ge=0, le=1)
    specificity_high: float | None = Field(default=None, ge=0, le=1)
    """Exact 95 % interval of it."""
    refer_low: float | None = Field(default=None, ge=0, le=1)
    refer_high: float | None = Field(default=None, ge=0, le=1)
    """Probabilities of class 1 between these, both included, go to a person; None where nothing has to."""
    class_floors: tuple[float, ...]
    """By class, the calibrated probability from which on it cannot be ruled out."""
    alpha: float = Field(gt=0, lt=1)
    """At most this share of the slides of each class is called the wrong one, on average over calibrations."""
    model_sha256: str | None = None
    """Weights it is kept beside; None before it is put into a bundle."""
    n: int = Field(ge=1)
    """Slides it was fitted on."""
    n_patients: int = Field(ge=1)
    provenance: str
    """Which predictions, and what to know about them."""

    @model_validator(mode="after")
    def _whole(self) -> Calibration:
        if len(self.class_floors) != self.classes:
            raise ValueError(f"{self.classes} classes need as many floors, got {len(self.class_floors)}")
        if self.classes == 2 and self.threshold is None:
            raise ValueError("two classes need a threshold")
        if (self.refer_low is None) != (self.refer_high is None):
            raise ValueError("refer_low and refer_high are given both or neither")
        band = (self.refer_low, self.threshold, self.refer_high)
        edges = [edge for edge in band if edge is not None]
        if edges != sorted(edges):
            raise ValueError(f"refer_low <= threshold <= refer_high, got {edges}")
        return self

    def decide(self, p_positive: float) -> Decision:
        """What is said of a slide with this calibrated probability of class 1.

        Raises:
            ValueError: There are more than two classes, or it is no probability.
        """
        if self.threshold is None:
            raise ValueError(f"positive and negative are of two classes, this model has {self.classes}")
        if not 0 <= p_positive <= 1:
            raise ValueError(f"p_positive is a probability, got {p_positive}")
        low, high = self.refer_low, self.refer_high
        if low is not None and high is not None and low <= p_positive <= high:
            return "refer"
        return "positive" if p_positive >= self.threshold else "negative"

    def possible_classes(self, probabilities: np.ndarray) -> tuple[int, ...]:
        """Classes that cannot be ruled out; of each class's slides a share of at most ``alpha`` loses its own.

        Args:
            probabilities: (C,) calibrated ones.

        Returns:
            Class numbers; one is an answer, none or several are for a person.
        """
        return tuple(c for c, floor in enumerate(self.class_floors) if probabilities[c] >= floor)

    def to_json(self) -> str:
        """The content of ``calibration.json``."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"


def write_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Write a ``calibration.json``.

    Raises:
        OutputError: It cannot be written there.
    """
    try:
        Path(path).write_text(calibration.to_json(), encoding="utf-8")
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror})") from error
    return Path(path)


def read_calibration(path: str | Path) -> Calibration:
    """Read a ``calibration.json``.

    Raises:
        BundleError: It is missing, damaged, or of another format.
    """
    try:
        return Calibration.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BundleError(str(path), f"is not a calibration of format {CALIBRATION_FORMAT}") from error
    except ValidationError as error:
        what = f"is not a calibration of format {CALIBRATION_FORMAT}: {first_wrong(error)}"
        raise BundleError(str(path), what) from error


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
