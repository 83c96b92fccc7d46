"""What happens to a training bag before the network sees it; noise is MONAI's ``RandGaussianNoised``."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform, Randomizable, Transform

from s4mil_monai.training.objective import UNKNOWN


class RandPatchDropoutd(MapTransform, Randomizable):
    """Leave out patches of a bag at random; those that stay keep their order, and one always stays.

    A positive bag may lose all its positive patches: keep the share small where findings are.

    Args:
        keys: Items whose last axis counts the patches, such as ``image`` (D, L) and ``patch_label`` (L,).
        share: Probability of each patch to be left out, in [0, 1).
        allow_missing_keys: Bags may lack a key, as those without patch labels do.

    Raises:
        ValueError: ``share`` is not in [0, 1).
    """

    def __init__(self, keys: KeysCollection, *, share: float, allow_missing_keys: bool = True):
        super().__init__(keys, allow_missing_keys)
        if not 0 <= share < 1:
            raise ValueError(f"share of patches to leave out is in [0, 1), got {share}")
        self.share = share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Take the same patches from every item."""
        found = dict(data)
        if self.share == 0:
            return found
        kept: np.ndarray | None = None
        for key in self.key_iterator(found):
            if kept is None:
                kept = self._choose(found[key].shape[-1])
            found[key] = found[key][..., kept]
        return found

    def _choose(self, patches: int) -> np.ndarray:
        kept = np.flatnonzero(self.R.random(patches) >= self.share)
        return kept if len(kept) else np.array([self.R.randint(patches)])


class FillPatchLabels(Transform):
    """Gives bags without patch labels some that say so: ``patch_label`` (L,) of :data:`UNKNOWN`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Leave those that are there as they are."""
        unknown = torch.full((data["image"].shape[-1],), UNKNOWN)
        return {"patch_label": unknown, **data}
