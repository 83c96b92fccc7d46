"""Tables of slides: the real ones, and wrong ones refused with their rows."""

from __future__ import annotations

import pytest

from s4mil_monai.errors import TableError
from s4mil_monai.training.labels import (
    read_camelyon16,
    read_slide_table,
    read_tcga_genes,
    read_tcga_subtypes,
    tcga_patient,
    with_test_slides,
)


@pytest.fixture
def write(tmp_path):
    def written(text: str, name: str = "labels.csv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return written


def test_table_of_names_is_numbered_in_the_declared_order(write):
    table = read_slide_table(write("slide,label\na,tumour\nb,normal\nc,1\n"), classes=["normal", "tumour"])
    assert list(table.rows["label"]) == [1, 0, 1]
    assert table.counts() == {"normal": 1, "tumour": 2}


def test_patient_is_the_slide_and_site_unknown_where_the_table_does_not_say(write):
    rows = read_slide_table(write("slide,label\na,1\nb,0\n")).rows
    assert (list(rows["patient"]), list(rows["site"])) == (["a", "b"], ["", ""])


def test_patient_and_site_are_found_by_their_usual_names_or_by_the_names_given(write):
    path = write("slide,label,patient,site,case\na,1,p,north,q\nb,0,p,NA,r\n")
    assert list(read_slide_table(path).rows["patient"]) == ["p", "p"]
    assert list(read_slide_table(path).rows["site"]) == ["north", "NA"]
    assert list(read_slide_table(path, patient_column="case").rows["patient"]) == ["q", "r"]


def test_entries_are_the_rows_in_their_order_with_texts_and_plain_numbers(write):
    entries = list(read_slide_table(write("slide,label,patient,site\nb,1,p,NA\na,0,007,\n")).entries())
    assert entries == [("b", 1, "p", "NA"), ("a", 0, "007", "")]
    assert all(type(entry.label) is int for entry in entries)


def test_cells_stay_texts_without_blanks_whatever_wrote_them(write):
    table = read_slide_table(write("\ufeffslide , label\n 007 ,1.0\n\n08,0\n,,\n".replace(",,", ",")))
    assert table.slides == ("007", "08")
    assert list(table.rows["label"]) == [1, 0]
    assert list(table.rows["line"]) == [2, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,diagnosis\na,1\n", "lacks the column 'label'; it has slide, diagnosis"),
        ("slide;label\na;1\n", "lacks the column 'slide'; it has slide;label"),
        ("slide,label\n", "has no slides"),
        ("slide,label\na,1\n,0\n", r"no slide in line 3 \(no slide\)"),
        ("slide,label\na,1\nb,\n", r"no label in line 3 \(b\)"),
        ("slide,label,patient\na,1,p\nb,0,\n", r"no patient in line 3 \(b\)"),
        ("slide,label\na,1\nb,0\na,0\n", r"more: line 2 \(a\), line 4 \(a\)"),
        ("slide,label\na,tumour\nb,0\n", r"without declared classes.* line 2 \(a: 'tumour'\)"),
        ("slide,label\na,-1\nb,0.5\nc,0\n", r"line 2 \(a: '-1'\), line 3 \(b: '0.5'\)"),
        ("slide,label\na,1\nb,1\n", "all 2 slides are of class 1; two classes are needed"),
        ("slide,label\na,1\nb,2\n", "no slide is of class 0; classes count from 0"),
        ("slide,label\n../a,1\nb,0\n", r"without folder; they are not in line 2 \(\.\./a\)"),
        ("slide,label\na,1\nb,0,7\n", "cannot be read as CSV"),
        ("slide,label\na,1,7\nb,0,7\n", "more cells than its header"),
    ],
)
def test_wrong_table_is_refused_with_the_rows_named(write, text, message):
    with pytest.raises(TableError, match=message):
        read_slide_table(write(text))


def test_label_that_is_no_declared_class_is_refused(write):
    with pytest.raises(
        TableError, match=r"labels are a, b; they are not for line 3 \(y: 'c'\), line 4 \(z: '2'\)"
    ):
        read_slide_table(write("slide,label\nx,a\ny,c\nz,2\n"), classes=["a", "b"])


def test_many_wrong_rows_are_counted(write):
    with pytest.raises(TableError, match=r"line 6 \(s4\) and 95 more"):
        read_slide_table(write("slide,label\n" + "".join(f"s{i},\n" for i in range(100))))


def test_missing_table_is_named(tmp_path):
    with pytest.raises(TableError, match=r"gone\.csv: cannot be read as CSV"):
        read_slide_table(tmp_path / "gone.csv")


def test_own_test_slides_have_to_be_in_the_table(write):
    table = read_slide_table(write("slide,label\na,1\nb,0\nc,0\n"))
    assert with_test_slides(table, write("slide\nc\na\n", "test.csv")).test_slides == ("a", "c")
    with pytest.raises(TableError, match=r"does not have line 3 \(z\)"):
        with_test_slides(table, write("slide\na\nz\n", "test.csv"))


# CAMELYON16 ---------------------------------------------------------------------------------------------------


def test_camelyon16_has_399_slides_of_two_hospitals_and_129_to_test_on(shared):
    labels = shared / "labels"
    table = read_camelyon16(
        labels / "camelyon16_labels.csv",
        metadata=labels / "camelyon16_metadata.csv",
        reference=labels / "camelyon16_test_reference.csv",
    )
    assert len(table) == 399
    assert len(table.test_slides) == 129
    assert all(slide.startswith("test_") for slide in table.test_slides)
    assert table.rows["site"].value_counts().to_dict() == {"hospital 0": 243, "hospital 1": 156}
    assert table.slides[0] == "normal_001"


def test_camelyon16_takes_the_labels_of_the_reference_and_says_so(shared):
    labels = shared / "labels"
    plain = read_camelyon16(labels / "camelyon16_labels.csv")
    table = read_camelyon16(labels / "camelyon16_labels.csv", reference=labels / "camelyon16_test_reference.csv")
    assert plain.counts() == {"normal": 240, "tumour": 159}
    assert table.counts() == {"normal": 239, "tumour": 160}  # test_114 is tumour in the reference
    assert [note.split()[0] for note in table.notes] == ["test_049", "test_114"]


def test_camelyon16_slide_without_hospital_is_refused(write):
    labels = write("filenames,tumor\nnormal_001.tif.npy,False\ntumor_001.tif.npy,True\n")
    metadata = write("slide_name,hospital\nnormal_001.tif,0.0\n", "metadata.csv")
    with pytest.raises(TableError, match=r"has no hospital for line 3 \(tumor_001\)"):
        read_camelyon16(labels, metadata=metadata)


def test_camelyon16_test_slide_that_the_reference_lacks_is_refused(write):
    labels = write("filenames,tumor\ntest_001.tif.npy,False\ntumor_001.tif.npy,True\n")
    reference = write("Test_002,Tumor,IDC,Macro\n", "reference.csv")
    with pytest.raises(TableError, match=r"does not have line 2 \(test_001\)"):
        read_camelyon16(labels, reference=reference)


# TCGA ---------------------------------------------------------------------------------------------------------


def test_tcga_luad_keeps_the_529_diagnostic_slides_of_467_patients(shared):
    table = read_tcga_genes(shared / "labels" / "tcga_luad_genes.csv", gene="TP53")
    assert (len(table), table.rows["patient"].nunique(), table.rows["site"].nunique()) == (529, 467, 33)
    assert table.counts() == {"wild type": 294, "mutated": 235}
    assert table.notes == ("816 slides that are not diagnostic (-DX) are left out",)
    assert table.rows.groupby("patient").size().max() > 1
    assert all("-DX" in slide and not slide.endswith(".svs") for slide in table.slides)


def test_tcga_table_without_the_gene_is_refused(shared):
    with pytest.raises(TableError, match="lacks the column 'TP35'"):
        read_tcga_genes(shared / "labels" / "tcga_luad_genes.csv", gene="TP35")


def test_mutation_that_is_neither_true_nor_false_is_refused(write):
    path = write("file_name,TP53\nTCGA-05-4244-01Z-00-DX1.x.svs,maybe\n")
    with pytest.raises(TableError, match=r"TP53 is True or False; it is not for line 2 \(TCGA-.*: 'maybe'\)"):
        read_tcga_genes(path)


@pytest.mark.parametrize(
    "text",
    [
        "slide,label\n{0},KIRC\n{1},KIRP\n{2},KICH\n",
        "file_name,project_id\n{0}.svs,TCGA-KIRC\n{1}.svs,TCGA-KIRP\n{2}.svs,TCGA-KICH\n",
        "slide_id,label\n{0},CCRCC\n{1},PRCC\n{2},CHRCC\n",
    ],
)
def test_rcc_is_three_classes_whatever_they_are_called(write, text):
    slides = [f"TCGA-A3-33{i}7-01Z-00-DX1.0b{i}" for i in range(3)]
    frozen = "TCGA-A3-3317-01A-01-TS1.0c"
    path = write(text.format(*slides) + f"{frozen},KIRC\n")
    table = read_tcga_subtypes(path)
    assert table.slides == tuple(slides)
    assert list(table.rows["label"]) == [0, 1, 2]
    assert set(table.rows["site"]) == {"A3"}
    assert table.notes


def test_slide_that_is_not_of_tcga_is_refused(write):
    with pytest.raises(TableError, match=r"others do in line 2 \(S1\)"):
        read_tcga_subtypes(write("slide,label\nS1,KIRC\n"))


def test_what_is_no_barcode_has_no_patient():
    with pytest.raises(ValueError, match="'slide_7'"):
        tcga_patient("slide_7")
