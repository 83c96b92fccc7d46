"""score_slide(): the one path from slide to SlideResult, behind every door of the package."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from s4mil_monai import __version__
from s4mil_monai.errors import BundleError, NoTissueError
from s4mil_monai.features.encoder import Encoder, find_encoder, load_encoder
from s4mil_monai.features.extract import Progress, extract_features
from s4mil_monai.features.store import FeatureBag, save_bag
from s4mil_monai.models.bundle import Bundle, load_bundle
from s4mil_monai.outputs.folder import check_target, whole_folder
from s4mil_monai.outputs.geojson import write_geojson
from s4mil_monai.outputs.heatmap import write_heatmap
from s4mil_monai.outputs.report import write_report
from s4mil_monai.result import DecidingPatch, PatchScores, SlideRecord, SlideResult
from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.reader import open_slide
from s4mil_monai.slides.slide import Slide
from s4mil_monai.timing import timed


@dataclass(frozen=True)
class Scorer:
    """A slide model and its encoder, loaded once for many slides."""

    bundle: Bundle
    encoder: Encoder
    patch_stage: str = "torch"
    batch_size: int = 16


def load_scorer(
    bundle: str | Path,
    *,
    encoder: str | None = None,
    encoder_weights: str | Path | None = None,
    patch_stage: str = "torch",
    batch_size: int = 16,
    device: str = "cpu",
) -> Scorer:
    """Load a bundle and the encoder it was trained with.

    Args:
        bundle: Its folder.
        encoder: Name of the encoder the caller expects; the bundle's own by default.
        encoder_weights: File to take instead of the published weights.
        patch_stage: ``torch`` or ``dali``.
        batch_size: Patches a step of the encoder.
        device: Where the encoder runs.

    Raises:
        BundleError: The bundle is damaged, or was trained with another encoder or other encoder weights.
        WeightsError: Weights of either are missing or damaged.
        UnknownNameError: No such encoder.
    """
    loaded = load_bundle(bundle)
    wanted = loaded.settings.encoder
    if encoder is not None and find_encoder(encoder).name != wanted.name:
        raise BundleError(str(bundle), f"was trained on features of {wanted.name}, not of {encoder}")
    ready = load_encoder(wanted.name, weights=encoder_weights, device=device)
    if ready.fingerprint != wanted.sha256:
        raise BundleError(
            str(bundle),
            f"was trained with other weights of {wanted.name} (SHA-256 {wanted.sha256[:12]}…, "
            f"these have {ready.fingerprint[:12]}…)",
        )
    return Scorer(loaded, ready, patch_stage, batch_size)


def score_slide(
    path: str | Path,
    scorer: Scorer,
    *,
    assume_mpp: float | None = None,
    features_path: Path | None = None,
    progress: Progress | None = None,
) -> SlideResult:
    """Score one slide.

    Args:
        path: A slide file, or a folder with one DICOM slide.
        scorer: Model and encoder.
        assume_mpp: µm per level-0 pixel; wins over what the slide says.
        features_path: Where to keep the patch features, if at all.
        progress: Told patches done and patches in all, while they are embedded.

    Returns:
        The result; with status ``no_tissue`` where there is nothing to score.

    Raises:
        SlideError: The slide is missing, unreadable, of unknown resolution or too coarse.
        OutputError: ``features_path`` cannot be written.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "opening"):
        slide = open_slide(path, assume_mpp=assume_mpp)
    with slide:
        return _score_open(slide, scorer, features_path, progress, seconds)


def _score_open(
    slide: Slide,
    scorer: Scorer,
    features_path: Path | None,
    progress: Progress | None,
    seconds: dict[str, float],
) -> SlideResult:
    try:
        bag = extract_features(
            slide,
            scorer.encoder,
            scorer.bundle.settings.patches,
            patch_stage=scorer.patch_stage,
            batch_size=scorer.batch_size,
            progress=progress,
            seconds=seconds,
        )
    except NoTissueError as nothing:
        return _unscored(slide, scorer, nothing.reason, seconds)
    with timed(seconds, "aggregation"):
        scores = _score_bag(bag, scorer.bundle)
    if features_path is not None:
        save_bag(features_path, bag)
    record = _slide_record(slide, bag.origin.slide_sha256, bag.origin.patch_note)
    return SlideResult(status="scored", slide=record, **_common(scorer), **scores, seconds=_rounded(seconds))


def _score_bag(bag: FeatureBag, bundle: Bundle) -> dict[str, Any]:
    """Fields of the result that the slide model gives."""
    with torch.inference_mode():
        output = bundle.model(torch.from_numpy(bag.features).unsqueeze(0))
        shares = bundle.model.take_apart(output)
        probabilities = output.logits[0].softmax(0)
        patch_probabilities = output.patch_logits[0].softmax(1)
    best = int(probabilities.argmax())
    order = shares.contributions[:, best].argsort(descending=True, stable=True)
    corners: list[tuple[int, int]] = [(int(x), int(y)) for x, y in bag.top_left_px0]
    return {
        "predicted": bundle.settings.classes[best],
        "probabilities": probabilities.tolist(),
        "logits": output.logits[0].tolist(),
        "bias": shares.bias.tolist(),
        "deciding_patches": [
            DecidingPatch(index=patch, top_left_px0=corners[patch], contributions=contributions)
            for patch, contributions in zip(
                shares.patches[order].tolist(), shares.contributions[order].tolist(), strict=True
            )
        ],
        "patches": PatchScores(
            side_px0=bag.origin.patch_side_px0,
            mpp=bag.origin.patch_mpp,
            top_left_px0=corners,
            probabilities=patch_probabilities.tolist(),
        ),
    }


def _unscored(slide: Slide, scorer: Scorer, reason: str, seconds: dict[str, float]) -> SlideResult:
    record = _slide_record(slide, fingerprint_slide(slide.path), "")
    return SlideResult(
        status="no_tissue", reason=reason, slide=record, **_common(scorer), seconds=_rounded(seconds)
    )


def _common(scorer: Scorer) -> dict[str, Any]:
    settings = scorer.bundle.settings
    return {
        "model": scorer.bundle.record,
        "encoder": settings.encoder,
        "settings": settings.patches,
        "classes": settings.classes,
        "software": software_versions(),
    }


def _slide_record(slide: Slide, sha256: str, patch_note: str) -> SlideRecord:
    assert slide.resolution is not None
    return SlideRecord(
        name=slide.name,
        sha256=sha256,
        size_px0=slide.size_px0,
        mpp=slide.mpp,
        mpp_source=slide.resolution.source,
        backend=slide.backend,
        passed_over=slide.passed_over,
        notes=slide.notes + ((patch_note,) if patch_note else ()),
    )


def software_versions() -> dict[str, str]:
    """Versions of what a score can depend on."""
    versions = {"python": platform.python_version(), "s4mil_monai": __version__}
    for name in (
        "torch",
        "numpy",
        "cucim-cu13",
        "openslide-python",
        "tifffile",
        "wsidicom",
        "nvidia-dali-cuda130",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    known = {stage: round(value, 3) for stage, value in seconds.items()}
    return {**known, "total": round(sum(seconds.values()), 3)}


def score_to_folder(
    path: str | Path,
    scorer: Scorer,
    out: str | Path,
    *,
    assume_mpp: float | None = None,
    progress: Progress | None = None,
) -> tuple[SlideResult, Path]:
    """Score one slide and write ``result.json``, pictures, regions, features and report as one folder.

    The folder ``out/<slide>`` appears when all of it is written; one that is there is replaced then.

    Args:
        path: As in :func:`score_slide`.
        scorer: As in :func:`score_slide`.
        out: Folder that gets a folder for the slide.
        assume_mpp: As in :func:`score_slide`.
        progress: As in :func:`score_slide`.

    Returns:
        The result and its folder.

    Raises:
        SlideError: As in :func:`score_slide`.
        OutputError: The folder cannot be written, or holds the result of another slide.
    """
    path = Path(path)
    target = check_target(Path(out), path)
    seconds: dict[str, float] = {}
    with whole_folder(target) as part:
        with timed(seconds, "opening"):
            slide = open_slide(path, assume_mpp=assume_mpp)
        with slide:
            result = _score_open(slide, scorer, part / "features.h5", progress, seconds)
            picture = write_heatmap(result, slide, part / "heatmap.png")
            write_geojson(result, part / "regions.geojson")
            write_report(result, slide, picture, part / "report.html")
        (part / "result.json").write_text(result.to_json(), encoding="utf-8")
    return result, target
