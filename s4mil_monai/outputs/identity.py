"""Identifiers of what is written for a result, the same whenever and wherever it is written again."""

from __future__ import annotations

import uuid

from s4mil_monai.result import SlideResult

UID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/s4mil-monai/dicom")
URN_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/s4mil-monai/fhir")


def make_uid(*parts: str) -> str:
    """A DICOM UID, the same for the same parts (``2.25`` and a UUID, PS3.5 B.2)."""
    return f"2.25.{_uuid_of(UID_NAMESPACE, parts).int}"


def make_urn(*parts: str) -> str:
    """A ``urn:uuid:`` for FHIR, the same for the same parts."""
    return f"urn:uuid:{_uuid_of(URN_NAMESPACE, parts)}"


def _uuid_of(namespace: uuid.UUID, parts: tuple[str, ...]) -> uuid.UUID:
    return uuid.uuid5(namespace, chr(0).join(parts))


def identify_result(result: SlideResult) -> tuple[str, ...]:
    """What tells one result from another: the slide, the models and the settings; not when or where."""
    return (
        result.slide.sha256,
        str(result.slide.mpp),
        result.model.sha256,
        result.encoder.sha256,
        result.settings.model_dump_json(),
        str(result.threshold),
    )
