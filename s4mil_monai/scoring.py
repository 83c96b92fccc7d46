"""score_slide(): the one path from slide to SlideResult, behind every door of the package."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from s4mil_monai import __version__
from s4mil_monai.errors import BundleError, NoTissueError
from s4mil_monai.features.encoder import Encoder, find_encoder, load_encoder
from s4mil_monai.features.extract import Extraction, Progress, extract_features, recall
from s4mil_monai.features.patch_stream import RegionBatch
from s4mil_monai.features.prepare import PreparedSlide, prepare_slide
from s4mil_monai.features.store import FeatureBag, WantedFeatures, save_bag
from s4mil_monai.models.bundle import Bundle, BundleSettings, load_bundle
from s4mil_monai.models.s4mil import S4MILOutput
from s4mil_monai.outputs.folder import check_target, whole_folder
from s4mil_monai.outputs.geojson import write_geojson
from s4mil_monai.outputs.heatmap import write_heatmap
from s4mil_monai.outputs.hospital import HospitalWriter
from s4mil_monai.outputs.report import write_report
from s4mil_monai.result import (
    AggregatorRecord,
    DecidingPatch,
    PatchScores,
    PatchSettings,
    QualityRecord,
    SlideRecord,
    SlideResult,
)
from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.overrides import Overrides
from s4mil_monai.slides.slide import Slide
from s4mil_monai.statistics.calibration import Calibration, read_calibration
from s4mil_monai.streaming.choose import ChosenRuntime, open_runtime
from s4mil_monai.streaming.stream import SlideStream, SoFar
from s4mil_monai.timing import Stages

CALIBRATION_FILE = Path("configs") / "calibration.json"
"""Of a bundle; ``s4mil calibrate`` writes it."""

TellSoFar = Callable[[SoFar], None]
"""Called with the score of the patches read so far, each time it has changed."""


@dataclass(frozen=True)
class Scorer:
    """A slide model and its encoder, loaded once for many slides."""

    bundle: Bundle
    encoder: Encoder
    aggregator: ChosenRuntime
    patch_stage: str = "torch"
    batch_size: int = 16
    calibration: Calibration | None = None
    """None where the bundle has none."""


def load_scorer(
    bundle: str | Path,
    *,
    encoder: str | None = None,
    encoder_weights: str | Path | None = None,
    patch_stage: str = "torch",
    batch_size: int = 16,
    device: str = "cpu",
    aggregator_runtime: str = "auto",
    aggregator_precision: str = "float32",
) -> Scorer:
    """Load a bundle and the encoder it was trained with.

    Args:
        bundle: Its folder.
        encoder: The bundle's encoder, by name: another is refused. One of a site's own is given by its YAML file.
        encoder_weights: File to take instead of the published weights.
        patch_stage: ``torch`` or ``dali``.
        batch_size: Patches a step of the encoder.
        device: Where encoder and aggregator run.
        aggregator_runtime: What runs the slide model; see :func:`open_runtime`.
        aggregator_precision: Of the slide model's products.

    Raises:
        ExportError: The slide model's exported step is missing, damaged, or does not fit this machine.
        BundleError: The bundle or its calibration is damaged, or it was trained with another encoder or other
            encoder weights.
        WeightsError: Weights of either are missing or damaged.
        UnknownNameError: No such encoder.
    """
    loaded = load_bundle(bundle)
    wanted = loaded.settings.encoder
    if encoder is not None and find_encoder(encoder).name != wanted.name:
        raise BundleError(str(bundle), f"was trained on features of {wanted.name}, not of {encoder}")
    ready = load_encoder(encoder or wanted.name, weights=encoder_weights, device=device)
    if ready.fingerprint != wanted.sha256:
        raise BundleError(
            str(bundle),
            f"was trained with other weights of {wanted.name} (SHA-256 {wanted.sha256[:12]}…, "
            f"these have {ready.fingerprint[:12]}…)",
        )
    aggregator = open_runtime(
        loaded,
        Path(bundle) / "models",
        name=aggregator_runtime,
        precision=aggregator_precision,
        device=device,
    )
    return Scorer(
        loaded, ready, aggregator, patch_stage, batch_size, find_calibration(Path(bundle), loaded.settings)
    )


def find_calibration(folder: Path, settings: BundleSettings) -> Calibration | None:
    """The calibration of a bundle; None where it has none.

    Raises:
        BundleError: It is damaged, for another number of classes, or was fitted for other weights.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    found = read_calibration(path)
    if found.classes != len(settings.classes):
        raise BundleError(str(path), f"is for {found.classes} classes, the model has {len(settings.classes)}")
    if found.model_sha256 != settings.weights.sha256:
        theirs = (
            "no weights in particular" if found.model_sha256 is None else f"weights {found.model_sha256[:12]}…"
        )
        raise BundleError(
            str(path),
            f"is for {theirs}, the model has {settings.weights.sha256[:12]}…; "
            "run s4mil calibrate again, or remove it",
        )
    return found


def fingerprint_model(settings: BundleSettings, calibration: Calibration | None) -> str:
    """SHA-256 of all that makes a model's scores what they are and mean: both networks, the names of the classes,
    the patches, the calibration."""
    parts = (
        json.dumps(settings.classes),
        settings.weights.sha256,
        settings.encoder.sha256,
        settings.patches.model_dump_json(),
        "" if calibration is None else calibration.model_dump_json(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def score_slide(
    path: str | Path,
    scorer: Scorer,
    *,
    assume_mpp: float | None = None,
    overrides: Overrides | None = None,
    ignore_quality: bool = False,
    features_path: Path | None = None,
    progress: Progress | None = None,
    so_far: TellSoFar | None = None,
) -> SlideResult:
    """Score one slide; the slide model reads patches while later ones are still being embedded.

    Args:
        path: A slide file, or a folder with one DICOM slide.
        scorer: Model and encoder.
        assume_mpp: µm per level-0 pixel; wins over what the slide says.
        overrides: Of the site, per file or scanner; they too win over what the slide says.
        ignore_quality: Score a slide even where its quality is judged too bad.
        features_path: Where to keep the patch features, if at all.
        progress: Told patches done and patches in all, while they are embedded.
        so_far: Told the score of the patches read so far: that of a slide that ends there.

    Returns:
        The result; with status ``no_tissue`` where there is nothing to score, ``rejected`` where the quality
        forbids it, ``degraded`` where damaged patches were left out.

    Raises:
        SlideError: The slide is missing, unreadable, of unknown resolution or too coarse.
        OutputError: ``features_path`` cannot be written.
    """
    stages = Stages()
    with stages.timed("opening"):
        slide = open_isolated(path, assume_mpp=assume_mpp, overrides=overrides)
    with slide:
        return _score_open(
            slide, scorer, features_path, stages, ignore_quality=ignore_quality, progress=progress, so_far=so_far
        )


def _score_open(
    slide: Slide,
    scorer: Scorer,
    features_path: Path | None,
    stages: Stages,
    *,
    ignore_quality: bool,
    progress: Progress | None,
    so_far: TellSoFar | None,
) -> SlideResult:
    prepared = prepare_or_reject(slide, scorer, stages, ignore_quality=ignore_quality)
    if isinstance(prepared, SlideResult):
        return prepared
    found = embed_prepared(prepared, scorer, progress=progress, so_far=so_far)
    result = aggregate(found, scorer)
    if features_path is not None:
        save_bag(features_path, found.bag)
    return result


def prepare_or_reject(
    slide: Slide, scorer: Scorer, stages: Stages, *, ignore_quality: bool = False
) -> PreparedSlide | SlideResult:
    """Find tissue and judge quality: the slide ready to be embedded, or the result of one that gets no score.

    Args:
        slide: An open slide.
        scorer: As in :func:`score_slide`.
        stages: Receives the seconds of everything that follows.
        ignore_quality: As in :func:`score_slide`.

    Raises:
        SlideError: As in :func:`score_slide`.
    """
    found = look_over(slide, scorer.bundle.settings.patches, stages, ignore_quality=ignore_quality)
    return explain_unscored(slide, found, scorer, stages) if isinstance(found, NoScore) else found


@dataclass(frozen=True)
class NoScore:
    """Why a slide gets no score."""

    status: Literal["no_tissue", "rejected"]
    reason: str
    slide_sha256: str
    quality: QualityRecord | None = None


def look_over(
    slide: Slide, patches: PatchSettings, stages: Stages, *, ignore_quality: bool = False
) -> PreparedSlide | NoScore:
    """As :func:`prepare_or_reject`, without a model.

    Args:
        slide: An open slide.
        patches: Which patches the model wants.
        stages: Receives the seconds of everything that follows.
        ignore_quality: As in :func:`score_slide`.

    Raises:
        SlideError: As in :func:`score_slide`.
    """
    try:
        prepared = prepare_slide(slide, patches, stages=stages)
    except NoTissueError as nothing:
        return NoScore("no_tissue", nothing.reason, fingerprint_slide(slide.path))
    if prepared.quality.verdict != "reject" or ignore_quality:
        return prepared
    reasons = "; ".join(finding.text for finding in prepared.quality.findings if finding.verdict == "reject")
    return NoScore("rejected", reasons, prepared.fingerprint.result(), prepared.quality)


class StreamReader:
    """Feeds a slide's features to the aggregator as they come, and counts what that takes."""

    def __init__(self, scorer: Scorer, stages: Stages, so_far: TellSoFar | None):
        self._stream = SlideStream(scorer.aggregator.runtime)
        self._stages, self._tell = stages, so_far
        self._told = 0
        self._latest = time.perf_counter()

    def take(self, features: Tensor) -> None:
        """Read the features of the next patches."""
        self._latest = time.perf_counter()
        with self._stages.timed("aggregation"):
            self._stream.add(features)
        if self._tell is None or self._stream.patches_read == self._told:
            return  # asking costs a GPU a pause
        self._told = self._stream.patches_read
        now = self._stream.so_far()
        assert now is not None
        self._tell(now)

    def finish(self) -> S4MILOutput:
        """The slide's output; ``last_patch_to_score`` is the time since the last features came."""
        with self._stages.timed("aggregation"):
            output = self._stream.finish()
        self._stages.add("last_patch_to_score", time.perf_counter() - self._latest)
        return output


@dataclass(frozen=True)
class EmbeddedSlide:
    """A slide whose patches are embedded, and the reader that has read them."""

    extraction: Extraction
    reader: StreamReader

    @property
    def bag(self) -> FeatureBag:
        """The features."""
        return self.extraction.bag


def embed_prepared(
    prepared: PreparedSlide,
    scorer: Scorer,
    *,
    progress: Progress | None = None,
    so_far: TellSoFar | None = None,
    read: Iterator[RegionBatch] | None = None,
) -> EmbeddedSlide:
    """Embed the patches of a prepared slide; the slide model reads them as they come.

    Args:
        prepared: As :func:`prepare_or_reject` gives it.
        scorer: As in :func:`score_slide`.
        progress: As in :func:`score_slide`.
        so_far: As in :func:`score_slide`.
        read: Regions of the patches, where somebody else reads them; see :func:`stream_patches`.

    Raises:
        UnreadableSlideError: Too many patches are damaged.
    """
    reader = StreamReader(scorer, prepared.stages, so_far)
    extraction = extract_features(
        prepared,
        scorer.encoder,
        patch_stage=scorer.patch_stage,
        batch_size=scorer.batch_size,
        progress=progress,
        take=reader.take,
        read=read,
    )
    return EmbeddedSlide(extraction, reader)


def recall_embedded(prepared: PreparedSlide, scorer: Scorer, bag: FeatureBag) -> EmbeddedSlide:
    """As :func:`embed_prepared`, with features kept from an earlier scoring; the encoder is not asked."""
    reader = StreamReader(scorer, prepared.stages, None)
    reader.take(torch.from_numpy(bag.features))
    return EmbeddedSlide(recall(prepared, bag), reader)


def wanted_features(scorer: Scorer, prepared: PreparedSlide) -> WantedFeatures:
    """What kept features must be to be those of a slide for this model; waits for the slide's fingerprint."""
    return WantedFeatures(
        encoder=scorer.encoder.spec.name,
        encoder_sha256=scorer.encoder.fingerprint,
        settings=scorer.bundle.settings.patches,
        encoder_runtime=scorer.encoder.runtime,
        encoder_precision=scorer.encoder.precision,
        slide_sha256=prepared.fingerprint.result(),
        slide_mpp=prepared.slide.mpp,
    )


def aggregate(embedded: EmbeddedSlide, scorer: Scorer) -> SlideResult:
    """The result of a slide whose patches are embedded."""
    found, stages = embedded.extraction, embedded.extraction.prepared.stages
    output = embedded.reader.finish()
    scores = _describe_scores(output, found.bag, scorer.bundle)
    scores |= _decide(scores["logits"], scorer.calibration)
    origin = found.bag.origin
    return SlideResult(
        status="degraded" if origin.damaged_patches else "scored",
        slide=_slide_record(found.prepared.slide, origin.slide_sha256, origin.patch_note),
        quality=found.quality,
        **_common(scorer),
        **scores,
        seconds=stages.report(),
    )


def _describe_scores(output: S4MILOutput, bag: FeatureBag, bundle: Bundle) -> dict[str, Any]:
    """Fields of the result that the slide model gives."""
    assert output.patch_logits is not None
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


def _decide(logits: list[float], calibration: Calibration | None) -> dict[str, Any]:
    """Fields of the result that the calibration gives."""
    if calibration is None:
        return {}
    calibrated = calibration.apply(np.asarray(logits))
    decision = calibration.decide(float(calibrated[1])) if calibration.threshold is not None else None
    return {"calibrated": calibrated.tolist(), "decision": decision, "threshold": calibration.threshold}


def explain_unscored(slide: Slide, why: NoScore, scorer: Scorer, stages: Stages) -> SlideResult:
    """The result of a slide that gets no score."""
    return SlideResult(
        status=why.status,
        reason=why.reason,
        slide=_slide_record(slide, why.slide_sha256, ""),
        quality=why.quality,
        decision="rejected" if why.status == "rejected" and scorer.calibration is not None else None,
        **_common(scorer),
        seconds=stages.report(),
    )


def _common(scorer: Scorer) -> dict[str, Any]:
    settings = scorer.bundle.settings
    return {
        "model": scorer.bundle.record,
        "aggregator": _aggregator_record(scorer.aggregator),
        "encoder": settings.encoder,
        "settings": settings.patches,
        "classes": settings.classes,
        "software": software_versions(),
    }


def _aggregator_record(chosen: ChosenRuntime) -> AggregatorRecord:
    runtime = chosen.runtime
    return AggregatorRecord(
        runtime=runtime.name,
        precision=runtime.precision,
        chunk=runtime.shape.chunk,
        passed_over=chosen.passed_over,
    )


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
        "onnxruntime",
        "tensorrt-rtx-cu13",
        "tensorrt-cu13",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def score_to_folder(
    path: str | Path,
    scorer: Scorer,
    out: str | Path,
    *,
    assume_mpp: float | None = None,
    overrides: Overrides | None = None,
    ignore_quality: bool = False,
    hospital: HospitalWriter | None = None,
    progress: Progress | None = None,
    so_far: TellSoFar | None = None,
) -> tuple[SlideResult, Path]:
    """Score one slide and write ``result.json``, pictures, regions, features and report as one folder.

    The folder ``out/<slide>`` appears when all of it is written; one that is there is replaced then.

    Args:
        path: As in :func:`score_slide`.
        scorer: As in :func:`score_slide`.
        out: Folder that gets a folder for the slide.
        assume_mpp: As in :func:`score_slide`.
        overrides: As in :func:`score_slide`.
        ignore_quality: As in :func:`score_slide`.
        hospital: Writes DICOM objects and a FHIR report as well.
        progress: As in :func:`score_slide`.
        so_far: As in :func:`score_slide`.

    Returns:
        The result and its folder.

    Raises:
        SlideError: As in :func:`score_slide`.
        OutputError: The folder cannot be written, or holds the result of another slide.
    """
    path = Path(path)
    target = check_target(Path(out), path)
    stages = Stages()
    with whole_folder(target) as part:
        with stages.timed("opening"):
            slide = open_isolated(path, assume_mpp=assume_mpp, overrides=overrides)
        with slide:
            result = _score_open(
                slide,
                scorer,
                part / "features.h5",
                stages,
                ignore_quality=ignore_quality,
                progress=progress,
                so_far=so_far,
            )
            write_outputs(result, slide, part, hospital=hospital)
    return result, target


def write_outputs(
    result: SlideResult, slide: Slide, folder: Path, *, hospital: HospitalWriter | None = None
) -> None:
    """Write all that is made of a result into a folder; ``result.json`` last.

    Args:
        result: Of the slide.
        slide: Still open.
        folder: Exists.
        hospital: Writes DICOM objects and a FHIR report as well.

    Raises:
        OSError: The folder cannot be written.
        SlideError: The slide's overview or DICOM headers cannot be read.
    """
    picture = write_heatmap(result, slide, folder / "heatmap.png")
    write_geojson(result, folder / "regions.geojson")
    write_report(result, slide, picture, folder / "report.html")
    if hospital is not None:
        hospital.write(result, slide, picture, folder)
    (folder / "result.json").write_text(result.to_json(), encoding="utf-8")
