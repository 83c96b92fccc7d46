"""``s4mil inspect``: what the pipeline makes of a slide, before hours are spent on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from s4mil_monai.cli.console import EXIT_ERROR, EXIT_NO_SCORE, complain, say
from s4mil_monai.cli.options import as_device, as_overrides, as_patch_settings, require_one_slide
from s4mil_monai.cli.usage import require_positive

if TYPE_CHECKING:
    from s4mil_monai.inspection import GridFacts, Inspection


def inspect_slide(
    slide: str,
    *,
    out: str = "inspection",
    assume_mpp: float | None = None,
    resolutions: str | None = None,
    mpp: float = 0.5,
    side_px: int = 256,
    min_tissue: float = 0.5,
    overlap_px: int = 0,
    scan_order: str = "row_major",
    encoder: str | None = "efficientnet_lite0",
    encoder_weights: str | None = None,
    device: str = "auto",
) -> int:
    """Show what the pipeline makes of a slide: resolution, tissue, patches, quality, time; write OUT/<slide>.png.

    Args:
        slide: A slide file, or a folder with one DICOM slide.
        out: Folder for the picture with tissue and patches, and for the same facts as JSON.
        assume_mpp: Micrometres per pixel of the slide's finest level, for slides that do not say.
        resolutions: CSV of the site with columns slide, scanner, mpp: resolutions by file or by scanner.
        mpp: Micrometres per pixel of the patches.
        side_px: Side of a patch as the encoder sees it.
        min_tissue: Least share of a patch that is tissue.
        overlap_px: How far neighbouring patches overlap, in pixels as the encoder sees them.
        scan_order: row_major, column_major, serpentine or hilbert.
        encoder: Whose time is estimated, on a few patches; none for no estimate.
        encoder_weights: Weights file of the encoder, instead of the published one.
        device: cpu, cuda, or auto; for the estimate.
    """
    require_positive("assume_mpp", assume_mpp)
    require_one_slide(slide, command="inspect")
    settings = as_patch_settings(
        mpp=mpp, side_px=side_px, min_tissue=min_tissue, overlap_px=overlap_px, scan_order=scan_order
    )
    from s4mil_monai.inspection import inspect_slide as look_at
    from s4mil_monai.inspection import write_inspection
    from s4mil_monai.slides.isolation import open_isolated

    ready = None
    if encoder not in (None, "none"):
        from s4mil_monai.features.encoder import load_encoder

        ready = load_encoder(encoder, weights=encoder_weights, device=as_device(device))
    with open_isolated(slide, assume_mpp=assume_mpp, overrides=as_overrides(resolutions)) as opened:
        picture = Path(out) / f"{opened.path.stem}.png"
        found = look_at(opened, settings, encoder=ready, picture=picture)
    write_inspection(found, picture.with_suffix(".json"))
    for line in describe(found):
        say(line)
    if found.refused:
        complain(f"{found.slide}: {found.refused}")
        return EXIT_NO_SCORE if found.without_tissue else EXIT_ERROR
    say(f"open {picture}")
    return EXIT_NO_SCORE if found.quality and found.quality.verdict == "reject" else 0


def describe(found: Inspection) -> Iterator[str]:
    """The facts as lines for a terminal."""
    yield found.slide
    yield _row("read by", found.backend)
    for reason in found.passed_over:
        yield _row("passed over", reason)
    yield _row("resolution", f"{found.mpp:.4g} µm/px, from {found.mpp_source}" if found.mpp else "not known")
    for number, level in enumerate(found.levels):
        width, height = level.size_px
        yield _row(f"level {number}", f"{width:,} x {height:,} px, downsample {level.downsample:.4f}")
    for note in found.notes:
        yield _row("note", note)
    if found.grid:
        yield from _describe_grid(found, found.grid)
    if found.quality:
        yield _row("quality", found.quality.verdict)
        for finding in found.quality.findings:
            yield _row(f"  {finding.verdict}", finding.text)
        yield _row("  measured", ", ".join(f"{key} {value:.3g}" for key, value in found.quality.measured.items()))
    if found.estimate:
        guess = found.estimate
        seconds = f"{guess.reading_s:.1f} s reading, {guess.encoding_s:.1f} s encoding"
        yield _row("estimated", f"{seconds} with {guess.encoder} on {guess.device}")


def _describe_grid(found: Inspection, grid: GridFacts) -> Iterator[str]:
    yield _row("tissue", f"{grid.tissue_mm2:.2f} mm², {grid.tissue_share:.0%} of the scan")
    yield _row(
        "patches",
        f"{grid.patches:,} of {found.settings.side_px} px at {grid.mpp:.4g} µm/px, {found.settings.scan_order}, "
        f"read as {grid.read_side_px} px of level {grid.level}",
    )
    if grid.note:
        yield _row("note", grid.note)


def _row(name: str, value: str) -> str:
    return f"  {name:12} {value}"
