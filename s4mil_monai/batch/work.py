"""What passes between a scheduler, which alone writes the ledger, and the processes that score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from s4mil_monai.batch.ledger import Failure
from s4mil_monai.errors import S4MilError


@dataclass(frozen=True)
class Work:
    """One slide to be scored."""

    lease: str
    """Names the try."""
    slide: str
    """Fingerprint it must have."""
    path: Path
    part: Path
    """Folder to be made for the result."""
    alone: bool = False
    """It has failed before, and may take down the process it is in, with all that has."""


@dataclass(frozen=True)
class Began:
    """A process has turned to the slide; from now on its time counts."""

    lease: str


@dataclass(frozen=True)
class Scored:
    """The result is written, and is on the disk."""

    lease: str
    outputs: dict[str, str]
    """SHA-256 by name of all its files."""
    summary: dict[str, Any]
    """What is shown of it in lists."""
    facts: dict[str, Any]
    """For the provenance record."""
    measures: dict[str, Any] | None = None


@dataclass(frozen=True)
class Failed:
    """There is no result, and why."""

    lease: str
    failure: Failure
    of_the_machine: bool = False
    """Not the slide's fault: the next one would fail alike."""
    of_the_share: bool = False
    """Not the slide's fault: its file cannot be read now, and may be later."""


@dataclass(frozen=True)
class Lost:
    """The process that had it is gone."""

    lease: str
    reason: str
    of_the_machine: bool = False
    """It could not be started again."""
    shared: bool = False
    """It had begun with others too: which of them brought it down is not known."""


class EndedElsewhereError(S4MilError):
    """Another process had part of the slide's work, and has given it up or is gone; it is known there why."""

    def __str__(self) -> str:
        return "the slide came to an end where it was read"


Event = Began | Scored | Failed | Lost


@dataclass(frozen=True)
class WorkerSettings:
    """What a process that scores has to know; everything in it can be pickled."""

    bundle: Path
    model: str
    """Fingerprint the model must have."""
    encoder_weights: Path | None = None
    device: str = "auto"
    patch_stage: str = "torch"
    batch_size: int = 16
    aggregator_runtime: str = "auto"
    aggregator_precision: str = "float32"
    resolutions: Path | None = None
    ignore_quality: bool = False
    dicom: bool = False
    studies: Path | None = None
    features: Path | None = None
    process: int = 0
    """Number of this one among those of its machine, which have its GPUs in turn."""


class Executor(Protocol):
    """Scores slides somewhere else than in the scheduler's own process."""

    def start(self) -> None:
        """Load the model, at least where the first slides will go.

        Raises:
            S4MilError: It cannot be loaded.
        """

    def room(self) -> int:
        """How many more slides it takes now."""
        ...

    def submit(self, work: Work) -> None:
        """Take a slide; what becomes of it comes as events."""

    def poll(self, timeout_s: float) -> list[Event]:
        """What has happened, waiting for it at most so long."""
        ...

    def drop(self, lease: str) -> None:
        """Give a slide up, with a process that has it; what is lost with that comes as :class:`Lost`."""

    def stop(self) -> list[Event]:
        """End all processes now; gives the last events, :class:`Lost` for all that was not done."""
        ...
