"""Feature files as MONAI reads them, and only those the model was trained for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from s4mil_monai.errors import FeatureFileError
from s4mil_monai.features.store import save_bag
from s4mil_monai.training.feature_files import LoadFeaturesd, find_feature_items
from tests.features.test_store import make_bag


def test_every_file_of_a_folder_is_an_item_channel_first(tmp_path):
    bag = make_bag(5, 4)
    for name in ("b", "a"):
        save_bag(tmp_path / f"{name}.h5", bag)
    items = find_feature_items(tmp_path)
    assert [item["slide"] for item in items] == ["a", "b"]
    loaded = LoadFeaturesd("image")(items[0])
    np.testing.assert_array_equal(loaded["image"].numpy(), bag.features.T)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(FeatureFileError, match="holds no feature files"):
        find_feature_items(tmp_path)


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({"encoder": "other"}, "trained with: encoder: other, wanted x"),
        ({"patch_mpp": 0.45, "slide_mpp": 0.25}, "patch resolution in µm/px: 0.45, wanted 0.5"),
        ({"patch_side_px": 224}, "patch side in px: 224, wanted 256"),
        ({"overlap_px": 64}, "overlap in px: 64, wanted 256"),
        ({"scan_order": "column_major"}, "scan order: column_major, wanted x"),
    ],
)
def test_features_the_model_was_not_trained_for_are_refused(tmp_path, origin, message):
    bag = make_bag(5, 4)
    wanted = {
        "encoder": {"name": bag.origin.encoder, "width": 4},
        "patches": {"mpp": 0.5, "side_px": 256, "overlap_px": 256, "scan_order": bag.origin.scan_order},
    }
    save_bag(tmp_path / "a.h5", replace(bag, origin=replace(bag.origin, **origin)))
    with pytest.raises(FeatureFileError, match=message):
        LoadFeaturesd("image", **wanted)(find_feature_items(tmp_path)[0])


def test_features_of_another_width_are_refused(tmp_path):
    save_bag(tmp_path / "a.h5", make_bag(5, 4))
    with pytest.raises(FeatureFileError, match="number of features: 4, the model wants 8"):
        LoadFeaturesd("image", encoder={"width": 8})(find_feature_items(tmp_path)[0])


def test_a_slide_of_0_499_has_the_features_of_a_model_trained_at_0_5(tmp_path):
    """No whole number of its pixels is 128 µm; and what ran the encoder, a model does not mind."""
    bag = make_bag(5, 4)
    of_the_slide = {"slide_mpp": 0.499, "patch_mpp": 0.499, "encoder_runtime": "onnxruntime"}
    save_bag(tmp_path / "a.h5", replace(bag, origin=replace(bag.origin, **of_the_slide)))
    wanted = {"mpp": 0.5, "side_px": 256, "min_tissue": 0.3, "overlap_px": 256, "scan_order": "x"}
    loaded = LoadFeaturesd("image", patches=wanted)(find_feature_items(tmp_path)[0])
    assert loaded["image"].shape == (4, 5)
