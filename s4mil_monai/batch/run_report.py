"""RunReport: what became of every slide of a batch run, as run.json for machines and run.html for people."""

from __future__ import annotations

import os
from collections import Counter
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    computed_field,
    model_validator,
)

from s4mil_monai.batch.printable import printable
from s4mil_monai.errors import OutputError
from s4mil_monai.whole_file import write_whole

RUN_FORMAT = "s4mil.run/1"
"""Raised when a field changes its meaning or goes."""

RUN_JSON, RUN_HTML = "run.json", "run.html"

Outcome = Literal["published", "failed", "quarantined", "handed_back", "still_changing"]

NEEDS_EYES = ("positive", "refer", "rejected", "no_tissue", "degraded")
"""Decisions, and states of a result, that a person should look at; in this order."""


def _as_utc(when: datetime) -> datetime:
    return when.astimezone(timezone.utc)


def _spelled_out(text: Any) -> Any:
    """Text with the bytes of file names that are no UTF-8 spelled out; JSON and HTML cannot hold them."""
    return text.encode("utf-8", "backslashreplace").decode() if isinstance(text, str) else text


Utc = Annotated[AwareDatetime, AfterValidator(_as_utc)]
Text = Annotated[str, BeforeValidator(_spelled_out)]
Link = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.~%-][A-Za-z0-9_.~%/-]*$")]
"""Relative URL from the run's folder, as ``relative_link`` makes it: no scheme, no host."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SlideFailure(_Record):
    """Why a slide has no result, and what happens next."""

    kind: str
    """Name of the error."""
    reason: Text
    """One line; it has the slide's file name in it."""
    attempt: int = Field(ge=1)
    """Which one this was, from 1."""
    attempts: int = Field(ge=1)
    """After so many the slide is set aside."""
    next: Text
    """What happens without anybody, or what to do: ``tried again after 03:20 UTC``."""


class ReportedSlide(_Record):
    """What became of one slide."""

    pseudonym: str | None = Field(pattern=r"^[0-9a-f]{12}$")
    """The first 12 hex digits of its SHA-256, as in the logs; None if it could not be read."""
    name: Text
    """File or folder name, relative to the folder that is watched."""
    outcome: Outcome
    status: Literal["scored", "degraded", "no_tissue", "rejected"] | None = None
    """Of its result; None without one."""
    predicted: str | None = None
    """The most probable class."""
    probability: float | None = Field(default=None, ge=0, le=1)
    """Of the predicted class, as the model gives it."""
    positive: str | None = None
    """The class that a decision is about."""
    calibrated: float | None = Field(default=None, ge=0, le=1)
    """Calibrated probability of ``positive``."""
    decision: Literal["positive", "negative", "refer", "rejected"] | None = None
    notes: tuple[Text, ...] = ()
    """What to know before believing the score: findings of quality, fallbacks, why there is no score."""
    failure: SlideFailure | None = None
    seconds: float | None = Field(default=None, ge=0)
    """Spent on it in this run."""
    report: Link | None = None
    """To its report.html."""
    picture: Link | None = None
    """To its heatmap.png."""

    @property
    def concern(self) -> str | None:
        """The first word of ``NEEDS_EYES`` that holds of a published slide."""
        if self.outcome != "published":
            return None
        return next((word for word in NEEDS_EYES if word in (self.decision, self.status)), None)


class RunReport(_Record):
    """One batch run."""

    format: Literal["s4mil.run/1"] = RUN_FORMAT
    run: str
    """Its name in ledger and logs."""
    started: Utc
    ended: Utc
    version: str
    """Of s4mil."""
    slides: tuple[ReportedSlide, ...] = ()
    waiting: int = Field(default=0, ge=0)
    """Slides that are still to be done when the run ends."""
    quarantined: int = Field(default=0, ge=0)
    """Slides set aside, of all runs."""
    drift: str | None = None
    """One line on whether slides and scores still are as they were; None if that was not looked at."""
    provenance_head: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Hash of the newest entry in the chain of what was published."""

    @model_validator(mode="before")
    @classmethod
    def _without_counts(cls, data: Any) -> Any:
        """Counts follow from the slides; in a run.json that is read back they are passed over."""
        return {key: value for key, value in data.items() if key != "counts"} if isinstance(data, dict) else data

    @computed_field
    @property
    def counts(self) -> dict[str, int]:
        """Slides by outcome; only outcomes that occurred."""
        return dict(sorted(Counter(slide.outcome for slide in self.slides).items()))

    def to_json(self) -> str:
        """The content of ``run.json``."""
        return self.model_dump_json(indent=1) + "\n"


def relative_link(target: Path, folder: Path) -> str:
    """The URL of a file as seen from the run's folder, whatever letters are in its path."""
    return quote(os.fsencode(Path(os.path.relpath(target, folder)).as_posix()), safe="/")


def write_run_report(report: RunReport, folder: Path) -> None:
    """Write ``run.json`` and ``run.html`` into a folder, each whole.

    Raises:
        OutputError: They cannot be written.
    """
    try:
        write_whole(folder / RUN_HTML, render_run(report))
        write_whole(folder / RUN_JSON, report.to_json())
    except OSError as error:
        raise OutputError(str(folder), f"cannot be written ({error.strerror or error})") from error


def render_run(report: RunReport) -> str:
    """The page: what failed, what needs eyes, the rest, what comes later."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(duration=_duration, printable=printable)
    source = files("s4mil_monai.batch").joinpath("run_report.html.j2").read_text("utf-8")
    took = _duration((report.ended - report.started).total_seconds())
    return environment.from_string(source).render(report=report, sections=_sections(report), took=took)


def _sections(report: RunReport) -> list[tuple[str, str, list[ReportedSlide]]]:
    """Id, heading and slides of each part of the page that has any."""
    headings = {
        "failed": "Failed",
        "look": "To be looked at",
        "rest": "The rest",
        "later": "Left for the next run",
    }
    slides = sorted(report.slides, key=_place)
    parts = {part: [slide for slide in slides if _part(slide) == part] for part in headings}
    return [(part, headings[part], found) for part, found in parts.items() if found]


def _part(slide: ReportedSlide) -> str:
    """Id of the part of the page that a slide belongs to."""
    if slide.outcome == "published":
        return "rest" if slide.concern is None else "look"
    return "failed" if slide.outcome in ("failed", "quarantined") else "later"


def _place(slide: ReportedSlide) -> tuple[bool, int, float, str]:
    """Set aside before tried again; then by concern, then the most probably positive, then by name."""
    concern = NEEDS_EYES.index(slide.concern) if slide.concern else len(NEEDS_EYES)
    return slide.outcome != "quarantined", concern, -(slide.calibrated or 0.0), slide.name


def _duration(seconds: float) -> str:
    """Seconds in the unit a person would say.

    >>> [_duration(s) for s in (0.4, 12.34, 119.6, 600, 7260)]
    ['0.4 s', '12.3 s', '2 min', '10 min', '2 h 1 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
