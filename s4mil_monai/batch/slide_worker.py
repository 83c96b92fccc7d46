"""SlideWorker: what is done to one slide in a process that scores, in three steps that overlap between slides."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s4mil_monai.batch.ledger import Failure
from s4mil_monai.batch.printable import printable
from s4mil_monai.batch.work import EndedElsewhereError, Failed, Scored, Work, WorkerSettings
from s4mil_monai.checksum import sha256_of
from s4mil_monai.errors import (
    BundleError,
    DecoderHungError,
    FeatureFileError,
    OutputError,
    SlideError,
    TooCoarseError,
    UnknownResolutionError,
    first_line,
)
from s4mil_monai.features.patch_stream import RegionBatch
from s4mil_monai.features.prepare import PreparedSlide
from s4mil_monai.features.store import (
    FeatureBag,
    OtherFormatError,
    find_reason_to_embed,
    load_bag,
    read_origin,
    save_bag,
)
from s4mil_monai.measures import SlideMeasures
from s4mil_monai.measuring import measure_slide
from s4mil_monai.outputs.hospital import HospitalWriter
from s4mil_monai.result import SlideResult
from s4mil_monai.scoring import (
    EmbeddedSlide,
    aggregate,
    embed_prepared,
    fingerprint_model,
    load_scorer,
    prepare_or_reject,
    recall_embedded,
    wanted_features,
    write_outputs,
)
from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.overrides import read_overrides
from s4mil_monai.slides.slide import Slide
from s4mil_monai.slides.tissue import TissueMask
from s4mil_monai.timing import Stages
from s4mil_monai.whole_file import sync_tree

logger = logging.getLogger(__name__)

PERMANENT = (UnknownResolutionError, TooCoarseError)
"""No other try helps: it is what the file says."""


@dataclass
class Opened:
    """A slide that is open, and what is known of it."""

    work: Work
    slide: Slide
    found: PreparedSlide | SlideResult
    embedded: EmbeddedSlide | None = None
    measures: SlideMeasures | None = None
    """None where there is no score."""

    @property
    def result(self) -> SlideResult:
        """Once it is there."""
        assert isinstance(self.found, SlideResult)
        return self.found


@dataclass(frozen=True)
class Finished:
    """All that is known of a slide at its end; it can be pickled."""

    result: SlideResult
    bag: FeatureBag | None
    measures: SlideMeasures | None
    facts: dict[str, Any]
    """For the provenance record."""


class ResultWriter:
    """Writes results' folders; needs no model."""

    def __init__(self, settings: WorkerSettings):
        """Read what the site says of patients and studies.

        Raises:
            TableError: It cannot be.
        """
        self._features = settings.features
        self._hospital = HospitalWriter(settings.studies) if settings.dicom else None

    def write(self, work: Work, slide: Slide, done: Finished) -> Scored | Failed:
        """Write the folder of a result, so that it outlasts a power failure; the slide, still open, is closed."""
        try:
            with slide:
                if done.result.slide.sha256 != work.slide:
                    failure = Failure("ChangedSlideError", "the file was changed while it was scored")
                    return Failed(work.lease, failure)
                self._write_files(work, slide, done)
            sync_tree(work.part)
            measures = done.measures and done.measures.model_dump(mode="json")
            return Scored(work.lease, _hash_all(work.part), summarize(done.result), done.facts, measures)
        except Exception as error:
            return describe_failure(work, error)

    def _write_files(self, work: Work, slide: Slide, done: Finished) -> None:
        if done.bag is not None:
            save_bag(work.part / "features.h5", done.bag)
            if self._features is not None:
                _keep(self._features / f"{work.slide}.h5", done.bag)
        write_outputs(done.result, slide, work.part, hospital=self._hospital)


def _keep(path: Path, bag: FeatureBag) -> None:
    """Keep features, unless the same are there already, or another tool's, which are not ours to replace."""
    if path.is_file():
        try:
            if read_origin(path) == bag.origin:
                return
        except OtherFormatError:
            return
        except FeatureFileError:
            pass  # damaged
    save_bag(path, bag)


class SlideWorker:
    """A model, loaded once, and the steps that bring slides through it."""

    def __init__(self, settings: WorkerSettings):
        """Load the model.

        Raises:
            S4MilError: It cannot be loaded, or is not the one the scheduler has seen.
        """
        self._settings = settings
        self._overrides = read_overrides(settings.resolutions) if settings.resolutions else None
        self._writer = ResultWriter(settings)
        self.scorer = load_scorer(
            settings.bundle,
            encoder_weights=settings.encoder_weights,
            patch_stage=settings.patch_stage,
            batch_size=settings.batch_size,
            device=_choose_device(settings.device, settings.process),
            aggregator_runtime=settings.aggregator_runtime,
            aggregator_precision=settings.aggregator_precision,
        )
        if fingerprint_model(self.scorer.bundle.settings, self.scorer.calibration) != settings.model:
            raise BundleError(str(settings.bundle), "was changed while the run began; start again")

    def prepare(self, work: Work) -> Opened | Failed:
        """Open a slide, find its tissue and judge its quality."""
        stages = Stages()
        try:
            shutil.rmtree(work.part, ignore_errors=True)
            work.part.mkdir(parents=True)
            with stages.timed("opening"):
                slide = open_isolated(work.path, overrides=self._overrides)
            try:
                found = prepare_or_reject(slide, self.scorer, stages, ignore_quality=self._settings.ignore_quality)
            except BaseException:
                slide.close()
                raise
            return Opened(work, slide, found)
        except Exception as error:
            return describe_failure(work, error)

    def embed(self, opened: Opened, read: Iterator[RegionBatch] | None = None) -> Opened | Failed:
        """Embed the patches; the slide model reads them meanwhile.

        Args:
            opened: As :meth:`prepare` gives it.
            read: Regions of its patches, where another process reads them.

        Raises:
            EndedElsewhereError: That process has given the slide up, or is gone.
        """
        if isinstance(opened.found, SlideResult):
            return opened
        try:
            opened.embedded = self._recall(opened.found) or embed_prepared(opened.found, self.scorer, read=read)
            tissue = opened.found.tissue
            opened.found = aggregate(opened.embedded, self.scorer)
        except EndedElsewhereError:  # nothing is known against the slide, and another may write to its folder
            opened.slide.close()
            raise
        except Exception as error:
            opened.slide.close()
            return describe_failure(opened.work, error)
        opened.measures = _measure(tissue, opened.embedded.bag, opened.found)
        return opened

    def write(self, opened: Opened) -> Scored | Failed:
        """Write the result's folder, so that it outlasts a power failure."""
        try:
            done = self.finish(opened)
        except Exception as error:
            opened.slide.close()
            return describe_failure(opened.work, error)
        return self._writer.write(opened.work, opened.slide, done)

    def finish(self, opened: Opened) -> Finished:
        """All that there is to be written of a slide."""
        bag = opened.embedded.bag if opened.embedded is not None else None
        return Finished(opened.result, bag, opened.measures, self._facts(opened))

    def _recall(self, prepared: PreparedSlide) -> EmbeddedSlide | None:
        """The slide with features that were kept, if they are what this model wants."""
        if self._settings.features is None:
            return None
        kept = self._settings.features / f"{prepared.fingerprint.result()}.h5"
        with suppress(FeatureFileError):
            if find_reason_to_embed(kept, wanted_features(self.scorer, prepared)) is None:
                return recall_embedded(prepared, self.scorer, load_bag(kept))
        return None

    def _facts(self, opened: Opened) -> dict[str, Any]:
        """What the provenance record says, less where and when."""
        result, bag = opened.result, opened.embedded.bag if opened.embedded is not None else None
        calibration = self.scorer.calibration
        return {
            "slide": result.slide.model_dump(mode="json", exclude={"name"}),
            "status": result.status,
            "reason": result.reason,
            "quality": result.quality and result.quality.verdict,
            "patches": 0 if bag is None else len(bag),
            "patch_order": None if bag is None else hash_order(bag.top_left_px0),
            "encoder": result.encoder.model_dump(mode="json"),
            "encoder_runtime": [self.scorer.encoder.runtime, self.scorer.encoder.precision],
            "aggregator": result.aggregator and result.aggregator.model_dump(mode="json"),
            "model": result.model.model_dump(mode="json"),
            "calibration": calibration and _hash_json(calibration.model_dump(mode="json")),
            "settings": result.settings.model_dump(mode="json"),
            "software": result.software,
            "seconds": result.seconds,
            "decision": result.decision,
            "predicted": result.predicted,
            "probabilities": result.probabilities,
            "calibrated": result.calibrated,
            "threshold": result.threshold,
        }


def _measure(tissue: TissueMask, bag: FeatureBag, result: SlideResult) -> SlideMeasures | None:
    """What is watched for drift; None where it cannot be measured, which costs no slide its score."""
    try:
        return measure_slide(tissue, bag, result)
    except Exception:
        logger.exception("a slide cannot be measured for drift", extra={"event": "unmeasured"})
        return None


def hash_order(top_left_px0: Any) -> str:
    """SHA-256 of the (n, 2) corners of patches as little-endian int64, in the order they were read."""
    return hashlib.sha256(np.ascontiguousarray(top_left_px0, dtype="<i8").tobytes()).hexdigest()


def _hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def summarize(result: SlideResult) -> dict[str, Any]:
    """What lists of results show."""
    findings = result.quality.findings if result.quality else ()
    return {
        "status": result.status,
        "reason": result.reason,
        "predicted": result.predicted,
        "probability": max(result.probabilities) if result.probabilities else None,
        "positive": result.classes[-1],
        "calibrated": result.calibrated[-1] if result.calibrated else None,
        "decision": result.decision,
        "quality": result.quality.verdict if result.quality else None,
        "notes": [printable(note) for note in (*result.slide.notes, *(finding.text for finding in findings))],
        "patches": len(result.patches.top_left_px0) if result.patches else 0,
        "seconds": result.seconds,
    }


def describe_failure(work: Work, error: Exception) -> Failed:
    """Tell what is wrong with the slide from what is wrong with the machine, or with the share it lies on."""
    shutil.rmtree(work.part, ignore_errors=True)
    kind, said = (
        type(error).__name__,
        printable(error.reason if isinstance(error, SlideError) else first_line(error)),
    )
    if isinstance(error, OutputError) or (isinstance(error, OSError) and _is_of(error, work.part)):
        return Failed(work.lease, Failure(kind, said), of_the_machine=True)
    # only reading can fail for a share that is away; everything else is not worth reading gigabytes again
    if isinstance(error, (SlideError, OSError)) and not isinstance(error, (*PERMANENT, DecoderHungError)):
        away = _find_why_away(work.path)
        if away is not None:
            return Failed(work.lease, Failure(kind, away), of_the_share=True)
    return Failed(work.lease, Failure(kind, said, permanent=isinstance(error, PERMANENT)))


def _find_why_away(path: Path) -> str | None:
    """Why a slide that was not understood cannot even be read; None where its bytes are all there."""
    try:
        fingerprint_slide(path)
    except OSError as error:
        return f"cannot be read ({error.strerror or error}); is the share mounted?"
    return None


def _is_of(error: OSError, part: Path) -> bool:
    """Whether a file could not be written, rather than a slide read."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    return error.filename is not None and str(error.filename).startswith(str(part))


def _hash_all(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}


def _choose_device(name: str, process: int) -> str:
    import torch

    return name_device(name, process, torch.cuda.device_count() if torch.cuda.is_available() else 0)


def name_device(name: str, process: int, gpus: int) -> str:
    """The device of one of several processes, which have the GPUs of their machine in turn.

    Args:
        name: As the site has it; one GPU that is named, as ``cuda:1``, is everybody's.
        process: Its number.
        gpus: How many there are.

    >>> [name_device("auto", process, 2) for process in range(3)]
    ['cuda:0', 'cuda:1', 'cuda:0']
    >>> name_device("auto", 1, 1), name_device("auto", 1, 0), name_device("cuda:1", 0, 2)
    ('cuda', 'cpu', 'cuda:1')
    """
    if name not in ("auto", "cuda"):
        return name
    if gpus == 0:
        return "cpu" if name == "auto" else name
    return f"cuda:{process % gpus}" if gpus > 1 else "cuda"
