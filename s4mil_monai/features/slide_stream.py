"""stream_all(): many slides as one stream of patches, so that the encoder does not pause between them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from s4mil_monai.errors import SlideError
from s4mil_monai.features.encoder import Encoder, EncoderSpec
from s4mil_monai.features.extract import BagBuilder, Extraction
from s4mil_monai.features.patch_stream import PatchBatch, ahead, stream_patches
from s4mil_monai.features.prepare import PreparedSlide, prepare_slide
from s4mil_monai.result import PatchSettings
from s4mil_monai.slides.slide import Slide
from s4mil_monai.timing import Stages


@dataclass(frozen=True)
class Failure:
    """A slide without features."""

    path: Path
    error: SlideError


def stream_all(
    paths: Iterable[Path],
    open_path: Callable[[Path], Slide],
    spec: EncoderSpec,
    settings: PatchSettings,
    *,
    device: torch.device,
    patch_stage: str,
    batch_size: int,
) -> Iterator[PatchBatch | Failure]:
    """Give the prepared patches of many slides, batch by batch; one that fails does not stop the others.

    On a GPU the next slide is opened, looked over and read while this one is still being encoded.

    Args:
        paths: Of the slides.
        open_path: Opens one of them; raises a :class:`SlideError` where it cannot.
        spec: Of the encoder.
        settings: Which patches.
        device: Where the encoder runs.
        patch_stage: Form of the patch batches: ``torch``, ``dali`` or ``auto``.
        batch_size: Patches in a batch.
    """

    def prepare() -> Iterator[PreparedSlide | Failure]:
        for path in paths:
            yield _prepare(path, open_path, settings)

    def batches() -> Iterator[PatchBatch | Failure]:
        for prepared in prepare() if device.type == "cpu" else ahead(prepare()):
            if isinstance(prepared, Failure):
                yield prepared
            else:
                yield from _stream(prepared, spec, device=device, patch_stage=patch_stage, batch_size=batch_size)

    return batches() if device.type == "cpu" else ahead(batches())


def _prepare(path: Path, open_path: Callable[[Path], Slide], settings: PatchSettings) -> PreparedSlide | Failure:
    stages = Stages()
    try:
        with stages.timed("opening"):
            slide = open_path(path)
    except SlideError as error:
        return Failure(path, error)
    try:
        return prepare_slide(slide, settings, stages=stages)
    except SlideError as error:
        slide.close()
        return Failure(path, error)


def _stream(
    prepared: PreparedSlide, spec: EncoderSpec, *, device: torch.device, patch_stage: str, batch_size: int
) -> Generator[PatchBatch | Failure, None, None]:
    """The batches of one slide; a failure in the middle ends them. The slide is closed."""
    with prepared.slide:
        try:
            yield from stream_patches(
                prepared, spec, device=device, patch_stage=patch_stage, batch_size=batch_size
            )
        except SlideError as error:
            yield Failure(prepared.slide.path, error)


class Collector:
    """Turns the features of a stream of batches of many slides into one outcome a slide."""

    def __init__(self, encoder: Encoder, *, patch_stage: str):
        self._encoder = encoder
        self._patch_stage = patch_stage
        self._builder: BagBuilder | None = None
        self._given_up: Path | None = None

    def has_given_up(self, path: Path) -> bool:
        """Whether a slide has failed already, so that the rest of its patches is of no use."""
        return path == self._given_up

    def add(self, batch: PatchBatch, features: NDArray[np.float32]) -> Extraction | Failure | None:
        """Take the (n, d) features of a batch; the outcome of its slide, if that is decided now."""
        if self._builder is None or self._builder.prepared is not batch.prepared:
            self._builder = BagBuilder(batch.prepared, self._encoder, patch_stage=self._patch_stage)
        try:
            self._builder.add(batch, features)
        except SlideError as error:
            self._given_up = batch.prepared.slide.path
            return Failure(batch.prepared.slide.path, error)
        return self._builder.finish() if batch.is_last else None
