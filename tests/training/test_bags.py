"""Labels and features brought together."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from s4mil_monai.errors import FeatureFileError, TableError
from s4mil_monai.features.store import save_bag
from s4mil_monai.training.bags import StoredBag, as_items, find_slide_files, load_feature_bags
from s4mil_monai.training.ucsb import find_ucsb_breast, load_ucsb_breast
from tests.features.test_store import REAL_ORIGIN, make_bag


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


TWO_ROWS = "slide,label\na,1\nb,0\n"


def load_two(folder, first: dict, second: dict, **wanted):
    """Load slides a and b, whose features are alike but for these facts of their origins."""
    for slide, changes in (("a", first), ("b", second)):
        save_bag(folder / f"{slide}.h5", replace(make_bag(), origin=replace(REAL_ORIGIN, **changes)))
    return load_feature_bags(folder, table(folder, TWO_ROWS), **wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "other"}, r"different encoder: other for line 3 \(b\); resnet50_block3 for line 2 \(a\)"),
        ({"encoder_sha256": ""}, r"different encoder_sha256: unknown for line 3 \(b\); eee"),
        ({"scan_order": "unknown"}, r"different scan_order: row_major for line 2 \(a\); unknown for line 3 \(b\)"),
        ({"patch_side_px": 224}, "different patch_side_px: 224 for"),
        ({"overlap_px": 128}, r"different overlap_px: 0 for line 2 \(a\); 128 for line 3 \(b\); embed all alike"),
        ({"encoder_precision": "float16"}, "different encoder_precision: float16 for"),
        ({"min_tissue": 0.1}, "different min_tissue: 0.1 for"),
        ({"patch_mpp": 2.0}, r"different patch_mpp: 0\.5 for line 2 \(a\); 2 for line 3 \(b\)"),
    ],
)
def test_features_that_do_not_go_together_are_refused_with_their_rows(folder, changes, message):
    with pytest.raises(TableError, match=message):
        load_two(folder, {}, changes)


@pytest.mark.parametrize(
    ("first", "second", "side_px", "together"),
    [
        # for 0.5 µm/px, 1 % either side is 0.495 to 0.505
        (0.495, 0.505, 256, True),
        (0.494, 0.506, 256, False),
        # of 32 pixels, half a pixel of 0.5 µm/px is 0.0078: 0.4922 to 0.5078
        (0.4925, 0.5075, 32, True),
        (0.492, 0.509, 32, False),
        # what two slides have for 0.5 µm/px, and not for what the first one has
        (0.5, 0.5075, 256, True),
        (0.5, 0.512, 256, False),
    ],
)
def test_resolutions_go_together_as_far_as_one_setting_makes_both(folder, first, second, side_px, together):
    facts = [{"patch_mpp": mpp, "patch_side_px": side_px} for mpp in (first, second)]
    if together:
        assert len(load_two(folder, *facts)) == 2
        return
    with pytest.raises(TableError, match="different patch_mpp"):
        load_two(folder, *facts)


NOT_SAID = {"patch_mpp": -1.0, "overlap_px": -1, "min_tissue": -1.0, "encoder_precision": "unknown"}


@pytest.mark.parametrize("other", [NOT_SAID, {}])
def test_what_files_of_other_tools_do_not_say_keeps_no_features_out(folder, other):
    assert len(load_two(folder, NOT_SAID, other)) == 2
    wanted = {"mpp": 0.5, "side_px": 256, "overlap_px": 0, "scan_order": "row_major"}
    assert len(load_two(folder, NOT_SAID, other, patches=wanted)) == 2


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        ({"mpp": 0.25}, r"trained with patch_mpp 0\.25, and features have 0\.5 for line 2 \(a\), line 3 \(b\)"),
        ({"overlap_px": 64}, r"trained with overlap_px 64, and features have 0 for line 2 \(a\), line 3 \(b\)"),
        ({"scan_order": "hilbert"}, "trained with scan_order hilbert, and features have row_major for"),
        ({"side_px": 224}, "trained with patch_side_px 224, and features have 256 for"),
    ],
)
def test_features_of_other_patches_than_the_models_are_refused(folder, patches, message):
    fits = {"mpp": 0.497, "side_px": 256, "overlap_px": 0, "scan_order": "row_major", "count": 7}
    assert len(load_two(folder, {}, {}, patches=fits)) == 2
    with pytest.raises(TableError, match=message):
        load_two(folder, {}, {}, patches=fits | patches)


def test_features_of_another_encoder_than_asked_for_are_refused(folder):
    with pytest.raises(TableError, match="features are of x, wanted resnet50_block3"):
        load_feature_bags(folder, table(folder, "slide,label\na,1\nb,0\n"), encoder="resnet50_block3")


def test_ucsb_breast_has_58_slides_26_of_them_malignant():
    bags = load_ucsb_breast(find_ucsb_breast())
    lengths = [len(bag.features) for bag in bags]
    assert (len(bags), sum(bag.label for bag in bags)) == (58, 26)
    assert (min(lengths), max(lengths)) == (21, 40)
    assert {bag.features.shape[1] for bag in bags} == {708}


def test_missing_table_is_named(folder):
    with pytest.raises(TableError, match="cannot be read as CSV"):
        load_feature_bags(folder, folder / "gone.csv")
