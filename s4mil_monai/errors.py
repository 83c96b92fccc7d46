"""Every error raised on purpose. Each keeps its facts as attributes and survives pickling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class S4MilError(Exception):
    """Base of all errors of this package; its text is one line for the person who runs it."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own pickling calls __init__ with self.args, which keyword arguments leave empty.
        return _rebuild, (type(self), self.__dict__)


def first_line(error: BaseException) -> str:
    """What a library's error says first, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_wrong(error: ValidationError, *, within: str = "") -> str:
    """Where the first thing is that pydantic found wrong, and what is wrong with it, in one line.

    Args:
        error: As pydantic raises it.
        within: What the validated part is called in its file.
    """
    first = error.errors()[0]
    place = ".".join(str(part) for part in (within, *first["loc"]) if part != "")
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


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


class DecoderHungError(UnreadableSlideError):
    """A library did not come back while it read the slide; asking it again would cost as long again."""


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


class ClusterError(PathError):
    """A Ray cluster cannot be reached, or has nothing to score with; ``path`` is its address."""


@dataclass(eq=False, repr=False)
class ConfigRefusedError(BundleError):
    """A configuration names or calls what is not on the allow-lists."""

    place: str
    """As MONAI writes it: ``train::trainer::key``."""
    found: str

    def __str__(self) -> str:
        found = self.found if len(self.found) <= 120 else f"{self.found[:119]}…"
        return f"{self.path}: {' '.join(self.place.split())}: {found!r} {self.reason}"


class FeatureFileError(PathError):
    """A feature file is missing, damaged, or holds features of another kind than wanted."""


class OutputError(PathError):
    """A result cannot be written where it was asked for."""


class TableError(PathError):
    """A table of labels cannot be used for training."""


class ExportError(PathError):
    """An exported step is missing, damaged, too inexact, or cannot be made here."""


@dataclass(eq=False, repr=False)
class MisfitError(ExportError):
    """An exported step is of another model, version or GPU than wanted."""

    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}: found {self.found}, wanted {self.wanted}"


class SettingsError(PathError):
    """A settings file is missing, or says something unknown, wrong, or impossible on this machine."""


class SourceAwayError(PathError):
    """A folder that slides come from is not there now."""


class LedgerError(PathError):
    """The ledger of jobs cannot be opened, read or written; its address is without the password."""


class StreamError(S4MilError):
    """A slide's stream of features was used wrongly."""


@dataclass(eq=False, repr=False)
class ChunkWidthError(StreamError):
    """Features of another shape than the model reads."""

    found: tuple[int, ...]
    wanted: int

    def __str__(self) -> str:
        return f"wanted features (n, {self.wanted}), got {self.found}; embed the slide with the model's encoder"


@dataclass(eq=False, repr=False)
class NotFiniteError(StreamError):
    """Features with NaN or infinity among them."""

    first: int
    """Place in the stream of the first such patch."""

    def __str__(self) -> str:
        return f"the features of patch {self.first} are not finite (NaN or infinity); embed the slide again"


@dataclass(eq=False, repr=False)
class StreamEndedError(StreamError):
    """Features came after the end of the stream."""

    patches: int
    """Read until then."""

    def __str__(self) -> str:
        return f"the stream ended after {self.patches} patches; open another for another slide"


@dataclass(eq=False, repr=False)
class OverflowedError(StreamError):
    """Features too large for the precision of the aggregator."""

    precision: str

    def __str__(self) -> str:
        return (
            f"the score is not a number: features too large for {self.precision}; embed the slide again, or take "
            "a higher precision"
        )


class EmptyStreamError(StreamError):
    """A stream ended before its first patch."""

    def __str__(self) -> str:
        return "the stream ended before its first patch; a slide without patches has no score"


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


@dataclass(eq=False, repr=False)
class TooFewSlidesError(S4MilError):
    """Too few slides for what was to be made of them."""

    purpose: str
    found: int
    wanted: int

    def __str__(self) -> str:
        return f"{self.purpose} needs {self.wanted} scored slides, found {self.found}; score more slides first"
