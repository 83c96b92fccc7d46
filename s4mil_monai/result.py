"""SlideResult: what is known about a slide after scoring, and its versioned JSON form."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s4mil_monai.errors import OutputError

RESULT_FORMAT = "s4mil.result/1"
"""Raised when a field changes its meaning or goes."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PatchSettings(_Record):
    """Which patches a model reads; part of what it was trained on."""

    mpp: float = Field(default=0.5, gt=0)
    """µm/px the encoder sees; 0.5 is 20x on most scanners."""
    side_px: int = Field(default=256, ge=16)
    """Side of a patch as the encoder sees it."""
    min_tissue: float = Field(default=0.5, ge=0, le=1)
    """Share of a patch that is tissue before it is kept."""
    overlap_px: int = Field(default=0, ge=0)
    """How far neighbouring patches overlap, in pixels as the encoder sees them."""
    scan_order: str = "row_major"
    """Name of the order in which patches are read."""


class QualityFinding(_Record):
    """One thing that is wrong with how a slide was made or scanned."""

    code: str
    """Fixed word for machines: ``blur``, ``ink``, ``little_tissue``, ``saturation``, ``too_coarse``,
    ``damaged``."""
    verdict: Literal["warn", "reject"]
    value: float
    """What was measured; the text says in which unit."""
    limit: float
    """What it was compared with."""
    text: str
    """One sentence for a person."""


class QualityRecord(_Record):
    """Whether a slide is fit to be scored, and why not."""

    verdict: Literal["pass", "warn", "reject"]
    """The worst of the findings."""
    findings: tuple[QualityFinding, ...] = ()
    measured: dict[str, float] = {}
    """Every number that was looked at, by code."""


class SlideRecord(_Record):
    """The slide and how it was read."""

    name: str
    """File or folder name, without its folder."""
    sha256: str
    """Of the file; of the sorted SHA-256 of its files for a DICOM folder."""
    size_px0: tuple[int, int]
    """(width, height) of level 0."""
    mpp: float
    """µm per level-0 pixel."""
    mpp_source: str
    """``override``, ``override:slide``, ``override:scanner``, ``vendor:NAME``, ``dicom`` or ``tiff``."""
    backend: str
    """Library that read the pixels."""
    passed_over: tuple[str, ...] = ()
    """Backends tried before, with reasons."""
    notes: tuple[str, ...] = ()
    """What to know before believing the score: upsampling, levels that are not used."""


class EncoderRecord(_Record):
    """The patch encoder."""

    name: str
    sha256: str
    """Over names and values of its parameters."""
    width: int = Field(gt=0)
    """Features of a patch."""


class ModelRecord(_Record):
    """The slide model."""

    bundle: str
    version: str
    sha256: str
    """Of the weights file."""
    intended_use: str


class AggregatorRecord(_Record):
    """What ran the slide model."""

    runtime: str
    """``torch``, ``onnxruntime`` or ``tensorrt``."""
    precision: str
    """Of products; the state is float32 always."""
    chunk: int
    """Patches of a step."""
    passed_over: tuple[str, ...] = ()
    """Better runtimes that were tried, with reasons."""


class PatchScores(_Record):
    """All patches, in scan order."""

    side_px0: float
    """Side in level-0 pixels."""
    mpp: float
    """µm/px the encoder saw; within half a pixel in the side of the one set."""
    top_left_px0: list[tuple[int, int]]
    """Corners (x, y) in level-0 pixels."""
    probabilities: list[list[float]]
    """Per patch and class: what the slide's would be if this patch held every maximum; in the multitask form, what
    its own head gives the patch."""


class DecidingPatch(_Record):
    """A patch that holds the maximum of at least one channel."""

    index: int
    """Place in the scan order."""
    top_left_px0: tuple[int, int]
    contributions: list[float]
    """Exact share of each class's logit; with the bias they add up to the logits."""


class SlideResult(_Record):
    """Everything about one scored slide."""

    format: Literal["s4mil.result/1"] = RESULT_FORMAT
    status: Literal["scored", "degraded", "no_tissue", "rejected"]
    """``degraded`` has a score from which damaged patches were left out; the last two have none."""
    reason: str | None = None
    """Why there is no score."""
    slide: SlideRecord
    quality: QualityRecord | None = None
    """None where there is no tissue to judge."""
    model: ModelRecord
    aggregator: AggregatorRecord | None = None
    """None in results of earlier versions."""
    encoder: EncoderRecord
    settings: PatchSettings
    classes: tuple[str, ...]
    predicted: str | None = None
    """The most probable class."""
    probabilities: list[float] | None = None
    calibrated: list[float] | None = None
    """Probabilities fitted to what the model gave unseen slides; None where the bundle has no calibration."""
    decision: Literal["positive", "negative", "refer", "rejected"] | None = None
    """By the calibration's threshold and refer band, of two classes; ``rejected`` where quality forbids it."""
    threshold: float | None = None
    """Calibrated probability of the last class from which on a slide is positive."""
    logits: list[float] | None = None
    bias: list[float] | None = None
    """Of the logits; belongs to no patch."""
    deciding_patches: list[DecidingPatch] = []
    """By share of the predicted class's logit, largest first."""
    patches: PatchScores | None = None
    software: dict[str, str]
    """Versions by name."""
    seconds: dict[str, float]
    """By stage; the only part that differs when the same slide is scored again."""

    @property
    def has_score(self) -> bool:
        """Whether there are probabilities."""
        return self.status in ("scored", "degraded")

    def to_json(self) -> str:
        """The content of ``result.json``."""
        return self.model_dump_json(indent=1) + "\n"


def read_result(path: str | Path) -> SlideResult:
    """Read a ``result.json``.

    Raises:
        OutputError: It is missing, damaged, or of another format.
    """
    try:
        return SlideResult.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(str(path), f"cannot be read ({error.strerror})") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise OutputError(str(path), f"is not a result of format {RESULT_FORMAT}") from error
