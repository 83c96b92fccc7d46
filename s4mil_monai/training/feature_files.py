"""Feature files of a folder as MONAI's dictionaries, for inference without labels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform

from s4mil_monai.errors import FeatureFileError
from s4mil_monai.features.store import load_bag
from s4mil_monai.training.origins import has_patch_mpp


def find_feature_items(folder: str | Path) -> list[dict[str, str]]:
    """One item for each ``.h5`` file of a folder: its path as ``image``, its name without ending as ``slide``.

    Raises:
        FeatureFileError: There are none.
    """
    paths = sorted(Path(folder).glob("*.h5"))
    if not paths:
        raise FeatureFileError(str(folder), "holds no feature files (.h5); make them with: s4mil embed")
    return [{"image": str(path), "slide": path.stem} for path in paths]


class LoadFeaturesd(MapTransform):
    """Loads a feature file as a channel-first (D, L) tensor.

    Args:
        keys: Items that hold a path.
        encoder: Name, ``sha256`` and ``width`` of the encoder the model was trained with; others are refused.
        patches: ``mpp``, ``side_px``, ``overlap_px`` and ``scan_order`` of its patches, as far as given.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        encoder: Mapping[str, Any] | None = None,
        patches: Mapping[str, Any] | None = None,
    ):
        super().__init__(keys)
        self.encoder, self.patches = dict(encoder or {}), dict(patches or {})

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load.

        Raises:
            FeatureFileError: A file is damaged, or of another encoder or other patches.
        """
        found = dict(data)
        for key in self.key_iterator(found):
            found[key] = self._load(Path(found[key]))
        return found

    def _load(self, path: Path) -> torch.Tensor:
        bag = load_bag(path)
        origin = bag.origin
        has = {
            "encoder": (origin.encoder, self.encoder.get("name")),
            "weights of the encoder": (origin.encoder_sha256, self.encoder.get("sha256")),
            "number of features": (bag.features.shape[1], self.encoder.get("width")),
            "side of the patches": (origin.patch_side_px, self.patches.get("side_px")),
            "overlap of the patches": (origin.overlap_px, self.patches.get("overlap_px")),
            "scan order": (origin.scan_order, self.patches.get("scan_order")),
        }
        mpp = self.patches.get("mpp")
        if mpp is not None and not has_patch_mpp(origin, mpp):
            has["µm/px of the patches"] = (origin.patch_mpp, mpp)
        for what, (found, wanted) in has.items():
            if wanted is not None and found != wanted:
                raise FeatureFileError(str(path), f"{what}: {found}; the model was trained with {wanted}")
        return torch.from_numpy(np.ascontiguousarray(bag.features.T, np.float32))
