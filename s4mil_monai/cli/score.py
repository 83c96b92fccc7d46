"""``s4mil score``: one slide, one answer."""

from __future__ import annotations

from s4mil_monai.cli.console import EXIT_NO_SCORE, ProgressBar, complain, say
from s4mil_monai.cli.options import (
    as_device,
    as_hospital_writer,
    as_overrides,
    as_patch_stage,
    as_precision,
    require_one_slide,
    shipped_bundle,
)
from s4mil_monai.cli.usage import require_positive


def score(
    slide: str,
    *,
    out: str = "results",
    bundle: str | None = None,
    assume_mpp: float | None = None,
    resolutions: str | None = None,
    ignore_quality: bool = False,
    dicom: bool = False,
    studies: str | None = None,
    encoder: str | None = None,
    encoder_weights: str | None = None,
    patch_stage: str = "torch",
    batch_size: int = 16,
    device: str = "auto",
    aggregator_runtime: str = "auto",
    aggregator_precision: str = "float32",
) -> int:
    """Score one slide; write result.json, heatmap.png, regions.geojson, features.h5 and report.html.

    Args:
        slide: A slide file, or a folder with one DICOM slide.
        out: Folder that gets a folder named after the slide.
        bundle: Folder of the trained model; the shipped demonstration model by default.
        assume_mpp: Micrometres per pixel of the slide's finest level, for slides that do not say.
        resolutions: CSV of the site with columns slide, scanner, mpp: resolutions by file or by scanner.
        ignore_quality: Score a slide even where its quality is judged too bad.
        dicom: Write DICOM objects for the PACS and a FHIR report as well.
        studies: CSV of the site with patients and studies by slide, for --dicom of slides that are no DICOM.
        encoder: Patch encoder the bundle was trained with, by name; the YAML file of one of your own.
        encoder_weights: Weights file of the encoder, instead of the published one.
        patch_stage: What prepares patches: torch, dali, or auto, the faster one here.
        batch_size: Patches the encoder takes at once.
        device: cpu, cuda, or auto.
        aggregator_runtime: What runs the slide model: torch, onnxruntime, tensorrt, or auto.
        aggregator_precision: Of the slide model's products: float32, float16 or bfloat16.
    """
    from s4mil_monai.slides.isolation import reader_pool

    require_positive("assume_mpp", assume_mpp)
    require_positive("batch_size", batch_size)
    require_one_slide(slide, command="score")
    site = as_overrides(resolutions)
    hospital = as_hospital_writer(dicom, studies)
    reader_pool().warm_up()  # its processes start while this one imports torch
    from s4mil_monai.scoring import load_scorer, score_to_folder

    scorer = load_scorer(
        bundle or shipped_bundle(),
        encoder=encoder,
        encoder_weights=encoder_weights,
        patch_stage=as_patch_stage(patch_stage),
        batch_size=batch_size,
        device=as_device(device),
        aggregator_runtime=aggregator_runtime,
        aggregator_precision=as_precision(aggregator_precision),
    )
    with ProgressBar() as bar:
        result, folder = score_to_folder(
            slide,
            scorer,
            out,
            assume_mpp=assume_mpp,
            overrides=site,
            ignore_quality=ignore_quality,
            hospital=hospital,
            progress=bar.show,
            so_far=lambda now: bar.note(
                f"so far {scorer.bundle.settings.classes[-1]} {now.probabilities[-1]:.3f}"
            ),
        )
    if not result.has_score:
        complain(f"{result.slide.name}: no score, {result.reason}; written to {folder}")
        return EXIT_NO_SCORE
    assert result.probabilities is not None
    assert result.patches is not None
    for note in result.slide.notes:
        say(f"{result.slide.name}: note: {note}")
    for finding in result.quality.findings if result.quality else ():
        say(f"{result.slide.name}: {finding.verdict}: {finding.text}")
    if result.decision is not None and result.calibrated is not None:
        said = f"{result.decision}, calibrated probability {result.calibrated[-1]:.3f}"
        say(f"{result.slide.name}: {said} of {result.classes[-1]} (threshold {result.threshold:.3f})")
    say(
        f"{result.slide.name}: {result.predicted}, probability {max(result.probabilities):.3f} "
        f"({len(result.patches.top_left_px0)} patches, {result.seconds['total']:.1f} s)"
    )
    say(f"open {folder / 'report.html'}")
    return 0
