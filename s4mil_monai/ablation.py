"""score_without(): what a slide's score would be, had some of its patches not been there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from s4mil_monai.errors import FeatureFileError, MisfitError, OutputError, PathError
from s4mil_monai.features.store import FeatureBag, load_bag
from s4mil_monai.models.bundle import Bundle
from s4mil_monai.result import SlideResult, read_result
from s4mil_monai.streaming.runtime import Runtime
from s4mil_monai.streaming.stream import SlideStream


@dataclass(frozen=True)
class ScoredSlide:
    """A result folder, read back."""

    result: SlideResult
    bag: FeatureBag


@dataclass(frozen=True)
class Ablation:
    """A slide's score with and without some patches."""

    left_out: int
    patches: int
    """Of the whole slide."""
    before: tuple[float, ...]
    """Probabilities of the classes."""
    after: tuple[float, ...]


class PatchChoiceError(PathError):
    """Patches to leave out that the slide does not have, or all it has."""


def read_scored(folder: Path, bundle: Bundle) -> ScoredSlide:
    """Read what ``s4mil score`` wrote.

    Raises:
        OutputError: There is no result with a score.
        FeatureFileError: The features are missing or damaged, or not those of the result.
        MisfitError: Another model scored it.
    """
    result = read_result(folder / "result.json")
    if not result.has_score or result.patches is None:
        raise OutputError(str(folder), f"holds a result without a score ({result.reason})")
    if result.model.sha256 != bundle.record.sha256:
        raise MisfitError(
            str(folder),
            "was scored with another model; give its bundle with --bundle",
            found=f"{result.model.bundle} {result.model.version}",
            wanted=f"{bundle.record.bundle} {bundle.record.version}",
        )
    bag = load_bag(folder / "features.h5")
    if bag.top_left_px0.tolist() != [list(corner) for corner in result.patches.top_left_px0]:
        raise FeatureFileError(str(folder / "features.h5"), "holds other patches than result.json; score it again")
    return ScoredSlide(result, bag)


def patches_in_region(scored: ScoredSlide, *, left: float, top: float, width: float, height: float) -> list[int]:
    """Indices of the patches that overlap a rectangle in level-0 pixels."""
    assert scored.result.patches is not None
    side = scored.result.patches.side_px0
    x, y = np.asarray(scored.bag.top_left_px0).T
    inside = (x < left + width) & (x + side > left) & (y < top + height) & (y + side > top)
    return np.flatnonzero(inside).tolist()


def top_patches(scored: ScoredSlide, count: int) -> list[int]:
    """Indices of the patches with the largest shares of the predicted class's logit."""
    return [patch.index for patch in scored.result.deciding_patches[:count]]


def score_without(scored: ScoredSlide, runtime: Runtime, patches: list[int], *, name: str) -> Ablation:
    """Score a slide again as if some patches had not been kept: the others close up, in their order.

    Args:
        scored: The slide.
        runtime: Of the model that scored it.
        patches: Indices in scan order; each counts once.
        name: What errors call the slide.

    Raises:
        PatchChoiceError: The slide does not have such a patch, none was chosen, or none would be left.
    """
    count = len(scored.bag.features)
    if not patches:
        raise PatchChoiceError(name, "no patch of it lies there; nothing to leave out")
    strange = [patch for patch in patches if not 0 <= patch < count]
    if strange:
        raise PatchChoiceError(name, f"has patches 0 to {count - 1}, not {strange[0]}")
    keep = np.ones(count, bool)
    keep[patches] = False
    if not keep.any():
        raise PatchChoiceError(
            name, f"all {count} patches would be left out; a slide without patches has no score"
        )
    return Ablation(
        left_out=int((~keep).sum()),
        patches=count,
        before=_score(scored.bag.features, runtime),
        after=_score(scored.bag.features[keep], runtime),
    )


def _score(features: NDArray[np.float32], runtime: Runtime) -> tuple[float, ...]:
    stream = SlideStream(runtime)
    stream.add(torch.from_numpy(np.ascontiguousarray(features)))
    return tuple(stream.finish().logits[0].softmax(0).tolist())
