"""extract_features(): the patches of one slide in, one FeatureBag out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from s4mil_monai import __version__
from s4mil_monai.features.encoder import Encoder, EncoderSpec
from s4mil_monai.features.patch_stage import resolve_patch_stage
from s4mil_monai.features.patch_stream import PatchBatch, RegionBatch, ahead, check_damage, stream_patches
from s4mil_monai.features.prepare import PreparedSlide
from s4mil_monai.features.store import FeatureBag, FeatureOrigin
from s4mil_monai.result import QualityFinding, QualityRecord
from s4mil_monai.slides.damage import BLOCKS, ColourCheck
from s4mil_monai.slides.quality import combine

Progress = Callable[[int, int], None]
"""Called with patches done and patches in all."""

TakeFeatures = Callable[[Tensor], None]
"""Called with the (n, d) float32 features of the next sound patches, in scan order."""


@dataclass(frozen=True)
class Extraction:
    """What became of the patches of one slide."""

    prepared: PreparedSlide
    """The slide itself may be closed."""
    bag: FeatureBag
    quality: QualityRecord
    """With the finding ``damaged`` where patches were left out."""
    seconds: dict[str, float]
    """Busy seconds by stage, and ``total``."""


class BagBuilder:
    """Collects the features of one slide, batch by batch, and leaves damaged patches out."""

    def __init__(self, prepared: PreparedSlide, encoder: Encoder, *, patch_stage: str):
        self.prepared = prepared
        self._encoder = encoder
        self._patch_stage = resolve_patch_stage(
            patch_stage, encoder.device, patches=len(prepared.grid), shrunk=prepared.grid.plan.is_shrunk
        )
        self._features = np.empty((len(prepared.grid), encoder.spec.width), np.float32)
        self._sound = np.zeros(len(prepared.grid), bool)
        self._check = ColourCheck(prepared.tissue.overview, prepared.grid)

    def add(self, batch: PatchBatch, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Keep the (n, d) features of a batch; gives those of its sound patches.

        Raises:
            UnreadableSlideError: Too many patches are damaged.
        """
        part = slice(batch.start, batch.start + len(features))
        self._features[part] = features
        self._sound[part] = batch.sound
        if self._check.possible:
            colours = block_colours(batch.patches, self._encoder.spec)
            self._sound[part] &= ~self._check.disagreeing(batch.start, colours)
        check_damage(self.prepared, int((~self._sound[: part.stop]).sum()))
        return features[self._sound[part]]

    def finish(self) -> Extraction:
        """The bag of all sound patches."""
        damaged = int((~self._sound).sum())
        quality = combine(self.prepared.quality, *_damage_findings(damaged, len(self._sound)))
        return Extraction(
            self.prepared,
            FeatureBag(
                self._features[self._sound] if damaged else self._features,
                self.prepared.grid.top_left_px0[self._sound],
                self._origin(damaged, quality),
            ),
            quality,
            self.prepared.stages.report(),
        )

    def _origin(self, damaged: int, quality: QualityRecord) -> FeatureOrigin:
        slide, grid, encoder = self.prepared.slide, self.prepared.grid, self._encoder
        assert slide.resolution is not None
        return FeatureOrigin(
            slide=slide.name,
            slide_sha256=self.prepared.fingerprint.result(),
            slide_mpp=slide.mpp,
            slide_mpp_source=slide.resolution.source,
            backend=slide.backend,
            encoder=encoder.spec.name,
            encoder_sha256=encoder.fingerprint,
            patch_mpp=grid.plan.mpp,
            patch_side_px=grid.plan.patch_side_px,
            patch_side_px0=grid.plan.side_px0,
            patch_note=grid.plan.note or "",
            min_tissue=self.prepared.settings.min_tissue,
            scan_order=grid.scan_order,
            patch_stage=self._patch_stage,
            software=f"s4mil_monai {__version__}",
            overlap_px=self.prepared.settings.overlap_px,
            encoder_runtime=encoder.runtime,
            encoder_precision=encoder.precision,
            damaged_patches=damaged,
            quality=quality.verdict,
        )


def recall(prepared: PreparedSlide, bag: FeatureBag) -> Extraction:
    """The extraction of features that were kept from an earlier one of the same slide."""
    damaged = bag.origin.damaged_patches
    quality = combine(prepared.quality, *_damage_findings(damaged, damaged + len(bag)))
    return Extraction(prepared, bag, quality, prepared.stages.report())


def _damage_findings(damaged: int, patches: int) -> tuple[QualityFinding, ...]:
    if damaged == 0:
        return ()
    text = f"{damaged} of {patches} patches were left out: they do not decode, or differ from the coarser levels"
    return (QualityFinding(code="damaged", verdict="warn", value=damaged / patches, limit=0.0, text=text),)


@torch.inference_mode()
def block_colours(patches: Tensor, spec: EncoderSpec) -> NDArray[np.float32]:
    """(n, 3, p, p) normalised patches → (n, 3, 4, 4) mean RGB of their blocks, of 255."""
    means = F.adaptive_avg_pool2d(patches, BLOCKS).float().cpu()
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.deviation))
    return ((means * deviation + mean) * 255).numpy()


def extract_features(
    prepared: PreparedSlide,
    encoder: Encoder,
    *,
    patch_stage: str = "torch",
    batch_size: int = 16,
    progress: Progress | None = None,
    take: TakeFeatures | None = None,
    read: Iterator[RegionBatch] | None = None,
) -> Extraction:
    """Embed every patch of one prepared slide.

    Args:
        prepared: The slide, still open.
        encoder: What turns a patch into features.
        patch_stage: Form of the patch batches: ``torch``, ``dali`` or ``auto``.
        batch_size: Patches a step.
        progress: Told after each batch.
        take: Given the features batch by batch, while the next patches are still being read.
        read: As in :func:`stream_patches`.

    Raises:
        UnreadableSlideError: Too many patches are damaged.
        UnknownNameError: No such patch stage.
    """
    builder = BagBuilder(prepared, encoder, patch_stage=patch_stage)
    batches = stream_patches(
        prepared, encoder.spec, device=encoder.device, patch_stage=patch_stage, batch_size=batch_size, read=read
    )
    for batch in batches if encoder.device.type == "cpu" else ahead(batches):
        with prepared.stages.timed("encoding"):
            features = encoder.encode(batch.patches).numpy()
        sound = builder.add(batch, features)
        if take is not None:
            take(torch.from_numpy(sound))
        if progress is not None:
            progress(batch.start + len(features), len(prepared.grid))
    return builder.finish()
