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
from s4mil_monai.features.store import FeatureOrigin, WantedFeatures, load_bag, mismatch
from s4mil_monai.result import PatchSettings


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
        patches: ``mpp``, ``side_px``, ``overlap_px`` and ``scan_order`` of its patches, as far as given. The
            resolution may be as far off as patches of a whole number of the slide's pixels make it.
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
        width, wanted_width = bag.features.shape[1], self.encoder.get("width")
        if wanted_width is not None and width != wanted_width:
            raise FeatureFileError(str(path), f"number of features: {width}, the model wants {wanted_width}")
        problem = mismatch(bag.origin, self._wanted_of(bag.origin))
        if problem is not None:
            raise FeatureFileError(str(path), f"is of another kind than the model was trained with: {problem}")
        return torch.from_numpy(np.ascontiguousarray(bag.features.T, np.float32))

    def _wanted_of(self, origin: FeatureOrigin) -> WantedFeatures:
        """What the model wants; where it does not say, or does not mind, what the file has."""
        patches = {name: self.patches.get(name, there) for name, there in _patches_of(origin).items()}
        return WantedFeatures(
            encoder=self.encoder.get("name", origin.encoder),
            encoder_sha256=self.encoder.get("sha256", origin.encoder_sha256),
            settings=PatchSettings.model_construct(min_tissue=origin.min_tissue, **patches),
            encoder_runtime=origin.encoder_runtime,
            encoder_precision=origin.encoder_precision,
        )


def _patches_of(origin: FeatureOrigin) -> dict[str, Any]:
    return {
        "mpp": origin.patch_mpp,
        "side_px": origin.patch_side_px,
        "overlap_px": origin.overlap_px,
        "scan_order": origin.scan_order,
    }
