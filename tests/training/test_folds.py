"""Folds that keep patients and sites together, are saved and reread, and come from others."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from s4mil_monai.errors import OutputError, TableError
from s4mil_monai.training.bags import LabelledBag, StoredBag
from s4mil_monai.training.folds import (
    Fold,
    Folds,
    import_published_folds,
    make_folds,
    read_folds,
    save_folds,
)
from s4mil_monai.training.labels import SlideTable, read_camelyon16, read_tcga_genes


def make_table(patients: list[tuple], *, test: tuple[str, ...] = ()) -> SlideTable:
    """A table of patients, each given by the labels of the slides and, optionally, a site."""
    rows = [
        (f"s{p}_{i}", label, f"p{p}", patient[1] if len(patient) > 1 else "", 0)
        for p, patient in enumerate(patients)
        for i, label in enumerate(patient[0])
    ]
    frame = pd.DataFrame(rows, columns=["slide", "label", "patient", "site", "line"])
    frame["line"] = range(2, len(frame) + 2)
    classes = tuple(f"c{i}" for i in range(1 + int(frame["label"].max())))
    return SlideTable("labels.csv", frame, classes, test)


def plain_table(count: int = 40, slides: int = 1, **more) -> SlideTable:
    """Patients of two classes in turn, with as many slides each."""
    return make_table([((p % 2,) * slides, f"h{p // 2 % 5}") for p in range(count)], **more)


def labels_of(table: SlideTable, slides) -> list[int]:
    return list(table.take(slides)["label"])


def _patients_of(table: SlideTable, slides, label: int) -> int:
    rows = table.take(slides)
    return rows["patient"][rows["label"] == label].nunique()


def assert_sound(table: SlideTable, folds: Folds, unit: str = "patient") -> None:
    """Every slide is once in a part of each fold, no patient (or site) in two, and every part has every class."""
    for fold in folds.folds:
        parts = [part for part in fold.parts().values() if part]
        assert sorted(slide for part in parts for slide in part) == sorted(table.slides)
        units = [set(table.take(part)[unit]) for part in parts]
        assert sum(map(len, units)) == len(set.union(*units))
        assert all(set(labels_of(table, part)) == set(range(len(table.classes))) for part in parts)


# Making -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folds", "ratio"), [(5, 8 / 24), (10, 4 / 32)])
def test_ratio_of_test_to_training_slides_counts_no_validation_slides(folds, ratio):
    # of 40 slides a fifth (a tenth) test, as many validate, and the rest train
    assert make_folds(plain_table(40), folds=folds).test_over_train == pytest.approx(ratio)


def test_ratio_of_test_to_training_slides_is_the_mean_over_folds_of_what_they_report_on():
    uneven = Folds((Fold(("a", "b"), ("c",), ("d",)), Fold(("c", "d", "e", "f"), ("b",), ("a",))))
    assert uneven.test_over_train == pytest.approx((1 / 2 + 1 / 4) / 2)
    without_test = Folds((Fold(("a", "b", "c"), ("d",)), Fold(("b", "c", "d"), ("a",))))
    assert without_test.test_over_train == pytest.approx(1 / 3)
    official = Folds((Fold(("a", "b"), ("c",), ("d",)), Fold(("b", "c"), ("a",), ("d",))))
    assert official.test_over_train is None


single = st.tuples(st.integers(0, 2), st.integers(1, 4)).map(lambda drawn: ((drawn[0],) * drawn[1],))
mixed = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(lambda labels: (tuple(labels),))


@settings(max_examples=25, deadline=None)
@given(st.lists(single, min_size=30, max_size=80), st.integers(3, 6), st.integers(0, 5))
def test_every_slide_is_tested_once_and_classes_are_even_within_one_patient(patients, count, seed):
    table = make_table(patients)
    per_class = table.rows.groupby("label")["patient"].nunique()
    assume(len(per_class) == 3 and per_class.min() >= count)
    folds = make_folds(table, folds=count, seed=seed)
    assert_sound(table, folds)
    assert sorted(slide for fold in folds.folds for slide in fold.test) == sorted(table.slides)
    for label in range(3):
        of_class = [_patients_of(table, fold.test, label) for fold in folds.folds]
        assert max(of_class) - min(of_class) <= 1


@settings(max_examples=25, deadline=None)
@given(st.lists(mixed, min_size=20, max_size=60), st.integers(2, 6), st.integers(0, 5))
def test_patients_of_several_classes_make_sound_folds_or_a_table_error(patients, count, seed):
    assume({label for (labels,) in patients for label in labels} == {0, 1, 2})
    table = make_table(patients)
    try:
        folds = make_folds(table, folds=count, seed=seed)
    except TableError:
        return
    assert_sound(table, folds)
    assert sorted(slide for fold in folds.folds for slide in fold.test) == sorted(table.slides)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 11)), min_size=60, max_size=120),
    st.integers(2, 5),
    st.sampled_from(["site_preserved", "site_preserved_test"]),
)
def test_no_site_both_trains_and_tests(patients, count, kind):
    table = make_table([((label, label), f"h{site}") for label, site in patients])
    assume(len(table.classes) == 2)
    try:
        folds = make_folds(table, folds=count, kind=kind)
    except TableError:
        return
    assert_sound(table, folds)
    if kind == "site_preserved":
        assert_sound(table, folds, "site")
    assert sorted(slide for fold in folds.folds for slide in fold.test) == sorted(table.slides)
    for fold in folds.folds:
        others = set(table.take((*fold.train, *fold.validation))["site"])
        assert not set(table.take(fold.test)["site"]) & others


def test_patients_who_have_all_classes_are_divided_like_others():
    table = make_table([((0, 1),)] * 10 + [((0,),)] * 2)
    assert_sound(table, make_folds(table, folds=5))


def test_ten_folds_train_on_80_percent_and_validate_and_test_on_10():
    fold = make_folds(plain_table(200), folds=10).folds[3]
    assert [len(part) for part in fold.parts().values()] == [160, 20, 20]


def test_share_that_validates_can_be_set():
    table = plain_table(200)
    fold = make_folds(table, folds=10, validation_share=0.2).folds[0]
    assert [len(part) for part in fold.parts().values()] == [144, 36, 20]
    assert sum(labels_of(table, fold.validation)) == 18


def test_seed_decides_the_folds():
    table = plain_table()
    assert make_folds(table, folds=4) == make_folds(table, folds=4)
    assert make_folds(table, folds=4) != make_folds(table, folds=4, seed=1)


def test_official_test_set_is_the_test_part_of_every_fold_and_the_rest_validates_once():
    table = plain_table(44, test=("s0_0", "s1_0", "s2_0", "s3_0"))
    folds = make_folds(table, folds=5)
    assert_sound(table, folds)
    assert {fold.test for fold in folds.folds} == {table.test_slides}
    validated = [slide for fold in folds.folds for slide in fold.validation]
    assert sorted((*validated, *table.test_slides)) == sorted(table.slides)


def test_official_test_set_can_be_left_aside():
    table = plain_table(44, test=("s0_0", "s1_0"))
    folds = make_folds(table, folds=4, official_test=False)
    assert sorted(slide for fold in folds.folds for slide in fold.test) == sorted(table.slides)


def test_one_fold_is_enough_beside_an_official_test_set():
    table = plain_table(44, test=("s0_0", "s1_0", "s2_0", "s3_0"))
    (fold,) = make_folds(table, folds=1, validation_share=0.25).folds
    assert [len(part) for part in fold.parts().values()] == [30, 10, 4]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (plain_table(18), {}, "10 folds need 10 patients with slides of each class; class c0 has 9"),
        (plain_table(4), {"folds": 2}, "fold 0: no slide of class c0, c1 in validation"),
        (
            plain_table(44, slides=2, test=("s0_0", "s1_1")),
            {},
            "official test set shares a patient with the rest: p0, p1",
        ),
        (plain_table(44, test=("s0_0",)), {"folds": 4}, "fold 0: no slide of class c1 in test"),
        (make_table([((0,),), ((1,), "h")]), {"kind": "site_preserved"}, r"need a site for line 2 \(s0_0\)"),
        (plain_table(), {"kind": "site_preserved", "folds": 6}, "6 folds need 6 sites .* class c0 has 5"),
        (
            make_table([((i % 2,), f"h{i % 4 // 2}") for i in range(20)]),
            {"kind": "site_preserved", "folds": 2},
            "fold 0: the sites that are left cannot give .* site_preserved_test",
        ),
        (
            plain_table(44, test=("s0_0", "s1_0")),
            {"kind": "site_preserved", "folds": 2},
            "official test set shares a site with the rest: h0; .* official_test off",
        ),
    ],
)
def test_folds_that_cannot_be_made_are_refused_with_a_reason(table, options, message):
    with pytest.raises(TableError, match=message):
        make_folds(table, **options)


def test_patient_of_several_sites_cannot_be_site_preserved():
    table = plain_table(slides=2)
    table.rows.loc[0, "site"] = "elsewhere"
    with pytest.raises(TableError, match=r"patient p0 comes from several sites: line 2 \(s0_0\), line 3 \(s0_1\)"):
        make_folds(table, folds=2, kind="site_preserved")


@pytest.mark.parametrize(("folds", "share"), [(0, None), (1, None), (1, 0.2), (3, 1.0)])
def test_argument_out_of_range_is_refused(folds, share):
    with pytest.raises(ValueError, match="fold"):
        make_folds(plain_table(), folds=folds, validation_share=share)


def test_real_cohorts_are_divided(shared):
    labels = shared / "labels"
    luad = read_tcga_genes(labels / "tcga_luad_genes.csv")
    assert_sound(luad, make_folds(luad, folds=10))
    assert_sound(luad, make_folds(luad, folds=10, kind="site_preserved"), "site")
    camelyon = read_camelyon16(
        labels / "camelyon16_labels.csv",
        metadata=labels / "camelyon16_metadata.csv",
        reference=labels / "camelyon16_test_reference.csv",
    )
    folds = make_folds(camelyon, folds=10)
    assert_sound(camelyon, folds)
    assert {len(fold.test) for fold in folds.folds} == {129}
    # Two hospitals: each tests once what was trained and validated on the other.
    by_hospital = make_folds(camelyon, folds=2, kind="site_preserved_test", official_test=False)
    assert sorted(len(fold.test) for fold in by_hospital.folds) == [156, 243]


# Splits -------------------------------------------------------------------------------------------------------


def test_fold_gives_the_bags_of_its_parts_and_reads_none(tmp_path):
    table = plain_table()
    bags = [StoredBag(row.slide, tmp_path / "no.h5", row.label, row.patient) for row in table.rows.itertuples()]
    fold = make_folds(table, folds=4).folds[2]
    split = make_folds(table, folds=4).split(2, [*bags, StoredBag("other", tmp_path / "no.h5", 0, "other")])
    for name, part in fold.parts().items():
        assert tuple(bag.slide for bag in getattr(split, name)) == part
    assert split.classes == 2


def test_slide_of_a_fold_without_a_bag_is_named():
    with pytest.raises(ValueError, match="fold 0 has slides without a bag: b"):
        Folds((Fold(("a",), ("b",)),)).split(0, [LabelledBag("a", None, 0, "a")])
    with pytest.raises(ValueError, match="fold counts from 0 to 0, got 1"):
        Folds((Fold(("a",), ("b",)),)).split(1, [])


# Files --------------------------------------------------------------------------------------------------------


def test_saved_folds_come_back(tmp_path):
    table = plain_table(slides=2)
    folds = make_folds(table, folds=4)
    save_folds(folds, tmp_path / "new" / "folds.csv")
    assert read_folds(tmp_path / "new" / "folds.csv", table) == folds
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folds.csv"]


def test_folds_that_cannot_be_written_are_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"folds\.csv: cannot be written"):
        save_folds(Folds(()), tmp_path / "file" / "folds.csv")


SMALL = make_table([((0, 0),), ((1, 1),), ((0,),), ((1,),), ((0,),), ((1,),)])
SOUND = (
    "slide,fold,part\ns0_0,0,train\ns0_1,0,train\ns1_0,0,train\ns1_1,0,train\n"
    "s2_0,0,validation\ns3_0,0,validation\ns4_0,0,test\ns5_0,0,test\n"
)


def test_folds_written_by_hand_are_read(tmp_path):
    (tmp_path / "folds.csv").write_text(SOUND)
    (fold,) = read_folds(tmp_path / "folds.csv", SMALL).folds
    assert fold == Fold(("s0_0", "s0_1", "s1_0", "s1_1"), ("s2_0", "s3_0"), ("s4_0", "s5_0"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("slide,fold,part", "slide,fold,set", "lacks the column 'part'"),
        ("s5_0,0,test", "s9_0,0,test", r"slides that labels\.csv has not: line 9 \(s9_0\)"),
        ("s5_0,0,test\n", "", r"fold 0 lacks slides of labels\.csv: line 9 \(s5_0\)"),
        ("s5_0,0,test\n", "s5_0,0,test\ns5_0,0,train\n", r"fold 0 names a slide twice: line 9 \(s5_0\), line 10"),
        ("s0_1,0,train", "s0_1,0,test", "fold 0: patient p0 is in two parts: s0_0 in train, s0_1 in test"),
        ("s3_0,0,validation", "s3_0,0,train", "fold 0: no slide of class c1 in validation"),
        ("s3_0,0,validation", "s3_0,0,dev", r"parts are train, validation, test; they are not in line 7 \(s3_0\)"),
        ("s3_0,0,validation", "s3_0,first,validation", r"folds are numbers 0, 1, …; they are not in line 7"),
        (",0,", ",1,", "folds count from 0 without a gap, and are 1"),
    ],
)
def test_wrong_folds_are_refused_with_the_rows_named(tmp_path, old, new, message):
    (tmp_path / "folds.csv").write_text(SOUND.replace(old, new))
    with pytest.raises(TableError, match=message):
        read_folds(tmp_path / "folds.csv", SMALL)


# The authors' layout ------------------------------------------------------------------------------------------


@pytest.fixture
def camelyon16(shared):
    labels = shared / "labels"
    return read_camelyon16(labels / "camelyon16_labels.csv", reference=labels / "camelyon16_test_reference.csv")


def test_published_fold_of_camelyon16_is_imported(shared, camelyon16, tmp_path):
    folds = import_published_folds(shared / "labels" / "camelyon16_fold0.csv", camelyon16)
    (fold,) = folds.folds
    assert [len(part) for part in fold.parts().values()] == [216, 54, 129]
    assert set(fold.test) == set(camelyon16.test_slides)
    save_folds(folds, tmp_path / "folds.csv")
    assert read_folds(tmp_path / "folds.csv", camelyon16) == folds


def test_published_label_that_the_table_contradicts_is_refused(shared):
    table = read_camelyon16(shared / "labels" / "camelyon16_labels.csv")  # without the reference
    with pytest.raises(TableError, match=r"other labels than .* for line 114 \(test_114: '1\.0'\)"):
        import_published_folds(shared / "labels" / "camelyon16_fold0.csv", table)


HEADER = ",train,train_label,val,val_label,test,test_label\n"


def published(train: str, val: str, test: str) -> str:
    """Two slides of SMALL's single-slide patients to validate and to test, given by patient number."""
    return HEADER + (
        f"0,s0_0,0,s{val[0]}_0,{int(val[0]) % 2}.0,s{test[0]}_0,{int(test[0]) % 2}.0\n"
        f"1,s0_1,0.0,s{val[1]}_0,{int(val[1]) % 2}.0,s{test[1]}_0,{int(test[1]) % 2}.0\n"
        f"2,s1_0,1,,,,\n3,s1_1,1,,,,\n" + "".join(f"4,s{p}_0,{int(p) % 2},,,,\n" for p in train)
    )


def test_folder_of_published_folds_is_taken_in_the_order_of_the_numbers(tmp_path):
    for number, (val, test) in {0: ("23", "45"), 2: ("45", "23"), 10: ("25", "43")}.items():
        (tmp_path / f"fold{number}.csv").write_text(published("", val, test))
    folds = import_published_folds(tmp_path, SMALL)
    assert [fold.validation for fold in folds.folds] == [("s2_0", "s3_0"), ("s4_0", "s5_0"), ("s2_0", "s5_0")]


def test_published_folds_may_have_no_test_part(tmp_path):
    text = published("45", "23", "45").replace("s4_0,0.0", ",").replace("s5_0,1.0", ",")
    (tmp_path / "fold0.csv").write_text(text)
    (fold,) = import_published_folds(tmp_path, SMALL).folds
    assert fold.test == ()
    assert len(fold.train) == 6


def test_other_layout_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(TableError, match="has no CSV files"):
        import_published_folds(tmp_path, SMALL)
    (tmp_path / "folds.csv").write_text(SOUND)
    with pytest.raises(TableError, match="lacks the column 'train'"):
        import_published_folds(tmp_path, SMALL)
