"""Whether the slides that come now still look like those the model's reference was made of."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from s4mil_monai.batch.ledger import JobKind, Ledger
from s4mil_monai.batch.site import Site
from s4mil_monai.measures import SlideMeasures
from s4mil_monai.models.seal import kept_sealed
from s4mil_monai.statistics.drift import DriftFinding, compare
from s4mil_monai.statistics.drift_reference import (
    DRIFT_REFERENCE_FILE,
    build_reference,
    find_reference,
    write_reference,
)


def compare_recent(site: Site, ledger: Ledger) -> list[DriftFinding]:
    """Compare the slides that were published last with the bundle's reference; nothing where it has none.

    Raises:
        BundleError: The reference is damaged, or of another model.
    """
    reference = find_reference(site.bundle, model_sha256=site.model.weights.sha256)
    return compare(reference, _recent(ledger, site.kind, site.settings.drift_window))


def make_reference(site: Site, ledger: Ledger, *, slides: int) -> Path:
    """Make the slides that were published last the reference, in the bundle; gives its file.

    Args:
        site: Its model, and where its bundle lies.
        ledger: With the slides.
        slides: At most so many.

    Raises:
        TooFewSlidesError: There are too few.
        OutputError: The bundle cannot be written to.
    """
    recent = _recent(ledger, site.kind, slides)
    provenance = f"{len(recent)} slides of {site.file.name}, up to record {ledger.head()[0]}"
    reference = build_reference(recent, model_sha256=site.model.weights.sha256, provenance=provenance)
    path = site.bundle / DRIFT_REFERENCE_FILE
    with kept_sealed(site.bundle):
        write_reference(reference, path)
    return path


def _recent(ledger: Ledger, kind: JobKind, limit: int) -> list[SlideMeasures]:
    """Measures of the slides published last, less those of versions that measured other things."""
    found = []
    for measures in ledger.recent_measures(kind, limit=limit):
        with suppress(ValidationError):
            found.append(SlideMeasures.model_validate(measures))
    return found
