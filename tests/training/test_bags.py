"""Labels and features brought together."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from s4mil_monai.errors import FeatureFileError, TableError
from s4mil_monai.features.store import save_bag
from s4mil_monai.training.bags import StoredBag, as_items, find_slide_files, load_feature_bags, read_label_table
from s4mil_monai.training.ucsb import find_ucsb_breast, load_ucsb_breast
from tests.features.test_store import make_bag


@pytest.fixture
def folder(tmp_path):
    for slide, n in (("a", 3), ("b", 5)):
        save_bag(tmp_path / f"{slide}.h5", make_bag(n))
    return tmp_path


def table(folder, text):
    (folder / "labels.csv").write_text(text)
    return folder / "labels.csv"


def test_bags_are_loaded_in_the_tables_order_with_their_labels(folder):
    bags = load_feature_bags(folder, table(folder, "slide,label,patient\nb,1,p1\na,0,p2\n"))
    assert [(bag.slide, bag.label, bag.patient, len(bag.features)) for bag in bags] == [
        ("b", 1, "p1", 5),
        ("a", 0, "p2", 3),
    ]


def test_stored_bag_has_the_length_of_the_loaded_one_and_a_file_without_features_is_named(folder):
    bag = StoredBag("a", folder / "a.h5", 1, "a")
    assert bag.length == bag.loaded().length == 3
    with h5py.File(folder / "b.h5", "a") as file:
        del file["features"]
    with pytest.raises(FeatureFileError, match=r"b\.h5: damaged or incomplete"):
        _ = StoredBag("b", folder / "b.h5", 0, "b").length


def test_items_are_channel_first(folder):
    bags = load_feature_bags(folder, table(folder, "slide,label\na,1\nb,0\n"))
    item = as_items(bags)[0]
    assert item["image"].shape == (3, 3)
    np.testing.assert_array_equal(item["image"].numpy(), bags[0].features.T)
    assert item["label"].item() == 1


def test_slide_names_stay_text(folder):
    assert read_label_table(table(folder, "slide,label\n007,1\n8,0\n")).iloc[0]["slide"] == "007"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,diagnosis\na,1\n", "lacks the column 'label'; it has slide, diagnosis"),
        ("slide,label\na,1\na,0\n", r"more: line 2 \(a\), line 3 \(a\)"),
        ("slide,label\na,tumour\nb,1\n", r"not for line 2 \(a: 'tumour'\)"),
        ("slide,label\na.svs,1\nb,0\n", r"no features .* line 2 \(a\.svs\); slides are named without ending"),
        ("slide,label\na,1\nc,0\n", r"no features in .* for line 3 \(c\)"),
    ],
)
def test_wrong_table_is_refused_with_the_rows(folder, text, message):
    with pytest.raises(TableError, match=message):
        load_feature_bags(folder, table(folder, text))


@pytest.fixture
def stored(folder):
    """Bag ``a`` of three patches, labelled by where they lie."""
    return StoredBag(
        "a", folder / "a.h5", 1, "p", "north", lambda corners, side: (corners[:, 0] > side).astype(int)
    )


def test_stored_bag_is_the_bag_in_memory_but_for_when_it_is_read(folder, stored):
    loaded = stored.loaded()
    np.testing.assert_array_equal(loaded.features, make_bag(3).features)
    for name in ("slide", "label", "patient", "site"):
        assert getattr(stored, name) == getattr(loaded, name)
    for name in ("features", "patch_labels", "top_left_px0"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(loaded, name))
    np.testing.assert_array_equal(loaded.patch_labels, loaded.top_left_px0[:, 0] > 0.5)


def test_stored_bag_reads_nothing_before_its_features_are_asked_for(tmp_path):
    bag = StoredBag("gone", tmp_path / "gone.h5", 0, "p")
    items = as_items([bag])
    assert (len(items), bag.label, bag.patch_labels) == (1, 0, None)
    with pytest.raises(FeatureFileError, match=r"gone\.h5: there is no such"):
        items[0]


def test_items_of_stored_bags_are_those_of_loaded_ones(stored):
    lazy, eager = as_items([stored, stored])[1:][0], as_items([stored.loaded()])[0]
    assert list(lazy) == list(eager) == ["image", "label", "slide", "patch_label"]
    for key in ("image", "label", "patch_label"):
        assert torch.equal(lazy[key], eager[key])


def test_items_have_patch_labels_only_where_they_are_known(folder):
    assert "patch_label" not in as_items(load_feature_bags(folder, table(folder, "slide,label\na,1\nb,0\n")))[0]


def test_file_of_a_slide_is_found_in_other_capitals_too_but_its_own_name_wins(tmp_path):
    for name in ("Tumor_001.xml", "b.xml", "B.xml", "b.json"):
        (tmp_path / name).touch()
    found = find_slide_files(["tumor_001", "b", "B", "c"], tmp_path, (".xml", ".json"))
    assert [path and path.name for path in found] == ["Tumor_001.xml", "b.xml", "B.xml", None]


def test_features_of_different_encoders_are_refused(folder):
    bag = make_bag()
    save_bag(folder / "b.h5", replace(bag, origin=replace(bag.origin, encoder="other")))
    with pytest.raises(TableError, match="embedded with different encoder: other, x"):
        load_feature_bags(folder, table(folder, "slide,label\na,1\nb,0\n"))


def test_features_of_another_encoder_than_asked_for_are_refused(folder):
    with pytest.raises(TableError, match="features are of x, wanted resnet50_block3"):
        load_feature_bags(folder, table(folder, "slide,label\na,1\nb,0\n"), encoder="resnet50_block3")


def test_ucsb_breast_has_58_slides_26_of_them_malignant():
    bags = load_ucsb_breast(find_ucsb_breast())
    lengths = [len(bag.features) for bag in bags]
    assert (len(bags), sum(bag.label for bag in bags)) == (58, 26)
    assert (min(lengths), max(lengths)) == (21, 40)
    assert {bag.features.shape[1] for bag in bags} == {708}


def test_missing_table_is_named(tmp_path):
    with pytest.raises(TableError, match="cannot be read as CSV"):
        read_label_table(tmp_path / "gone.csv")
