"""Every error raised on purpose. Each keeps its facts as attributes and survives pickling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class S4MilError(Exception):
    """Base of all errors of this package; its text is one line for the person who runs it."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own pickling calls __init__ with self.args, which keyword arguments leave empty.
        return _rebuild, (type(self), self.__dict__)


def _rebuild(cls: type[S4MilError], facts: dict[str, Any]) -> S4MilError:
    error = cls.__new__(cls)
    error.__dict__.update(facts)
    return error


@dataclass(eq=False, repr=False)
class SlideError(S4MilError):
    """Something is wrong with one slide; the rest of the batch can go on."""

    slide: str
    reason: str

    def __str__(self) -> str:
        return f"{self.slide}: {self.reason}"


class UnreadableSlideError(SlideError):
    """No reader can open the slide, or its pixels cannot be decoded."""


class UnknownResolutionError(SlideError):
    """Nothing in the file says how many µm a pixel is."""


class NoTissueError(SlideError):
    """Nothing on the slide passes for tissue, as on a blank or out-of-focus scan."""


@dataclass(eq=False, repr=False)
class TooCoarseError(SlideError):
    """The finest level of the slide is too coarse for what the encoder was trained on."""

    found_mpp: float
    wanted_mpp: float


@dataclass(eq=False, repr=False)
class PathError(S4MilError):
    """Something is wrong with one file or folder that was named."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class WeightsError(PathError):
    """Weights are missing, damaged, of another model, or could not be downloaded."""


class BundleError(PathError):
    """A bundle is missing, incomplete or contradicts itself."""


class FeatureFileError(PathError):
    """A feature file is missing, damaged, or holds features of another kind than wanted."""


class OutputError(PathError):
    """A result cannot be written where it was asked for."""


class TableError(PathError):
    """A table of labels cannot be used for training."""


@dataclass(eq=False, repr=False)
class UnknownNameError(S4MilError):
    """A name that was asked for does not exist; the known ones are listed."""

    kind: str
    name: str
    known: tuple[str, ...]

    def __str__(self) -> str:
        return f"unknown {self.kind} {self.name!r}; known: {', '.join(self.known)}"


@dataclass(eq=False, repr=False)
class MissingExtraError(S4MilError):
    """An optional library is not installed."""

    module: str
    extra: str

    def __str__(self) -> str:
        return f"{self.module} is not installed; it comes with: pip install 's4mil-monai[{self.extra}]'"
