"""Labels and features brought together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from s4mil_monai.errors import TableError
from s4mil_monai.features.store import save_bag
from s4mil_monai.training.bags import as_items, load_feature_bags, read_label_table
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


def test_items_are_channel_first(folder):
    bags = load_feature_bags(folder, table(folder, "slide,label\na,1\nb,0\n"))
    item = as_items(bags)[0]
    assert item["image"].shape == (3, 3)
    np.testing.assert_array_equal(item["image"].numpy(), bags[0].features.T)
    assert item["label"].item() == 1


def test_slide_names_stay_text(folder):
    assert read_label_table(table(folder, "slide,label\n007,1\n")).iloc[0]["slide"] == "007"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,diagnosis\na,1\n", "lacks the column 'label'; it has slide, diagnosis"),
        ("slide,label\na,1\na,0\n", "names twice a"),
        ("slide,label\na,tumour\nb,1\n", "not for a"),
        ("slide,label\na,1\nc,0\n", r"no features in .* for c\.h5"),
    ],
)
def test_wrong_table_is_refused_with_the_rows(folder, text, message):
    with pytest.raises(TableError, match=message):
        load_feature_bags(folder, table(folder, text))


def test_features_of_different_encoders_are_refused(folder):
    bag = make_bag()
    save_bag(folder / "b.h5", replace(bag, origin=replace(bag.origin, encoder="other")))
    with pytest.raises(TableError, match="embedded with different encoder: other, x"):
        load_feature_bags(folder, table(folder, "slide,label\na,1\nb,0\n"))


def test_features_of_another_encoder_than_asked_for_are_refused(folder):
    with pytest.raises(TableError, match="features are of x, wanted resnet50_block3"):
        load_feature_bags(folder, table(folder, "slide,label\na,1\n"), encoder="resnet50_block3")


def test_ucsb_breast_has_58_slides_26_of_them_malignant():
    bags = load_ucsb_breast(find_ucsb_breast())
    lengths = [len(bag.features) for bag in bags]
    assert (len(bags), sum(bag.label for bag in bags)) == (58, 26)
    assert (min(lengths), max(lengths)) == (21, 40)
    assert {bag.features.shape[1] for bag in bags} == {708}


def test_missing_table_is_named(tmp_path):
    with pytest.raises(TableError, match="cannot be read as CSV"):
        read_label_table(tmp_path / "gone.csv")
