"""The parts that let MONAI's evaluator embed slides: its data, its network, and the handler that writes files."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import Tensor, nn

from s4mil_monai.embedding import EmbeddingRun, SlideEmbedding, report_run, write_embedding_report
from s4mil_monai.errors import S4MilError, UnknownNameError
from s4mil_monai.features.encoder import ENCODERS, Encoder, PublishedEncoder, find_encoder
from s4mil_monai.slides.folder import find_slides, name_outputs

logger = logging.getLogger(__name__)

FEATURE_BATCH = "patch_batch"
"""Key, beside MONAI's ``image``, under which a batch says whose patches it holds."""


def build_network(name: str) -> nn.Module:
    """The network of an encoder that is part of this package, without its weights: (B, 3, p, p) → (B, d).

    Raises:
        UnknownNameError: There is none of that name.
    """
    spec = find_encoder(name)
    if not isinstance(spec, PublishedEncoder):
        raise UnknownNameError("encoder with a network of its own", name, tuple(ENCODERS))
    return spec.build()


class SlidePatches:
    """The patches of all slides of a folder, batch by batch, as MONAI's engines take them.

    Args:
        dataset_dir: A slide, a folder with one DICOM slide, or a folder of slides.
        output_dir: Folder that gets the feature files.
        run: How slides are embedded.
    """

    def __init__(self, dataset_dir: str, output_dir: str, run: EmbeddingRun):
        folder = Path(dataset_dir)
        try:
            slides = find_slides(folder)
        except S4MilError as error:
            raise SystemExit(f"s4mil: {error}; give --dataset_dir FOLDER") from error
        names = name_outputs(slides, folder)
        self.output_dir = Path(output_dir)
        self.embedding = SlideEmbedding(
            {slide: self.output_dir / f"{name}.h5" for slide, name in names.items()}, run
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.embedding.batches():
            yield {"image": batch.patches, FEATURE_BATCH: batch}


class EncoderNetwork(nn.Module):
    """An encoder, whatever runs it, as the network of an engine: (B, 3, p, p) → (B, d)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self._encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        """Embed normalised patches."""
        return self._encoder.encode(image)


class FeatureFiles:
    """Ignite handler that gives each slide its feature file as soon as its last patch is embedded.

    Ends with ``embedding.json`` beside the files, which says what became of every slide.
    """

    def __init__(self, dataset: SlidePatches):
        self._dataset = dataset
        self._told = 0

    def attach(self, engine: Engine) -> None:
        """Listen to an engine."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_batch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._take)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self._started = time.perf_counter()

    def _start_batch(self, engine: Engine) -> None:
        self._batch_started = time.perf_counter()

    def _take(self, engine: Engine) -> None:
        batch = engine.state.batch[FEATURE_BATCH]  # type: ignore[index]
        batch.prepared.stages.add("encoding", time.perf_counter() - self._batch_started)
        self._dataset.embedding.take(batch, engine.state.output["pred"].numpy())  # type: ignore[index]
        self._tell()

    def _finish(self, engine: Engine) -> None:
        self._tell()
        embedding = self._dataset.embedding
        report = report_run(embedding.run, embedding.done, seconds=time.perf_counter() - self._started)
        write_embedding_report(report, self._dataset.output_dir / "embedding.json")

    def _tell(self) -> None:
        done = self._dataset.embedding.done
        for slide in done[self._told :]:
            level = logging.ERROR if slide.status == "failed" else logging.INFO
            logger.log(level, "%s: %s", Path(slide.slide).name, slide.reason or f"{slide.status}, {slide.file}")
        self._told = len(done)

    def leave(self) -> None:
        """Leave with exit code 1 if a slide failed; each was named before."""
        failed = sum(slide.status == "failed" for slide in self._dataset.embedding.done)
        if failed:
            raise SystemExit(f"s4mil: {failed} of {len(self._dataset.embedding.done)} slides failed")
