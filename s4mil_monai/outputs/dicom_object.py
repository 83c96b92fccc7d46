"""What every DICOM result has: its identity, who made it, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import highdicom as hd
from pydicom import Dataset
from pydicom.filewriter import dcmwrite

from s4mil_monai import __version__
from s4mil_monai.outputs.dicom_codes import code
from s4mil_monai.outputs.dicom_source import DicomSource
from s4mil_monai.outputs.identity import identify_result, make_uid
from s4mil_monai.result import SlideResult

MANUFACTURER = "s4mil_monai"
RESEARCH = "research use, not for diagnosis"


@dataclass(frozen=True)
class ObjectKind:
    """One of the objects written for a slide."""

    name: str
    """Of its file, and part of its UIDs."""
    series_number: int
    description: str


def identity_of(
    kind: ObjectKind, result: SlideResult, source: DicomSource, *, level: int = 0, levels: int = 1
) -> dict[str, Any]:
    """UIDs, numbers and equipment as highdicom takes them; levels of a pyramid are instances of one series.

    The UIDs come from what is said, and of whom: the same slide scored again is what a PACS has already; another
    decision, or another patient, is another object.
    """
    key = (kind.name, *identify_result(result), *source.belongs_to)
    identity = {
        "series_instance_uid": make_uid("series", *key),
        "series_number": kind.series_number,
        "sop_instance_uid": make_uid("instance", *key, *([str(level)] if level else [])),
        "instance_number": level + 1,
        "manufacturer": MANUFACTURER,
    }
    return identity | ({"pyramid_uid": make_uid("pyramid", *key)} if levels > 1 else {})


def equipment_of(result: SlideResult) -> dict[str, Any]:
    """What highdicom's image classes want to know beyond the manufacturer."""
    return {
        "manufacturer_model_name": result.model.bundle[:64],
        "software_versions": __version__,
        "device_serial_number": result.model.sha256[:16] or "none",
    }


def algorithm_of(result: SlideResult) -> hd.AlgorithmIdentificationSequence:
    """The slide model, for objects that are made by an algorithm."""
    return hd.AlgorithmIdentificationSequence(
        name=result.model.bundle[:64],
        family=code("123110", "Artificial Intelligence", "DCM"),
        version=result.model.version[:64] or "none",
        source=MANUFACTURER,
        parameters={"model SHA-256": result.model.sha256[:64], "encoder": result.encoder.name[:64]},
    )


def finish(made: Dataset, kind: ObjectKind, source: DicomSource) -> Dataset:
    """Say what a series is and whether it is linked, and replace the UIDs that highdicom drew by chance."""
    linked = "" if source.linked else "not linked to a patient; "
    made.SeriesDescription = f"{kind.description} ({linked}{RESEARCH})"[:64]
    uid = make_uid("dimensions", made.SOPInstanceUID)
    for sequence in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        for item in made.get(sequence, []):
            if "DimensionOrganizationUID" in item:
                item.DimensionOrganizationUID = uid
    return made


def write_object(made: Dataset, path: Path, *, written: datetime) -> None:
    """Write one object; its dates are those of ``written``."""
    _date(made, written.strftime("%Y%m%d"), written.strftime("%H%M%S"))
    dcmwrite(path, made, enforce_file_format=True)


def _date(made: Dataset, date: str, time: str) -> None:
    made.ContentDate, made.ContentTime = date, time
    if "InstanceCreationDate" in made:
        made.InstanceCreationDate, made.InstanceCreationTime = date, time
    if "DateOfSecondaryCapture" in made:
        made.DateOfSecondaryCapture, made.TimeOfSecondaryCapture = date, time
    for equipment in made.get("ContributingEquipmentSequence", []):
        if "ContributionDateTime" in equipment:
            equipment.ContributionDateTime = date + time
