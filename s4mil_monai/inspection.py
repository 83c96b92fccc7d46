"""inspect_slide(): what the pipeline makes of a slide, before hours are spent on it."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from s4mil_monai.errors import NoTissueError, OutputError, SlideError
from s4mil_monai.features.encoder import Encoder
from s4mil_monai.features.patch_batches import torch_batches
from s4mil_monai.features.patch_stream import BATCHES_AHEAD, read_in_turns
from s4mil_monai.features.prepare import PreparedSlide, prepare_slide
from s4mil_monai.outputs.tissue_picture import write_tissue_picture
from s4mil_monai.result import PatchSettings, QualityRecord
from s4mil_monai.slides.slide import Slide

ENCODED_BATCHES = 2
"""Batches that are prepared and embedded to estimate the time of all, after one that is not counted."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LevelFacts(_Record):
    """One level of the pyramid."""

    size_px: tuple[int, int]
    downsample: float
    """Level-0 pixels per pixel."""


class GridFacts(_Record):
    """The patches that would be read."""

    patches: int
    level: int
    """Place in the list of levels they are read from."""
    read_side_px: int
    """In pixels of that level."""
    side_px0: float
    """In level-0 pixels."""
    mpp: float
    """µm/px the encoder sees."""
    note: str
    tissue_mm2: float
    tissue_share: float
    """Of the scan's area."""


class Estimate(_Record):
    """How long the patches would take on this machine, from a few of them."""

    encoder: str
    device: str
    reading_s: float
    encoding_s: float
    """Preparing included."""


class Inspection(_Record):
    """What is known about a slide; the content of the inspection's JSON file."""

    slide: str
    backend: str
    passed_over: tuple[str, ...]
    levels: tuple[LevelFacts, ...]
    mpp: float | None
    """µm per level-0 pixel; None where nothing says it."""
    mpp_source: str
    notes: tuple[str, ...]
    settings: PatchSettings
    grid: GridFacts | None = None
    quality: QualityRecord | None = None
    estimate: Estimate | None = None
    refused: str = ""
    """Why the slide would not be embedded."""
    without_tissue: bool = False
    """Whether that is why: a slide that can be read and gets no score."""


def inspect_slide(
    slide: Slide, settings: PatchSettings, *, encoder: Encoder | None = None, picture: Path | None = None
) -> Inspection:
    """Look at an open slide as the pipeline does, and stop before its patches are embedded.

    Args:
        slide: An open slide.
        settings: Which patches.
        encoder: Whose time is estimated, if any.
        picture: Where the tissue, the ink and the patches are drawn, if there are any.

    Raises:
        OutputError: The picture cannot be written.
    """
    try:
        prepared = prepare_slide(slide, settings)
    except SlideError as error:
        blank = isinstance(error, NoTissueError)
        return _facts(slide, settings, refused=error.reason, without_tissue=blank)
    if picture is not None:
        write_tissue_picture(prepared.tissue, prepared.grid, picture)
    return _facts(
        slide,
        settings,
        grid=_grid_facts(prepared),
        quality=prepared.quality,
        estimate=_estimate(prepared, encoder) if encoder is not None else None,
    )


def _facts(slide: Slide, settings: PatchSettings, **more: object) -> Inspection:
    found = slide.resolution
    return Inspection(
        slide=slide.name,
        backend=slide.backend,
        passed_over=slide.passed_over,
        levels=tuple(LevelFacts(size_px=level.size_px, downsample=level.downsample) for level in slide.levels),
        mpp=found.mpp if found else None,
        mpp_source=found.source if found else "",
        notes=slide.notes,
        settings=settings,
        **more,  # type: ignore[arg-type]
    )


def _grid_facts(prepared: PreparedSlide) -> GridFacts:
    grid, tissue, slide = prepared.grid, prepared.tissue, prepared.slide
    pixel_mm2 = tissue.px0_per_px[0] * tissue.px0_per_px[1] * (slide.mpp / 1000) ** 2
    return GridFacts(
        patches=len(grid),
        level=grid.plan.level,
        read_side_px=grid.plan.read_side_px,
        side_px0=grid.plan.side_px0,
        mpp=grid.plan.mpp,
        note=grid.plan.note or "",
        tissue_mm2=float(tissue.mask.sum()) * pixel_mm2,
        tissue_share=float(tissue.mask.mean()),
    )


def _estimate(prepared: PreparedSlide, encoder: Encoder, *, batch_size: int = 16) -> Estimate:
    """Read as many batches as are read at once, prepare and embed some of them."""
    started = time.perf_counter()
    regions = [batch.regions for batch in islice(read_in_turns(prepared, batch_size=batch_size), BATCHES_AHEAD)]
    reading_s = (time.perf_counter() - started) / sum(map(len, regions))
    spec = encoder.spec
    batches = torch_batches(
        regions[: ENCODED_BATCHES + 1],
        patch_side_px=prepared.grid.plan.patch_side_px,
        mean=spec.mean,
        deviation=spec.deviation,
        batch_size=batch_size,
    )
    encoder.encode(next(batches))  # the first is slower
    started = time.perf_counter()
    encoded = sum(len(encoder.encode(batch)) for batch in batches) or 1
    encoding_s = (time.perf_counter() - started) / encoded
    return Estimate(
        encoder=spec.name,
        device=str(encoder.device),
        reading_s=reading_s * len(prepared.grid),
        encoding_s=encoding_s * len(prepared.grid),
    )


def write_inspection(inspection: Inspection, path: Path) -> None:
    """Write the facts as JSON.

    Raises:
        OutputError: They cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(inspection.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror or error})") from error
