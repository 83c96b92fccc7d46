"""What makes one job another: the slide's content, the model, the settings that change a result."""

from __future__ import annotations

import hashlib
from pathlib import Path

from s4mil_monai.batch.ledger import JobKind
from s4mil_monai.batch.settings import SiteSettings
from s4mil_monai.models.bundle import BundleSettings, describe_bundle
from s4mil_monai.scoring import find_calibration, fingerprint_model

CHANGING = ("ignore_quality", "dicom", "aggregator_precision")
"""Settings of a site that make another result. Tables of resolutions and studies do not: a row for a new scanner
would make all slides of all years new."""


def describe_kind(site: SiteSettings, bundle: Path) -> tuple[JobKind, BundleSettings]:
    """The kind of a site's jobs, and what its model expects.

    Raises:
        BundleError: The bundle is none, or contradicts itself.
    """
    record, settings = describe_bundle(bundle)
    model = fingerprint_model(settings, find_calibration(bundle, settings))
    chosen = "\n".join(f"{name}={getattr(site, name)}" for name in CHANGING)
    name = f"{record.bundle}-{record.version}" if record.version else record.bundle
    return JobKind(model, hashlib.sha256(chosen.encode()).hexdigest(), name), settings


def make_key(slide: str, kind: JobKind) -> str:
    """Key of a job, from the slide's fingerprint."""
    return hashlib.sha256(f"{slide}\n{kind.model}\n{kind.settings}".encode()).hexdigest()
