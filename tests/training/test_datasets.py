"""Data sets: the declared ones can be read, and each kind gives labelled bags by the same call."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely

from s4mil_monai.errors import FeatureFileError, TableError
from s4mil_monai.features.store import FeatureBag, save_bag
from s4mil_monai.training.annotations import AnnotationError
from s4mil_monai.training.datasets import DatasetSettingsError, load_dataset, load_table, read_dataset
from s4mil_monai.training.folds import make_folds, read_folds
from tests.features.test_store import REAL_ORIGIN, make_real_bag
from tests.training.test_annotations import asap
from tests.training.test_composed import stained

DECLARED = sorted((Path(__file__).parents[2] / "configs" / "datasets").glob("*.yaml"))

OWN = {"name": "own", "label_table": "labels.csv", "feature_folder": "features", "classes": ["normal", "tumour"]}


def store(folder: Path, *slides: str, patches: int = 4) -> None:
    """Features of 1 x ``patches`` patches of 512 level-0 pixels, side by side from (0, 0)."""
    for slide in slides:
        save_bag(folder / f"{slide}.h5", make_real_bag(patches))


@pytest.fixture
def own(tmp_path):
    """Four slides; of tumor_1 the right half is drawn as tumour."""
    store(tmp_path / "features", "normal_1", "normal_2", "tumor_1", "tumor_2")
    (tmp_path / "labels.csv").write_text(
        "slide,label,patient,site\nnormal_1,normal,p,north\ntumor_1,tumour,q,south\n"
        "tumor_2,tumour,r,south\nnormal_2,normal,s,north\n"
    )
    (tmp_path / "annotations").mkdir()
    right = [(1024, 0), (2048, 0), (2048, 512), (1024, 512)]
    (tmp_path / "annotations" / "Tumor_1.xml").write_text(asap(("Tumor", right)))
    return tmp_path


def settings(folder: Path, **changes):
    return read_dataset({**OWN, "data_folder": folder}, **changes)


# Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DECLARED, ids=lambda path: path.stem)
def test_declared_data_sets_can_be_read_and_are_named_as_their_files(path):
    assert read_dataset(path).name == path.stem


def test_every_data_set_of_the_paper_is_declared_with_its_weight_decay():
    decays = {path.stem: read_dataset(path).weight_decay for path in DECLARED}
    assert decays["camelyon16"] == 1e-3
    assert decays["tcga_luad_tp53"] == decays["tcga_rcc"] == 1e-4
    assert {"ucsb_breast", "composed_colon", "own"} <= set(decays)


def test_settings_can_be_changed_when_they_are_read(tmp_path):
    changed = read_dataset(DECLARED[0], data_folder=tmp_path)
    assert changed.place(Path("labels.csv")) == tmp_path / "labels.csv"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decai": 1}, "weight_decai: Extra inputs"),
        ({"min_share": 0}, "min_share: Input should be greater than 0"),
        ({"classes": ["one"]}, "classes: "),
        ({"kind": "bag"}, "kind: Input should be 'table'"),
        ({"feature_folder": None}, "kind table wants label_table and feature_folder"),
        ({"metadata_table": "m.csv"}, "kind table has no use for metadata_table"),
        (
            {"kind": "composed_colon", "feature_folder": None, "label_table": None},
            "want the file of tile features",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changes, message):
    with pytest.raises(DatasetSettingsError, match=message) as caught:
        read_dataset(OWN, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [("- 1", "is no table"), ("a: [", "is not YAML")])
def test_file_that_is_no_table_of_settings_is_refused(tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(DatasetSettingsError, match=message):
        read_dataset(tmp_path / "x.yaml")
    with pytest.raises(DatasetSettingsError, match="cannot be read"):
        read_dataset(tmp_path / "gone.yaml")


# A table and feature files ------------------------------------------------------------------------------------


def test_own_slides_have_labels_patients_sites_and_features(own):
    dataset = load_dataset(settings(own))
    found = [(bag.slide, bag.label, bag.patient, bag.site) for bag in dataset.bags]
    assert found[:2] == [("normal_1", 0, "p", "north"), ("tumor_1", 1, "q", "south")]
    np.testing.assert_array_equal(dataset.bags[0].features, make_real_bag(4).features)
    assert dataset.bags[0].patch_labels is None  # no annotations are named


def test_patches_are_labelled_where_that_is_known(own):
    dataset = load_dataset(settings(own, annotations_folder="annotations", negative_classes=["normal"]))
    labels = {bag.slide: bag.patch_labels for bag in dataset.bags}
    assert labels["tumor_1"].tolist() == [0, 0, 1, 1]
    assert labels["tumor_2"] is None
    assert labels["normal_1"].tolist() == [0, 0, 0, 0]


def test_unmarked_patches_of_partly_annotated_slides_are_unknown(own):
    dataset = load_dataset(settings(own, annotations_folder="annotations", partly_annotated=["tumor_1"]))
    assert dataset.bags[1].patch_labels.tolist() == [-1, -1, 1, 1]
    assert dataset.bags[0].patch_labels is None  # normal is not declared to be negative


def test_share_that_makes_a_patch_positive_is_a_setting(own):
    quarter = [(512, 0), (768, 0), (768, 256), (512, 256)]
    (own / "annotations" / "tumor_2.xml").write_text(asap(("Tumor", quarter)))
    assert load_dataset(settings(own, annotations_folder="annotations")).bags[2].patch_labels.sum() == 0
    looser = settings(own, annotations_folder="annotations", min_share=0.25)
    assert load_dataset(looser).bags[2].patch_labels.tolist() == [0, 1, 0, 0]


def test_slides_kept_for_testing_are_named_by_a_table(own):
    (own / "test.csv").write_text("slide\ntumor_2\nnormal_2\n")
    assert load_dataset(settings(own, test_table="test.csv")).table.test_slides == ("tumor_2", "normal_2")


def test_fold_of_a_data_set_is_a_split_that_training_takes(own):
    (own / "folds.csv").write_text(
        "slide,fold,part\nnormal_1,0,train\ntumor_1,0,train\nnormal_2,0,validation\ntumor_2,0,validation\n"
    )
    dataset = load_dataset(settings(own, annotations_folder="annotations"))
    split = dataset.split(read_folds(own / "folds.csv", dataset.table), 0)
    assert (split.classes, split.in_features) == (2, 3)
    item = split.train_items[1]
    assert (item["slide"], item["image"].shape) == ("tumor_1", (3, 4))
    assert item["patch_label"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative_classes": ["norml"]}, "negative_classes: the table has no norml"),
        ({"partly_annotated": ["tumor_9"]}, "partly_annotated: the table has no tumor_9"),
    ],
)
def test_misspelled_class_or_slide_is_refused(own, changes, message):
    with pytest.raises(DatasetSettingsError, match=message):
        load_dataset(settings(own, **changes))


def test_folder_without_any_annotation_of_the_slides_is_refused(own):
    with pytest.raises(TableError, match="none of its slides has annotations in"):
        load_dataset(settings(own, annotations_folder="features"))


def test_slides_without_features_are_refused_with_their_rows(own):
    (own / "features" / "tumor_2.h5").unlink()
    with pytest.raises(TableError, match=r"no features in .*features for line 4 \(tumor_2\)"):
        load_dataset(settings(own))


def test_features_of_two_encoders_are_refused(own):
    bag = make_real_bag(4)
    save_bag(own / "features" / "tumor_2.h5", replace(bag, origin=replace(REAL_ORIGIN, encoder="other")))
    with pytest.raises(TableError, match=r"different encoder: other for line 4 \(tumor_2\)"):
        load_dataset(settings(own))


def test_damage_is_found_when_a_slide_is_read(own):
    dataset = load_dataset(settings(own, annotations_folder="annotations"))
    (own / "annotations" / "Tumor_1.xml").write_text("<")
    with pytest.raises(AnnotationError, match=r"Tumor_1\.xml: is no XML of ASAP"):
        _ = dataset.bags[1].patch_labels
    (own / "features" / "tumor_1.h5").write_bytes(b"no HDF5")
    with pytest.raises(FeatureFileError, match=r"tumor_1\.h5: damaged"):
        _ = dataset.bags[1].features


# The public ones ----------------------------------------------------------------------------------------------


def test_camelyon16_is_loaded_with_lesions_of_the_real_annotations(shared, tmp_path):
    labels = shared / "labels"
    (tmp_path / "labels.csv").write_text(
        "filenames,tumor\nnormal_001.tif.npy,False\ntumor_001.tif.npy,True\ntumor_002.tif.npy,True\n"
        "test_001.tif.npy,True\ntest_003.tif.npy,False\n"
    )
    store(tmp_path / "features", "normal_001", "tumor_002", "test_001", "test_003")
    # A patch in the middle of the widest place of each lesion, which the JSON has too, and one far away.
    shapes = json.loads((shared / "annotations" / "Tumor_001.json").read_text())["positive"]
    circles = [shapely.maximum_inscribed_circle(shapely.Polygon(shape["vertices"]).buffer(0)) for shape in shapes]
    middles = [circle.coords[0] for circle in circles]
    corners = np.array([*(np.array(middles) - 256), (0, 0)]).astype(np.int64)
    save_bag(
        tmp_path / "features" / "tumor_001.h5",
        FeatureBag(np.zeros((3, 3), np.float32), corners, REAL_ORIGIN),
    )
    dataset = load_dataset(
        read_dataset(
            DECLARED[0],
            data_folder=tmp_path,
            metadata_table=labels / "camelyon16_metadata.csv",
            test_table=labels / "camelyon16_test_reference.csv",
            annotations_folder=shared / "annotations",
        )
    )
    bags = {bag.slide: bag for bag in dataset.bags}
    assert bags["tumor_001"].patch_labels.tolist() == [1, 1, 0]
    assert bags["tumor_002"].patch_labels is None
    assert bags["normal_001"].patch_labels.sum() == 0
    assert bags["test_003"].site.startswith("hospital")
    assert dataset.table.test_slides == ("test_001", "test_003")


def test_luad_table_is_read_as_declared(shared):
    declared = read_dataset(
        DECLARED[0].with_name("tcga_luad_tp53.yaml"), label_table=shared / "labels" / "tcga_luad_genes.csv"
    )
    table = load_table(declared)
    assert (len(table), table.classes) == (529, ("wild type", "mutated"))


def test_ucsb_breast_is_loaded_as_declared_and_standardised_when_split():
    dataset = load_dataset(read_dataset(DECLARED[0].with_name("ucsb_breast.yaml")))
    assert dataset.table.counts() == {"benign": 32, "malignant": 26}
    split = dataset.split(make_folds(dataset.table, folds=10), 0)
    assert len(split.train) + len(split.validation) + len(split.test) == 58
    patches = np.concatenate([bag.features for bag in split.train])
    np.testing.assert_allclose(patches.mean(0), 0, atol=1e-4)


@pytest.mark.parametrize("form", ["composed_colon", "composed_colon_hard", "composed_colon_random"])
def test_composed_bags_come_with_their_parts(tmp_path, form):
    tile = stained()
    np.savez(tmp_path / "tiles.npz", features=tile.features, labels=tile.labels, colours=tile.colours)
    declared = DECLARED[0].with_name(f"{form}.yaml")
    dataset = load_dataset(read_dataset(declared, data_folder=tmp_path, bags=(6, 4, 8)))
    assert dataset.folds is not None
    split = dataset.split(dataset.folds, 0)
    assert (len(split.train), len(split.validation), len(split.test)) == (6, 4, 8)
    assert dataset.table.counts() == {"healthy": 9, "adenocarcinoma": 9}
    assert {bag.patch_labels.any() for bag in split.test if bag.label == 1} == {True}
    train, test = (set(part[0].tiles.features[:, 0]) for part in (split.train, split.test))  # numbers of stains
    assert train.isdisjoint(test) == (form != "composed_colon_random")
