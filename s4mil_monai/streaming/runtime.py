"""What every runtime of the step takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from s4mil_monai.models.s4d import BLOCK
from s4mil_monai.streaming.chunk_step import ChunkState, ChunkStep, first_state

CHUNK = 2048
"""Patches of an exported step: large enough for a GPU to be busy, 8 MB of features."""


class Maxima(NamedTuple):
    """Where a slide stands."""

    running_max: Tensor
    """(H,) float32 on the CPU: largest value of each channel."""
    winners: Tensor
    """(H,) int64 on the CPU: the patch that has it, counted from the start of the slide."""
    logits: Tensor
    """(C,) float32 on the CPU: the slide's score, were this its end."""


class StepShape(BaseModel):
    """The sizes of a step; a manifest holds them as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunk: int = Field(gt=0, multiple_of=BLOCK)
    """T, patches a step reads at most."""
    in_features: int = Field(gt=0)
    """D."""
    width: int = Field(gt=0)
    """H, channels inside."""
    layers: int = Field(gt=0)
    modes: int = Field(gt=0)
    """n, complex modes of each channel."""
    classes: int = Field(gt=0)
    """C."""
    patch_classes: int = Field(gt=0)
    """P."""

    def first_state(self, device: torch.device | None = None) -> ChunkState:
        """The state before the first patch."""
        return first_state(layers=self.layers, width=self.width, modes=self.modes, device=device)


def shape_of(step: ChunkStep, chunk: int) -> StepShape:
    """The sizes of a step that reads ``chunk`` patches."""
    return StepShape(
        chunk=chunk,
        in_features=step.in_features,
        width=step.width,
        layers=len(step.layers),
        modes=step.modes,
        classes=step.classes,
        patch_classes=step.patch_classes,
    )


class Runtime(ABC):
    """Runs the step of one slide model; holds its weights once for any number of slides."""

    name: str
    precision: str
    shape: StepShape

    @abstractmethod
    def open(self) -> SlideState:
        """Begin a slide."""


class SlideState(ABC):
    """One slide's state, held where its runtime computes."""

    @abstractmethod
    def read(self, features: Tensor) -> Tensor:
        """Read 1 to T more patches, (k, D) finite float32 on any device; fewer than T only at the slide's end.

        Returns:
            (k, P) float32 patch logits on the CPU.
        """

    @abstractmethod
    def maxima(self) -> Maxima:
        """Where the slide stands; not before its first patch."""


def fill_up(features: Tensor, length: int) -> Tensor:
    """(k, D) → (length, D), zeros at the end."""
    missing = length - len(features)
    return features if missing == 0 else F.pad(features, (0, 0, 0, missing))
