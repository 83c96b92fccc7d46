"""What has become of each series, kept beside the results: a pass begins where the last one ended."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from s4mil_monai.pacs.web import RemoteSeries
from s4mil_monai.scoring import Scorer, fingerprint_model
from s4mil_monai.whole_file import write_whole

FOLDER, SEEN = ".pacs", "seen"


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


class Sighting(BaseModel):
    """Which instances a series has had, and since when we know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instances: str
    """SHA-256 of their UIDs."""
    since_s: float
    """Unix time, in seconds."""


class Ledger:
    """Two small files a series, replaced as a whole: how far it has come, and what was seen of it."""

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

    def note(self, series: RemoteSeries, *, now_s: float) -> float:
        """Since when a series has had the instances that it has now, in Unix time; kept for the next pass."""
        path = self.folder / SEEN / f"{series.series}.json"
        instances = hashlib.sha256("\n".join(series.instances).encode()).hexdigest()
        seen = _read_sighting(path)
        if seen is not None and seen.instances == instances and seen.since_s <= now_s:
            return seen.since_s
        write_whole(path, Sighting(instances=instances, since_s=now_s).model_dump_json() + "\n")
        return now_s

    def _path(self, series: RemoteSeries) -> Path:
        return self.folder / f"{series.series}.json"


def _read_sighting(path: Path) -> Sighting | None:
    try:
        return Sighting.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
