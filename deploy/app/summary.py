"""``summary.json``: every slide with its status, everything that is no slide with the reason; the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s4mil_monai.slides.mixed_folder import Survey
from s4mil_monai.whole_file import write_whole
from slide_job import SlideJob

EXIT_SCORED, EXIT_FAILED, EXIT_NO_SCORE = 0, 1, 3
"""All slides scored · something is wrong with a slide, the models or a folder · some slide gets no score. Wrong
use leaves with 2."""


class Summary:
    """What has become of the slides so far; the file is replaced whenever that changes."""

    def __init__(self, out: Path, survey: Survey):
        self._path, self._survey = out / "summary.json", survey
        self._slides: list[dict[str, Any]] = []
        self._write()

    def add(self, job: SlideJob) -> None:
        """Add what became of one slide."""
        row: dict[str, Any] = {
            "slide": job.name,
            "file": job.found.file,
            "status": "failed",
            "reason": job.failure,
        }
        if job.failure is None and job.result is not None and job.folder is not None:
            row |= {
                "status": job.result.status,
                "reason": job.result.reason,
                "folder": job.folder.relative_to(self._path.parent).as_posix(),
                "predicted": job.result.predicted,
                "decision": job.result.decision,
            }
        self._slides.append(row)
        self._write()

    def exit_code(self) -> int:
        """Of the application: a slide that is found and not here says that something stopped the flow."""
        statuses = {slide["status"] for slide in self._slides}
        if len(self._slides) < len(self._survey.slides) or "failed" in statuses:
            return EXIT_FAILED
        return EXIT_SCORED if statuses <= {"scored", "degraded"} else EXIT_NO_SCORE

    def _write(self) -> None:
        content = {
            "format": "s4mil.summary/1",
            "found": len(self._survey.slides),
            "slides": self._slides,
            "passed_over": [{"path": p, "reason": why} for p, why in self._survey.passed_over.items()],
        }
        write_whole(self._path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
