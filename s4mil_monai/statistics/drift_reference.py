"""DriftReference: what the measures of slides were like when all was well, as it lies in a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from s4mil_monai.errors import BundleError, OutputError, TooFewSlidesError, first_wrong
from s4mil_monai.measures import MEASURES, SlideMeasures
from s4mil_monai.whole_file import write_whole

DRIFT_REFERENCE_FORMAT = "s4mil.drift_reference/1"
"""Raised when a field, or a measure, changes its meaning or goes."""

DRIFT_REFERENCE_FILE = Path("configs") / "drift_reference.json"
"""Of a bundle; the demonstration bundles have none, as nobody's slides are like theirs."""

LEAST_REFERENCE = 30
"""Slides, of which three bins get ten each."""

SLIDES_PER_BIN = 10
MOST_BINS = 10
"""As is usual for PSI, where there are slides enough to fill them."""

MOST_KEPT = 500
"""Values of a measure that are kept; of more slides, evenly spaced ones in order of size."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class MeasureReference(_Record):
    """One measure of the reference slides, in order of size: nothing ties the values of a slide together."""

    edges: tuple[float, ...] = Field(min_length=1)
    """Between bins, ascending; a bin ends with its edge and has it."""
    counts: tuple[int, ...]
    """Reference slides by bin; one more than edges."""
    sample: tuple[float, ...] = Field(min_length=1, max_length=MOST_KEPT)
    """Ascending; all values, or evenly spaced ones of many."""

    @model_validator(mode="after")
    def _fits_together(self) -> MeasureReference:
        if len(self.counts) != len(self.edges) + 1:
            raise ValueError(f"{len(self.edges)} edges make {len(self.edges) + 1} bins, got {len(self.counts)}")
        if min(self.counts) < 0 or sum(self.counts) < len(self.sample):
            raise ValueError("counts are of all slides, which are as many as the sample or more")
        if list(self.edges) != sorted(set(self.edges)) or list(self.sample) != sorted(self.sample):
            raise ValueError("edges and sample are ascending")
        return self

    @property
    def slides(self) -> int:
        """Reference slides that have this measure."""
        return sum(self.counts)

    def count(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """How many of (m,) values fall into each bin."""
        return count_by_bin(values, np.array(self.edges))


class DriftReference(_Record):
    """What ``configs/drift_reference.json`` of a bundle holds."""

    format: Literal["s4mil.drift_reference/1"] = DRIFT_REFERENCE_FORMAT
    model_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the slide model's weights file, which belongs to one encoder."""
    slides: int = Field(ge=LEAST_REFERENCE)
    provenance: str = ""
    """Which slides, in words, without the name of anybody."""
    measures: dict[str, MeasureReference]
    """By name; what too few of the slides have is left out."""

    @field_validator("measures")
    @classmethod
    def _known(cls, measures: dict[str, MeasureReference]) -> dict[str, MeasureReference]:
        unknown = sorted(set(measures) - set(MEASURES))
        if unknown:
            raise ValueError(f"unknown measure {unknown[0]}")
        return measures

    def to_json(self) -> str:
        """The content of ``drift_reference.json``."""
        return self.model_dump_json() + "\n"


def build_reference(
    measures: Sequence[SlideMeasures], *, model_sha256: str, provenance: str = ""
) -> DriftReference:
    """Make a reference of slides that were scored while all was well: of one site, over some weeks at least.

    Args:
        measures: Of one slide each, and of one patient each where that can be had: slides of a patient are alike,
            and count for less than as many patients.
        model_sha256: SHA-256 of the weights file of the model that scored them.
        provenance: Which slides; no names.

    Raises:
        TooFewSlidesError: There are fewer than :data:`LEAST_REFERENCE`.
    """
    if len(measures) < LEAST_REFERENCE:
        raise TooFewSlidesError("a drift reference", len(measures), LEAST_REFERENCE)
    columns = {name: values_of(measures, name) for name in MEASURES}
    return DriftReference(
        model_sha256=model_sha256,
        slides=len(measures),
        provenance=provenance,
        measures={name: _describe(known) for name, known in columns.items() if len(known) >= LEAST_REFERENCE},
    )


def values_of(measures: Sequence[SlideMeasures], name: str) -> NDArray[np.float64]:
    """One measure of the slides that have it."""
    found = (getattr(slide, name) for slide in measures)
    return np.array([value for value in found if value is not None], np.float64)


def _describe(values: NDArray[np.float64]) -> MeasureReference:
    edges = cut_into_bins(values, min(MOST_BINS, len(values) // SLIDES_PER_BIN))
    ordered = np.sort(values)
    kept = np.linspace(0, len(ordered) - 1, min(len(ordered), MOST_KEPT)).round().astype(int)
    return MeasureReference(
        edges=tuple(edges.tolist()),
        counts=tuple(count_by_bin(values, edges).tolist()),
        sample=tuple(ordered[kept].tolist()),
    )


def cut_into_bins(values: NDArray[np.float64], bins: int) -> NDArray[np.float64]:
    """Edges between bins of equally many values.

    A value that so many slides share that it is more than one quantile, such as a share of 0, gets a bin of its
    own; otherwise what falls below it would not be seen.
    """
    quantiles = np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf")
    edges, times = np.unique(quantiles, return_counts=True)
    return np.union1d(edges, np.nextafter(edges[times > 1], -np.inf))


def count_by_bin(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count (m,) values in the bins between edges; the first and the last bin are open."""
    return np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1)


def write_reference(reference: DriftReference, path: Path) -> None:
    """Write a ``drift_reference.json``, whole or not at all.

    A bundle with a ``SHA256SUMS`` needs a new one afterwards: :func:`s4mil_monai.models.manifest.write_manifest`.

    Raises:
        OutputError: It cannot be written there.
    """
    try:
        write_whole(path, reference.to_json())
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror or error})") from error


def find_reference(bundle: Path, *, model_sha256: str) -> DriftReference | None:
    """The reference of a bundle; None where it has none.

    Raises:
        BundleError: It is damaged, of another format, or of another model than the bundle's.
    """
    path = bundle / DRIFT_REFERENCE_FILE
    return read_reference(path, model_sha256=model_sha256) if path.is_file() else None


def read_reference(path: Path, *, model_sha256: str) -> DriftReference:
    """Read a ``drift_reference.json`` for one model.

    Raises:
        BundleError: It is missing, damaged, of another format, or of another model.
    """
    kind = f"is not a drift reference of format {DRIFT_REFERENCE_FORMAT}"
    try:
        reference = DriftReference.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BundleError(str(path), kind) from error
    except ValidationError as error:
        raise BundleError(str(path), f"{kind}: {first_wrong(error)}") from error
    if reference.model_sha256 != model_sha256:
        raise BundleError(
            str(path),
            f"is of another model (SHA-256 {reference.model_sha256[:12]}…, this one has {model_sha256[:12]}…); "
            "remove it, and make a new one of slides this model has scored",
        )
    return reference
