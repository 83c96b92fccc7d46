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
        ({"encoder": "other"}, "encoder: other; the model was trained with x"),
        ({"scan_order": "column_major"}, "scan order: column_major; the model was trained with x"),
    ],
)
def test_features_the_model_was_not_trained_for_are_refused(tmp_path, origin, message):
    bag = make_bag(5, 4)
    wanted = {
        "encoder": {"name": bag.origin.encoder, "width": 4},
        "patches": {"scan_order": bag.origin.scan_order},
    }
    save_bag(tmp_path / "a.h5", replace(bag, origin=replace(bag.origin, **origin)))
    with pytest.raises(FeatureFileError, match=message):
        LoadFeaturesd("image", **wanted)(find_feature_items(tmp_path)[0])
