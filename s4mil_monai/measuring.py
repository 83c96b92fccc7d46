"""measure_slide(): the numbers of a scored slide that are watched for drift."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from s4mil_monai.features.store import FeatureBag
from s4mil_monai.measures import SlideMeasures
from s4mil_monai.result import SlideResult
from s4mil_monai.slides.stain import measure_stain
from s4mil_monai.slides.tissue import TissueMask


def measure_slide(tissue: TissueMask, bag: FeatureBag, result: SlideResult) -> SlideMeasures:
    """Measure a scored slide from what scoring has in memory; no pixel is read again.

    Args:
        tissue: Of the slide, with its overview.
        bag: Its features, (n, d) with n of at least 1.
        result: Its score.

    Raises:
        ValueError: The result has no score, as of a slide without tissue.
    """
    if not result.has_score:
        raise ValueError(f"only slides with a score are measured, this one is {result.status}")
    quality = result.quality.measured if result.quality is not None else {}
    return SlideMeasures(
        **asdict(measure_stain(tissue)),
        sharpness=quality.get("sharpness"),
        patches=len(bag),
        **_measure_features(bag.features),
        **_measure_scores(result),
    )


def _measure_features(features: NDArray[np.float32]) -> dict[str, float]:
    """Over (n, d) features, with no second array of their size."""
    squared_norms = np.einsum("ij,ij->i", features, features).astype(np.float64)
    mean_patch = features.mean(axis=0, dtype=np.float64)
    mean = float(mean_patch.mean())
    variance = float(squared_norms.mean()) / features.shape[1] - mean**2
    mean_norm = float(np.sqrt(squared_norms).mean())
    return {
        "feature_mean": mean,
        "feature_deviation": max(variance, 0.0) ** 0.5,
        "feature_zero_share": 1 - np.count_nonzero(features) / features.size,
        # Above 1 by rounding only, where all patches are the same.
        "feature_likeness": min(1.0, float(np.linalg.norm(mean_patch)) / mean_norm) if mean_norm > 0 else 1.0,
    }


def _measure_scores(result: SlideResult) -> dict[str, float]:
    assert result.probabilities is not None
    assert result.patches is not None
    assert result.predicted is not None
    predicted = result.classes.index(result.predicted)
    shares = np.abs([patch.contributions[predicted] for patch in result.deciding_patches])
    probable = np.array(result.patches.probabilities)[:, -1] > 0.5
    return {
        # Softmax in float32 may give a hair more than 1.
        "score": min(1.0, result.probabilities[-1]),
        "top_share": float(shares.max() / shares.sum()) if shares.any() else 0.0,
        "probable_patches": float(probable.mean()),
    }
