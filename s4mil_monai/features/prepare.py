"""prepare_slide(): everything that is decided about a slide before its patches are read."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from s4mil_monai.result import PatchSettings, QualityFinding, QualityRecord
from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.grid import PatchGrid, lay_grid
from s4mil_monai.slides.quality import combine, judge_quality
from s4mil_monai.slides.resolution import plan_reading
from s4mil_monai.slides.slide import Slide
from s4mil_monai.slides.tissue import TissueMask, find_tissue
from s4mil_monai.timing import Stages

NOTHING_TO_COMPARE = "no coarser level to compare patches with: damage that still decodes would go unnoticed"
"""Note on slides of one level, of which :class:`s4mil_monai.slides.damage.ColourCheck` can tell nothing."""


@dataclass(frozen=True)
class PreparedSlide:
    """An open slide with its tissue, grid and quality."""

    slide: Slide
    settings: PatchSettings
    tissue: TissueMask
    grid: PatchGrid
    quality: QualityRecord
    fingerprint: Future[str]
    """SHA-256 of the file, computed in a thread: it reads all of it."""
    stages: Stages


def prepare_slide(slide: Slide, settings: PatchSettings, *, stages: Stages | None = None) -> PreparedSlide:
    """Find tissue, lay the grid and judge the quality.

    Args:
        slide: An open slide.
        settings: Which patches.
        stages: Receives ``tissue``, ``quality`` and ``fingerprint``.

    Raises:
        UnknownResolutionError: The slide does not know its resolution.
        TooCoarseError: It is too coarse for ``settings.mpp``.
        NoTissueError: There is no tissue on it.
        UnreadableSlideError: Its overview cannot be decoded.
        UnknownNameError: No such scan order.
    """
    stages = stages or Stages()
    plan = plan_reading(slide, mpp=settings.mpp, patch_side_px=settings.side_px)
    with stages.timed("tissue"):
        tissue = find_tissue(slide)
        grid = lay_grid(
            tissue,
            plan,
            min_tissue=settings.min_tissue,
            scan_order=settings.scan_order,
            overlap_px=settings.overlap_px,
        )
    with stages.timed("quality"):
        quality = combine(judge_quality(slide, tissue, grid), *_find_unreadable(tissue.overview.unreadable))
    if tissue.overview.level == plan.level and NOTHING_TO_COMPARE not in slide.notes:
        slide.notes += (NOTHING_TO_COMPARE,)
    return PreparedSlide(slide, settings, tissue, grid, quality, _fingerprint(slide, stages), stages)


def _find_unreadable(share: float) -> tuple[QualityFinding, ...]:
    if share == 0:
        return ()
    text = f"{share:.1%} of the overview cannot be decoded; tissue that lies there is not seen"
    return (QualityFinding(code="damaged", verdict="warn", value=share, limit=0.0, text=text),)


def _fingerprint(slide: Slide, stages: Stages) -> Future[str]:
    def compute() -> str:
        with stages.timed("fingerprint"):
            return fingerprint_slide(slide.path)

    background = ThreadPoolExecutor(1, thread_name_prefix="fingerprint")
    try:
        return background.submit(compute)
    finally:
        background.shutdown(wait=False)
