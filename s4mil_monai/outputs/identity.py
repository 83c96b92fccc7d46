"""Identifiers of what is written for a result, the same whenever and wherever it is written again."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

from s4mil_monai import __version__
from s4mil_monai.result import PatchScores, SlideResult

UID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/s4mil-monai/dicom")
URN_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/s4mil-monai/fhir")


DIGITS = 4
"""Of a probability, that another processor gives as well. Every class is looked at, so 0.99998 is not 0.99999."""

SAID_NOWHERE: dict[str, Any] = {
    **dict.fromkeys(("seconds", "software", "aggregator"), True),
    **dict.fromkeys(("logits", "bias", "probabilities", "calibrated", "patches", "deciding_patches"), True),
    "slide": {"name", "backend", "passed_over", "notes"},
    "quality": {"findings", "measured"},
}
"""Of a result, what objects do not say, or with more digits than two machines agree on."""


def make_uid(*parts: str) -> str:
    """A DICOM UID, the same for the same parts (``2.25`` and a UUID, PS3.5 B.2)."""
    return f"2.25.{_uuid_of(UID_NAMESPACE, parts).int}"


def make_urn(*parts: str) -> str:
    """A ``urn:uuid:`` for FHIR, the same for the same parts."""
    return f"urn:uuid:{_uuid_of(URN_NAMESPACE, parts)}"


def _uuid_of(namespace: uuid.UUID, parts: tuple[str, ...]) -> uuid.UUID:
    return uuid.uuid5(namespace, chr(0).join(parts))


def identify_result(result: SlideResult) -> tuple[str, ...]:
    """What tells one result from another: all that is said of the slide; not when, where or how fast it was found.

    A PACS keeps the first of two objects with one UID, so what says something else must not have the UID. Where
    only late digits differ, as between machines, it says the same.
    """
    return (
        __version__,
        result.model_dump_json(exclude=SAID_NOWHERE),
        *(_round(values) for values in (result.probabilities, result.calibrated)),
        "" if result.patches is None else _identify_places(result.patches),
    )


def _identify_places(patches: PatchScores) -> str:
    """Which patches were read: fewer of a slide that is damaged for one library and not for another."""
    return hashlib.sha256(patches.model_dump_json(exclude={"probabilities"}).encode()).hexdigest()


def _round(values: list[float] | None) -> str:
    return " ".join(f"{value:.{DIGITS}g}" for value in values or ())
