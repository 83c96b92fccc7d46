"""What has become of each series, kept beside the results: a pass begins where the last one ended."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from s4mil_monai.pacs.web import RemoteSeries
from s4mil_monai.scoring import Scorer, fingerprint_model
from s4mil_monai.whole_file import write_whole

FOLDER = ".pacs"


class SeriesState(BaseModel):
    """How far one series has come."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Of series, model and settings; another one means to begin anew."""
    stage: Literal["scored", "stored", "failed"]
    """``scored``: the result is in its folder and has to be stored; ``failed``: no try helps, it is the slide."""
    reason: str | None = None


def key_of(series: RemoteSeries, scorer: Scorer, target: str) -> str:
    """What makes a job another job: other instances, another model, other settings, another place to store."""
    parts = (*series.instances, fingerprint_model(scorer.bundle.settings, scorer.calibration), target)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Ledger:
    """One small file a series, replaced as a whole."""

    def __init__(self, out: Path):
        self.folder = out / FOLDER

    def read(self, series: RemoteSeries) -> SeriesState | None:
        """None where nothing is known, or what is there cannot be read."""
        try:
            return SeriesState.model_validate_json(self._path(series).read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError):
            return None

    def write(self, series: RemoteSeries, state: SeriesState) -> None:
        """Keep a state."""
        write_whole(self._path(series), state.model_dump_json() + "\n")

    def _path(self, series: RemoteSeries) -> Path:
        return self.folder / f"{series.series}.json"
