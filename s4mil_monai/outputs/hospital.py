"""What a hospital's systems take of a result: DICOM objects and a FHIR report, beside the other files."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

from s4mil_monai.extras import require
from s4mil_monai.outputs.heatmap import HeatmapPicture
from s4mil_monai.result import SlideResult
from s4mil_monai.slides.slide import Slide

DICOM_FOLDER, FHIR_FILE = "dicom", "fhir.json"


class HospitalWriter:
    """Writes ``dicom/*.dcm`` and ``fhir.json`` into the folders of results."""

    def __init__(self, studies: Path | None = None):
        """Read the table of studies, if there is one.

        Args:
            studies: CSV of the site with patients and studies by slide, for slides that are no DICOM and have no
                JSON beside them.

        Raises:
            TableError: The table cannot be understood.
            MissingExtraError: pydicom and highdicom are not installed.
        """
        require("highdicom", extra="dicom")
        from s4mil_monai.outputs.dicom_study import read_study_table

        self._table = read_study_table(studies) if studies is not None else None

    def write(self, result: SlideResult, slide: Slide, picture: HeatmapPicture, folder: Path) -> None:
        """Write all of it for one result.

        Raises:
            SlideError: The slide's DICOM headers cannot be used.
            TableError: The JSON beside the slide cannot be understood.
        """
        from s4mil_monai.outputs.dicom import write_dicom
        from s4mil_monai.outputs.dicom_source import find_source, header_understood
        from s4mil_monai.outputs.dicom_study import find_study
        from s4mil_monai.outputs.fhir import write_fhir

        written = datetime.now(timezone.utc)
        source = find_source(slide, result, picture, find_study(slide.path, self._table))
        with nullcontext() if source.overview is not None else header_understood(slide.name):
            write_dicom(result, source, picture, folder / DICOM_FOLDER, written=written)
        study = str(source.image.StudyInstanceUID) if source.linked else None
        write_fhir(result, folder / FHIR_FILE, study_instance_uid=study, written=written)
