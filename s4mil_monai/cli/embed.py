"""``s4mil embed``: one slide or a folder of them into feature files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from s4mil_monai.cli.console import EXIT_ERROR, ProgressBar, complain, say
from s4mil_monai.cli.options import as_device, as_overrides, as_patch_settings, as_patch_stage
from s4mil_monai.cli.usage import require_positive, require_slide

if TYPE_CHECKING:
    from s4mil_monai.embedding import EmbeddedSlide, EmbeddingReport


def embed(
    slides: str,
    *,
    out: str = "features",
    encoder: str = "efficientnet_lite0",
    encoder_weights: str | None = None,
    runtime: str = "auto",
    precision: str = "float32",
    assume_mpp: float | None = None,
    resolutions: str | None = None,
    mpp: float = 0.5,
    min_tissue: float = 0.5,
    overlap_px: int = 0,
    scan_order: str = "row_major",
    patch_stage: str = "auto",
    batch_size: int = 16,
    device: str = "auto",
) -> int:
    """Embed the patches of a slide, or of all slides in a folder; write OUT/<slide>.h5 and OUT/embedding.json.

    A slide whose features are there as wanted is left alone, so a run that was stopped is simply started again.

    Args:
        slides: A slide file, a folder with one DICOM slide, or a folder of slides.
        out: Folder for the feature files.
        encoder: resnet50_block3, efficientnet_lite0, or the YAML file of another encoder.
        encoder_weights: Weights file of the encoder, instead of the published one.
        runtime: What runs the encoder: torch, compiled, onnxruntime, or auto, the fastest of equal features.
        precision: Of the encoder's arithmetic: float32, bfloat16 or float16.
        assume_mpp: Micrometres per pixel of the slides' finest level, for slides that do not say.
        resolutions: CSV of the site with columns slide, scanner, mpp: resolutions by file or by scanner.
        mpp: Micrometres per pixel of the patches.
        min_tissue: Least share of a patch that is tissue.
        overlap_px: How far neighbouring patches overlap, in pixels as the encoder sees them.
        scan_order: row_major, column_major, serpentine or hilbert.
        patch_stage: What prepares patches: torch, dali, or auto, the faster one here.
        batch_size: Patches the encoder takes at once.
        device: cpu, cuda, or auto.
    """
    from s4mil_monai.slides.folder import find_slides, name_outputs
    from s4mil_monai.slides.isolation import reader_pool

    require_positive("assume_mpp", assume_mpp)
    require_positive("batch_size", batch_size)
    require_slide(slides)
    found = find_slides(Path(slides))
    site = as_overrides(resolutions)
    reader_pool().warm_up()  # its processes start while this one imports torch
    from s4mil_monai.embedding import EmbeddingRun, embed_slides, report_run, write_embedding_report
    from s4mil_monai.features.encoder import DEFAULT_SIDE_PX, find_encoder, load_encoder

    settings = as_patch_settings(
        mpp=mpp,
        side_px=find_encoder(encoder).patch_side_px or DEFAULT_SIDE_PX,
        min_tissue=min_tissue,
        overlap_px=overlap_px,
        scan_order=scan_order,
    )
    ready = load_encoder(
        encoder, weights=encoder_weights, runtime=runtime, precision=precision, device=as_device(device)
    )
    run = EmbeddingRun(
        ready,
        settings,
        assume_mpp=assume_mpp,
        overrides=site,
        patch_stage=as_patch_stage(patch_stage),
        batch_size=batch_size,
    )
    names = name_outputs(found, Path(slides))
    files = {slide: Path(out) / f"{name}.h5" for slide, name in names.items()}

    done: list[EmbeddedSlide] = []
    started = time.perf_counter()
    try:
        with ProgressBar() as bar:
            for slide in embed_slides(files, run, progress=bar.show):
                done.append(slide)
                _say_slide(slide)
    finally:
        report = report_run(run, done, seconds=time.perf_counter() - started)
        if done:
            write_embedding_report(report, Path(out) / "embedding.json")
    if len(files) > 1:
        _say_summary(report)
    return EXIT_ERROR if report.count("failed") else 0


def _say_slide(slide: EmbeddedSlide) -> None:
    name = Path(slide.slide).name
    if slide.status == "failed":
        complain(f"{name}: {slide.reason}")
    elif slide.status == "busy":
        say(f"{name}: left to another process ({slide.reason})")
    elif slide.status == "present":
        say(f"{name}: already in {slide.file}")
    else:
        for note in slide.notes:
            say(f"{name}: note: {note}")
        for finding in slide.quality.findings if slide.quality else ():
            say(f"{name}: {finding.verdict}: {finding.text}")
        if slide.reason:
            say(f"{name}: embedded anew, {slide.reason}")
        say(f"{name}: {slide.patches} patches of {slide.features} features in {slide.file}")


def _say_summary(report: EmbeddingReport) -> None:
    """How many slides ended how, where the time went, and each failure once more: the list above may be long."""
    counts = ", ".join(
        f"{count} {status}"
        for status in ("embedded", "present", "busy", "failed")
        if (count := report.count(status))
    )
    busy = ", ".join(f"{stage} {share:.0%}" for stage, share in report.busy.items())
    say(f"{len(report.slides)} slides: {counts}; {report.seconds:.1f} s" + (f" (busy: {busy})" if busy else ""))
    for slide in report.slides:
        if slide.status == "failed":
            say(f"failed: {slide.slide}: {slide.reason}")
