"""Bags of real slides for the parity gate."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from s4mil_monai.errors import FeatureFileError
from s4mil_monai.features.store import FeatureBag, load_bag
from s4mil_monai.models.bundle import Bundle


def load_real_bags(features: Path, bundle: Bundle) -> list[Tensor]:
    """Features of all feature files of a folder.

    Args:
        features: Folder with ``.h5`` files.
        bundle: What they have to fit.

    Raises:
        FeatureFileError: A file is damaged or of another encoder, or the folder has none.
    """
    found = sorted(features.glob("*.h5"))
    if not found:
        raise FeatureFileError(str(features), "holds no feature files; make them with s4mil embed")
    return [torch.from_numpy(_load(path, bundle).features) for path in found]


def _load(path: Path, bundle: Bundle) -> FeatureBag:
    bag, wanted = load_bag(path), bundle.settings.encoder
    if bag.origin.encoder_sha256 != wanted.sha256:
        raise FeatureFileError(
            str(path), f"holds features of {bag.origin.encoder}, the bundle was trained on {wanted.name}"
        )
    return bag
