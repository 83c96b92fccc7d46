"""What the DICOM objects say, value by value, and where: against numbers that are worked out here."""

from __future__ import annotations

import re

import highdicom as hd
import numpy as np
import pytest

from s4mil_monai.outputs import dicom_annotations, dicom_report
from s4mil_monai.outputs.dicom_codes import DECISION, PATCH_PROBABILITY, PREDICTED, SHARE
from s4mil_monai.outputs.dicom_source import find_source
from s4mil_monai.outputs.dicom_study import StudyAttributes
from s4mil_monai.outputs.heatmap import write_heatmap
from s4mil_monai.result import DecidingPatch
from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.pyramid import write_pyramid
from tests.conftest import tissue_picture
from tests.outputs.results import make_result

STUDY = StudyAttributes(
    patient_id="P1",
    patient_name="Doe^Jane",
    patient_birth_date="1956-12-24",
    patient_sex="F",
    accession_number="ACC1",
    study_id="STUDY2",
    study_date="2026-01-02",
    study_time="1430",
    container_id="GLASS3",
    specimen_id="BLOCK4",
)


@pytest.fixture(scope="module")
def found(tissue_slide, tmp_path_factory):
    """Result, picture and source of a slide file of which the patient is known."""
    with open_isolated(tissue_slide) as slide:
        result = make_result(slide)
        shares = [(2, [0.1, 0.7]), (3, [0.2, 0.5]), (17, [0.3, 0.4])]
        corners = result.patches.top_left_px0
        deciding = [
            DecidingPatch(index=index, top_left_px0=corners[index], contributions=contributions)
            for index, contributions in shares
        ]
        result = result.model_copy(update={"deciding_patches": deciding})
        picture = write_heatmap(result, slide, tmp_path_factory.mktemp("content") / "heatmap.png")
        return result, picture, find_source(slide, result, picture, STUDY)


def report_of(found, **changes):
    result, _, source = found
    made = dicom_report.make_structured_report(result.model_copy(update=changes), source)
    return hd.sr.Comprehensive3DSR.from_dataset(made).content


def judged(content, name):
    (slide_level, *_) = content.get_image_measurement_groups()
    (item,) = slide_level.get_qualitative_evaluations(name=name)
    return item.value


@pytest.mark.parametrize(
    ("decision", "scheme", "value", "meaning"),
    [
        ("positive", "SCT", "10828004", "Positive"),
        ("negative", "SCT", "260385009", "Negative"),
        ("refer", "99S4MIL", "refer", "Refer to a pathologist"),
    ],
)
def test_decision_is_coded_as_snomed_has_it(found, decision, scheme, value, meaning):
    coded = judged(report_of(found, decision=decision), DECISION)
    assert (coded.scheme_designator, coded.value, coded.meaning) == (scheme, value, meaning)


@pytest.mark.parametrize("predicted", ["normal", "tumour"])
def test_predicted_class_is_named(found, predicted):
    assert judged(report_of(found, predicted=predicted), PREDICTED).meaning == predicted


def test_each_deciding_patch_has_its_own_share_and_probability_of_the_class_in_the_report(found):
    groups = report_of(found).get_planar_roi_measurement_groups()
    values = {group.tracking_identifier: group.get_measurements() for group in groups}
    # by hand: make_result has 6 x 5 patches, probable from column 3 on, 0.6 + 0.3 * row / 5
    wanted = {"deciding patch 1": (0.7, 0.1), "deciding patch 2": (0.5, 0.6), "deciding patch 3": (0.4, 0.72)}
    for name, (share, probability) in wanted.items():
        said = {item.name.value: item.value for item in values[name]}
        assert said[SHARE.value] == pytest.approx(share)
        assert said[PATCH_PROBABILITY.value] == pytest.approx(probability)


def test_annotations_have_the_probability_of_the_shown_class_and_the_share_of_the_predicted_one(found):
    result, _, source = found
    made = dicom_annotations.make_annotations(result, source)
    probable, deciding = hd.ann.MicroscopyBulkSimpleAnnotations.from_dataset(made).get_annotation_groups()
    _, probabilities, _ = probable.get_measurements(name=PATCH_PROBABILITY)
    wanted = [0.6 + 0.3 * row / 5 for row in range(5) for column in range(3, 6) if (row, column) != (1, 4)]
    np.testing.assert_allclose(probabilities[:, 0], wanted, rtol=1e-6)
    _, shares, _ = deciding.get_measurements(name=SHARE)
    np.testing.assert_allclose(shares[:, 0], [0.7, 0.5, 0.4], rtol=1e-6)


def test_every_object_has_the_patient_and_study_of_the_table(found):
    result, _, source = found
    report = dicom_report.make_structured_report(result, source)
    annotations = dicom_annotations.make_annotations(result, source)
    wanted = {
        "PatientID": "P1",
        "PatientName": "Doe^Jane",
        "PatientBirthDate": "19561224",
        "PatientSex": "F",
        "AccessionNumber": "ACC1",
        "StudyID": "STUDY2",
        "StudyDate": "20260102",
        "StudyTime": "1430",
    }
    for made in (report, annotations, source.overview):
        said = {keyword: re.sub("[-:]", "", str(made[keyword].value)) for keyword in wanted}
        assert said == wanted
    assert source.overview.ContainerIdentifier == annotations.ContainerIdentifier == "GLASS3"
    assert source.overview.SpecimenDescriptionSequence[0].SpecimenIdentifier == "BLOCK4"
    assert annotations.SpecimenDescriptionSequence[0].SpecimenIdentifier == "BLOCK4"


@pytest.mark.parametrize("change", [{"patient_id": "P2"}, {"accession_number": "ACC2"}])
def test_study_of_another_patient_or_order_is_another_study(tissue_slide, found, change):
    result, picture, source = found
    other = STUDY.model_copy(update=change)
    with open_isolated(tissue_slide) as slide:
        study = find_source(slide, result, picture, other).image.StudyInstanceUID
        assert study != source.image.StudyInstanceUID
        assert find_source(slide, result, picture, STUDY).image.StudyInstanceUID == source.image.StudyInstanceUID


def on_glass_mm(x_px0, y_px0):
    """Where a corner of the scan lies at 0.5 µm/px, worked out without the package.

    The centre of the first pixel is at (25, 50) mm; y falls along a row, x down a column, by 0.0005 mm a pixel.
    """
    return (25 - (y_px0 - 0.5) * 0.0005, 50 - (x_px0 - 0.5) * 0.0005)


def corners_mm(left, top, side):
    return [
        on_glass_mm(left, top),
        on_glass_mm(left + side, top),
        on_glass_mm(left + side, top + side),
        on_glass_mm(left, top + side),
    ]


A_TENTH_OF_A_PIXEL_MM = 0.00005


def test_patches_of_a_file_slide_lie_where_arithmetic_puts_them(found):
    result, _, source = found
    made = dicom_annotations.make_annotations(result, source)
    _, deciding = hd.ann.MicroscopyBulkSimpleAnnotations.from_dataset(made).get_annotation_groups()
    groups = report_of(found).get_planar_roi_measurement_groups()
    outlines = {group.tracking_identifier: group.roi for group in groups}
    lefts_tops = [(512, 0), (768, 0), (1280, 512)]  # patches 2, 3 and 17 of six a row
    drawn = deciding.get_graphic_data("3D")
    for rank, (points, (left, top)) in enumerate(zip(drawn, lefts_tops, strict=True), start=1):
        wanted = corners_mm(left, top, 256)
        np.testing.assert_allclose(np.array(points)[:, :2], wanted, rtol=0, atol=A_TENTH_OF_A_PIXEL_MM)
        reported = np.array(outlines[f"deciding patch {rank}"].value)[:4, :2]
        np.testing.assert_allclose(reported, wanted, rtol=0, atol=A_TENTH_OF_A_PIXEL_MM)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A slide file of 3,200 x 2,560 pixels, shown at half its size."""
    folder = tmp_path_factory.mktemp("large")
    path = write_pyramid(tissue_picture(3200, 2560), folder / "large.tif", mpp=0.5)
    with open_isolated(path) as slide:
        result = make_result(slide)
        picture = write_heatmap(result, slide, folder / "heatmap.png")
        return find_source(slide, result, picture, STUDY).overview


def test_overview_of_a_large_slide_has_the_spacing_of_its_own_pixels(large):
    size = (large.TotalPixelMatrixColumns, large.TotalPixelMatrixRows)
    assert size == (1600, 1280)
    spacing = large.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    np.testing.assert_allclose([float(value) for value in spacing], (0.001, 0.001), rtol=1e-9)
    assert (large.ImagedVolumeWidth, large.ImagedVolumeHeight) == pytest.approx((1.6, 1.28))
    origin = large.TotalPixelMatrixOriginSequence[0]
    first = (float(origin.XOffsetInSlideCoordinateSystem), float(origin.YOffsetInSlideCoordinateSystem))
    assert first == pytest.approx(on_glass_mm(1, 1), abs=1e-8)  # the centre of two by two pixels of level 0
