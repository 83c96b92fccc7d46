"""DICOM objects that a PACS accepts, in the study of the slide, in place to the pixel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from shapely import Polygon, box, union_all
from shapely.geometry import shape
from wsidicom.graphical_annotations import AnnotationInstance

from s4mil_monai.errors import SlideError, TableError
from s4mil_monai.outputs import dicom_annotations, dicom_report
from s4mil_monai.outputs.dicom import write_dicom
from s4mil_monai.outputs.dicom_codes import SCHEME
from s4mil_monai.outputs.dicom_map import NOT_READ, make_parametric_maps
from s4mil_monai.outputs.dicom_object import identity_of, write_object
from s4mil_monai.outputs.dicom_segmentation import make_segmentations
from s4mil_monai.outputs.dicom_source import NEEDED, find_source
from s4mil_monai.outputs.dicom_study import StudyAttributes, find_study, read_study_table
from s4mil_monai.outputs.geojson import write_geojson
from s4mil_monai.outputs.heatmap import write_heatmap
from s4mil_monai.outputs.hospital import HospitalWriter
from s4mil_monai.result import AggregatorRecord, ModelRecord, PatchScores, QualityRecord
from s4mil_monai.slides.dicom_header import quiet_pydicom
from s4mil_monai.slides.isolation import open_isolated
from tests.outputs.results import make_result

NAMES = {"report", "heatmap", "parametric_map", "segmentation", "annotations"}
STUDY = StudyAttributes(
    study_instance_uid="1.2.3.4", patient_id="P1", patient_name="Doe^Jane", study_date="2026-01-02", study_id="S"
)
WRITTEN = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)


def write_all(path, folder, *, study=None, **changes):
    """Result, source and objects by name of a slide."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_isolated(path, assume_mpp=0.5 if Path(path).suffix == ".dcm" else None) as slide:
        result = make_result(slide, **changes)
        picture = write_heatmap(result, slide, folder / "heatmap.png")
        write_geojson(result, folder / "regions.geojson")
        source = find_source(slide, result, picture, study)
        paths = write_dicom(result, source, picture, folder / "dicom", written=WRITTEN)
    return result, source, {found.stem: found for found in paths}


@pytest.fixture(scope="module", params=["file", "dicom"])
def written(request, tmp_path_factory):
    """All objects of a TIFF, and of a real DICOM slide."""
    folder = tmp_path_factory.mktemp("dicom")
    if request.param == "file":
        return folder, *write_all(request.getfixturevalue("tissue_slide"), folder, study=STUDY)
    shared = request.getfixturevalue("shared")
    return folder, *write_all(shared / "slides/dicom_CMU-1-Small-Region", folder)


def errors_of(path: Path) -> list[str]:
    found = subprocess.run(
        [str(Path(sys.executable).parent / "dciodvfy"), str(path)], capture_output=True, text=True, check=False
    )
    lines = (found.stdout + found.stderr).splitlines()
    assert any(re.fullmatch(r"[A-Z]\w+", line) for line in lines), lines  # names the kind of object it looked at
    return [line for line in lines if line.startswith("Error")]


def test_dciodvfy_finds_no_error_in_any_object(written):
    _, _, source, paths = written
    assert set(paths) == NAMES | ({"overview"} if source.overview is not None else set())
    assert {name: errors_of(path) for name, path in paths.items()} == {name: [] for name in paths}


def test_dciodvfy_would_find_an_error(written, tmp_path):
    _, _, _, paths = written
    broken = pydicom.dcmread(paths["report"])
    del broken.SOPInstanceUID
    broken.save_as(tmp_path / "broken.dcm")
    assert errors_of(tmp_path / "broken.dcm")


def test_objects_reload_with_pydicom_and_highdicom(written):
    _, _, source, paths = written
    for path in paths.values():
        found = pydicom.dcmread(path)
        assert found.StudyInstanceUID == source.image.StudyInstanceUID
        assert found.PatientID == source.image.PatientID
    report = hd.sr.srread(paths["report"])
    assert len(report.content.get_planar_roi_measurement_groups()) >= 3
    assert hd.seg.segread(paths["segmentation"]).segment_numbers == [1]
    assert len(hd.ann.annread(paths["annotations"]).get_annotation_groups()) == 2
    assert hd.imread(paths["parametric_map"]).is_tiled
    assert pydicom.dcmread(paths["heatmap"]).pixel_array.shape[2] == 3


class ToPixels:
    """mm of the slide → level-0 pixels, by highdicom, from the attributes of the image that is referred to."""

    def __init__(self, result, source):
        image = source.image
        measures = image.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        origin = image.TotalPixelMatrixOriginSequence[0]
        self._scale = result.slide.size_px0[0] / image.TotalPixelMatrixColumns
        self._to_image = hd.spatial.ReferenceToImageTransformer(
            image_position=(
                float(origin.XOffsetInSlideCoordinateSystem),
                float(origin.YOffsetInSlideCoordinateSystem),
                0.0,
            ),
            image_orientation=[float(v) for v in image.ImageOrientationSlide],
            pixel_spacing=[float(v) for v in measures.PixelSpacing],
        )

    def __call__(self, points_mm):
        return self._to_image(np.asarray(points_mm, float).reshape(-1, 3))[:, :2] * self._scale


def geojson_of(folder, name):
    features = json.loads((folder / "regions.geojson").read_text())["features"]
    return [shape(f["geometry"]) for f in features if f["properties"]["classification"]["name"] == name]


def joined(squares):
    """Their union, without the hairlines that rounding leaves between neighbours."""
    return union_all(squares).buffer(0.5, join_style="mitre").buffer(-0.5, join_style="mitre")


def agree_within_a_pixel(found, wanted) -> bool:
    return found.hausdorff_distance(wanted) <= 1.0 and found.symmetric_difference(wanted).buffer(-1.01).is_empty


def test_segmentation_lies_where_the_regions_of_the_geojson_are(written):
    folder, result, source, paths = written
    found = pydicom.dcmread(paths["segmentation"])
    to_px0 = ToPixels(result, source)
    pixels = raster_squares(found, to_px0, lambda frame: frame > 0)
    assert agree_within_a_pixel(
        union_all(pixels).buffer(0.5).buffer(-0.5), union_all(geojson_of(folder, "tumour"))
    )


def raster_squares(found, to_px0, wanted):
    """Squares in level-0 pixels of the wanted pixels of a tiled object, from each frame's own position."""
    shared = found.SharedFunctionalGroupsSequence[0]
    spacing = [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing]
    orientation = np.array([float(v) for v in found.ImageOrientationSlide])
    frames = found.pixel_array.reshape(-1, found.Rows, found.Columns)
    squares = []
    for frame, groups in zip(frames, found.PerFrameFunctionalGroupsSequence, strict=True):
        position = groups.PlanePositionSlideSequence[0]
        first_mm = np.array(
            [
                float(position.XOffsetInSlideCoordinateSystem),
                float(position.YOffsetInSlideCoordinateSystem),
                float(position.ZOffsetInSlideCoordinateSystem),
            ]
        )
        for row, column in np.argwhere(wanted(frame)):
            centre = first_mm + orientation[:3] * spacing[1] * column + orientation[3:] * spacing[0] * row
            half = (orientation[:3] * spacing[1] + orientation[3:] * spacing[0]) / 2
            (left, top), (right, bottom) = to_px0([centre - half, centre + half])
            squares.append(box(left, top, right, bottom))
    return squares


def test_map_has_the_probability_of_each_patch_at_the_patch(written):
    _, result, source, paths = written
    found = pydicom.dcmread(paths["parametric_map"])
    to_px0 = ToPixels(result, source)
    squares = raster_squares(found, to_px0, lambda frame: frame != NOT_READ)
    values = found.pixel_array[found.pixel_array != NOT_READ]
    assert len(squares) == len(result.patches.top_left_px0)
    wanted = dict(zip(result.patches.top_left_px0, result.patches.probabilities, strict=True))
    half = result.patches.side_px0 / 2
    for square, value in zip(squares, values, strict=True):
        centre = np.array([square.centroid.x, square.centroid.y])
        nearest = min(wanted, key=lambda corner: np.abs(np.array(corner) + half - centre).sum())
        assert np.abs(np.array(nearest) + half - centre).max() < 1
        assert value == pytest.approx(wanted[nearest][1])


def test_annotations_outline_the_patches_of_the_geojson(written):
    folder, result, source, paths = written
    to_px0 = ToPixels(result, source)
    groups = hd.ann.annread(paths["annotations"]).get_annotation_groups()
    drawn = [[Polygon(to_px0(points)) for points in group.get_graphic_data("3D")] for group in groups]
    assert agree_within_a_pixel(
        union_all(drawn[0]).buffer(0.5).buffer(-0.5), union_all(geojson_of(folder, "tumour"))
    )
    for found, wanted in zip(drawn[1], geojson_of(folder, "Deciding patch"), strict=True):
        assert agree_within_a_pixel(found, wanted)


def test_wsidicom_reads_the_annotations_at_the_same_place(written):
    folder, result, source, paths = written
    to_px0 = ToPixels(result, source)
    (found,) = AnnotationInstance.open([paths["annotations"]])
    groups = {group.label: group for group in found.groups}
    assert len(groups["p(tumour) >= 0.5"].annotations) == sum(p >= 0.5 for _, p in result.patches.probabilities)
    deciding = groups["Deciding patches"].annotations
    for annotation, wanted in zip(deciding, geojson_of(folder, "Deciding patch"), strict=True):
        points = [(point.x, point.y, 0.0) for point in annotation.geometry.points]
        assert agree_within_a_pixel(Polygon(to_px0(points)), wanted)


def test_report_has_score_decision_and_regions_by_coordinates(written):
    folder, result, source, paths = written
    to_px0 = ToPixels(result, source)
    content = hd.sr.srread(paths["report"]).content
    groups = content.get_planar_roi_measurement_groups()
    drawn = {group.tracking_identifier: Polygon(to_px0(group.roi.value)) for group in groups}
    region = union_all(geojson_of(folder, "tumour"))
    assert agree_within_a_pixel(drawn["region 1"], Polygon(max(polygons(region), key=lambda p: p.area).exterior))
    for rank, wanted in enumerate(geojson_of(folder, "Deciding patch"), start=1):
        assert agree_within_a_pixel(drawn[f"deciding patch {rank}"], wanted)
    text = pydicom.dcmread(paths["report"]).to_json()
    assert "Positive" in text
    assert result.model.sha256 in text
    slide_level = content.get_image_measurement_groups()[0]
    values = {str(m.name.meaning): m.value for m in slide_level.get_measurements()}
    assert values["Probability of tumour"] == pytest.approx(0.8)
    assert values["Calibrated of tumour"] == pytest.approx(0.7)
    assert values["Calibrated probability from which on a slide is positive"] == 0.5


def polygons(geometry):
    return list(getattr(geometry, "geoms", [geometry]))


def test_capture_has_the_picture_and_the_size_of_the_scan(written):
    _, result, source, paths = written
    found = pydicom.dcmread(paths["heatmap"])
    spacing_mm = source.frame.spacing_mm
    size_mm = (found.Columns * found.PixelSpacing[1], found.Rows * found.PixelSpacing[0])
    wanted = (result.slide.size_px0[0] * spacing_mm[1], result.slide.size_px0[1] * spacing_mm[0])
    np.testing.assert_allclose(size_mm, wanted, atol=spacing_mm[0])


def test_a_rerun_gives_the_same_bytes_so_a_pacs_replaces_what_it_has(written, tmp_path, request):
    _, _, source, paths = written
    again = request.getfixturevalue("tissue_slide") if source.overview is not None else None
    if again is None:
        again = request.getfixturevalue("shared") / "slides/dicom_CMU-1-Small-Region"
    _, _, second = write_all(again, tmp_path, study=STUDY if source.overview is not None else None)
    for name, path in paths.items():
        assert path.read_bytes() == second[name].read_bytes(), name


def test_other_model_settings_or_study_give_other_objects(tissue_slide, tmp_path):
    def uids(folder, **changes):
        _, _, paths = write_all(tissue_slide, tmp_path / folder, **changes)
        return {pydicom.dcmread(path).SOPInstanceUID for name, path in paths.items() if name != "overview"}

    first = uids("a", study=STUDY)
    assert not first & uids("b", study=STUDY, threshold=0.6)
    assert not first & uids("c", study=STUDY, sha256="12" * 32)
    assert not first & uids("d", study=STUDY.model_copy(update={"study_instance_uid": "1.2.3.5"}))


@pytest.mark.parametrize(
    "change",
    [
        {"decision": "refer"},
        {"decision": None},
        {"status": "degraded"},
        {"calibrated": [0.31, 0.69]},
        {"calibrated": [0.00001, 0.99999]},
        {"probabilities": [0.19, 0.81]},
        {"classes": ("tumour", "normal")},
        {"predicted": "normal"},
        {"reason": "patches are damaged"},
        {"quality": QualityRecord(verdict="warn")},
        {"model": ModelRecord(bundle="tiny", version="1.0", sha256="cd" * 32, intended_use="others")},
        {"patches": PatchScores(side_px0=256.0, mpp=0.5, top_left_px0=[(0, 0)], probabilities=[[0.2, 0.8]])},
    ],
    ids=str,
)
def test_result_that_says_something_else_is_another_object_of_another_series(result, source, change):
    assert not uids_of(result, source) & uids_of(make_result_like(result, **change), source)


def test_result_found_elsewhere_is_the_same_object(result, source):
    """Other seconds, versions and readers, and another last digit."""
    elsewhere = make_result_like(
        result,
        seconds={"opening": 1.5},
        software={"torch": "9"},
        aggregator=AggregatorRecord(runtime="onnxruntime", precision="float32", chunk=64),
        slide=result.slide.model_copy(update={"name": "copy.tif", "backend": "tifffile"}),
        probabilities=[0.2000001, 0.7999999],
        calibrated=[0.3000001, 0.6999999],
    )
    assert uids_of(result, source) == uids_of(elsewhere, source)
    assert uids_of(result, source) == uids_of(make_result_like(result), source)


@pytest.mark.parametrize(
    "change",
    [
        {"patient_id": "P2"},
        {"patient_name": "Doe^John"},
        {"patient_birth_date": "1956-12-24"},
        {"patient_sex": "F"},
        {"accession_number": "A2"},
        {"container_id": "C2"},
        {"specimen_id": "S2"},
    ],
    ids=str,
)
def test_corrected_patient_or_glass_is_another_object_in_the_same_study(tissue_slide, result, picture, change):
    """A PACS keeps the first of two objects with one UID, so the wrong patient would stay."""
    with open_isolated(tissue_slide) as slide:
        studies = (STUDY, corrected(STUDY, change))
        sources = [find_source(slide, result, picture, study) for study in studies]
    first, second = (uids_of(result, source) | {source.image.SOPInstanceUID} for source in sources)
    assert not first & second
    assert len({source.image.StudyInstanceUID for source in sources}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"model": ModelRecord(bundle="tiny", version="1.0", sha256="12" * 32, intended_use="tests")},
        {"classes": ("tumour", "normal")},
        {"reason": "patches are damaged", "status": "degraded"},
    ],
    ids=["another model", "classes in another order", "another reason"],
)
def test_equal_codes_of_our_own_mean_the_same_whatever_the_model(result, source, change):
    first = make_result_like(result, reason="out of focus", status="degraded")
    found = [coded(one, source) for one in (first, make_result_like(result, **change))]
    for value in found[0].keys() & found[1].keys():
        assert found[0][value] == found[1][value]
    meanings = {meaning for codes in found for meaning in codes.values()}
    assert {"tumour", "Probability of tumour", "Calibrated of normal", "out of focus"} <= meanings
    assert max(len(value) for codes in found for value in codes) <= 16
    if "model" in change:
        assert not {"tumour", "normal"} & {found[0].get(value) for value in found[1]}


def coded(result, source):
    """Every code of our scheme in the objects of a result, with its meaning."""
    objects = (
        dicom_report.make_structured_report(result, source),
        dicom_annotations.make_annotations(result, source),
        *make_segmentations(result, source),
    )
    items = [item for made in objects for item in codes_in(made)]
    found = {item.CodeValue: item.CodeMeaning for item in items}
    assert all(found[item.CodeValue] == item.CodeMeaning for item in items)
    return found


def codes_in(item):
    if item.get("CodingSchemeDesignator") == SCHEME:
        yield item
    for element in item:
        if element.VR == "SQ":
            for below in element.value:
                yield from codes_in(below)


def corrected(study, change):
    return StudyAttributes(**(study.model_dump() | change))


def make_result_like(result, **changes):
    return result.model_copy(update=changes)


def uids_of(result, source):
    identity = identity_of(dicom_report.KIND, result, source)
    return {identity["series_instance_uid"], identity["sop_instance_uid"]}


@pytest.fixture(scope="module")
def result(tissue_slide):
    with open_isolated(tissue_slide) as slide:
        return make_result(slide)


@pytest.fixture(scope="module")
def picture(tissue_slide, result, tmp_path_factory):
    with open_isolated(tissue_slide) as slide:
        return write_heatmap(result, slide, tmp_path_factory.mktemp("picture") / "heatmap.png")


@pytest.fixture(scope="module")
def source(tissue_slide, result, picture):
    with open_isolated(tissue_slide) as slide:
        return find_source(slide, result, picture, STUDY)


def test_slide_of_whom_nothing_says_whose_it_is_is_marked(tissue_slide, tmp_path):
    _, source, paths = write_all(tissue_slide, tmp_path)
    assert not source.linked
    for name, path in paths.items():
        found = pydicom.dcmread(path)
        assert (str(found.PatientName), found.PatientID) == ("NOT^LINKED", "UNLINKED-ABABABABABAB")
        assert "not linked to a patient" in found.SeriesDescription or name == "overview"
        assert errors_of(path) == []


def test_file_slide_joins_the_study_of_its_sidecar(tissue_slide, tmp_path):
    slide = tmp_path / "case.tif"
    slide.write_bytes(tissue_slide.read_bytes())
    (tmp_path / "case.dicom.json").write_text('{"study_instance_uid": "1.2.9", "patient_id": "P9"}')
    _, source, paths = write_all(slide, tmp_path / "out", study=find_study(slide))
    assert source.linked
    assert {pydicom.dcmread(path).StudyInstanceUID for path in paths.values()} == {"1.2.9"}
    assert {pydicom.dcmread(path).PatientID for path in paths.values()} == {"P9"}


def test_cell_of_a_table_may_hold_commas_and_line_breaks(tmp_path):
    (tmp_path / "t.csv").write_text('slide,patient_id\n"a,\nb.tif",P1\n\nc.tif,P2\n')
    found = read_study_table(tmp_path / "t.csv")
    assert {name: row.study.patient_id for name, row in found.rows.items()} == {"a,\nb.tif": "P1", "c.tif": "P2"}


def test_table_of_the_site_wins_over_the_sidecar(tmp_path):
    slide = tmp_path / "case.tif"
    (tmp_path / "case.dicom.json").write_text('{"patient_id": "P9"}')
    (tmp_path / "t.csv").write_text("slide,patient_id,study_date\ncase.tif,P1,2026-01-02\n")
    found = find_study(slide, read_study_table(tmp_path / "t.csv"))
    assert (found.patient_id, found.study_date) == ("P1", "20260102")
    assert find_study(slide).patient_id == "P9"
    assert find_study(tmp_path / "other.tif") is None


def test_slides_of_one_name_in_two_folders_have_a_patient_each(tmp_path):
    (tmp_path / "t.csv").write_text("slide,patient_id\nA/1.svs,P1\n./B/1.svs,P2\nA/2.svs,P3\n2.svs,P4\n")
    table = read_study_table(tmp_path / "t.csv")
    share = tmp_path / "share"
    assert find_study(share / "A" / "1.svs", table).patient_id == "P1"
    assert find_study(share / "B" / "1.svs", table).patient_id == "P2"
    assert find_study(share / "C" / "1.svs", table) is None
    assert find_study(share / "BA" / "1.svs", table) is None
    assert find_study(share / "B" / "2.svs", table).patient_id == "P4"
    with pytest.raises(TableError, match=r"t\.csv: lines 4 and 5 are the same slide"):
        find_study(share / "A" / "2.svs", table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient_id,slide\nDoe\n", "line 2: wants a file name in slide"),
        ("slide,patient_id,shoe_size\na.tif,Doe,43\n", "line 2: shoe_size: Extra inputs are not permitted"),
        ("slide,study_instance_uid\na.tif,1.02\n", "line 2: study_instance_uid: Value error, is not a DICOM UID"),
        ("slide,patient_sex\na.tif,X\n", "line 2: patient_sex: "),
        ("slide,patient_id\n,P\n", "line 2: wants a file name in slide"),
        ("slide,patient_id\na.tif,P,Doe\n", "line 2: 3 cells, the header has 2"),
        ("slide,patient_id,patient_id\na.tif,P,Doe\n", "line 1: a column is there twice"),
        ("Doe,P1\nDoe,P2\n", "line 1: no column 'slide'; is this the header?"),
        ('slide,patient_id\na.tif,"Doe\n', "line 2: is not CSV"),
        ("", "line 1: no column 'slide'"),
        ("slide,patient_birth_date\na.tif,24-12-1956\n", "line 2: patient_birth_date: Value error, wants a date"),
        ("slide,patient_birth_date\na.tif,24121956\n", "line 2: patient_birth_date: Value error, is no day"),
        ("slide,patient_birth_date\na.tif,1956-1224\n", "line 2: patient_birth_date: Value error, wants a date"),
        ("slide,patient_birth_date\na.tif,1956-13-24\n", "line 2: patient_birth_date: Value error, is no day of"),
        ("slide,study_date\na.tif,20230229\n", "line 2: study_date: Value error, is no day of the calendar"),
        ("slide,study_date\na.tif,99-99-9999\n", "line 2: study_date: Value error, wants a date as YYYY-MM-DD"),
        ("slide,study_time\na.tif,2500\n", "line 2: study_time: Value error, is no time of the day; wants HH"),
        ("slide,study_time\na.tif,126000\n", "line 2: study_time: Value error, is no time of the day; wants HH"),
        ("slide,study_time\na.tif,12:30\n", "line 2: study_time: Value error, wants a time as HH, HHMM or HHMMSS"),
        ("slide,study_time\na.tif,123\n", "line 2: study_time: Value error, wants a time as HH, HHMM or HHMMSS"),
        ("slide,patient_id\na.tif,P\na.tif,Q\n", "line 3: the slide is in the table already"),
    ],
)
def test_table_that_cannot_be_meant_is_refused_without_its_values(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TableError, match=re.escape(message)) as refused:
        read_study_table(tmp_path / "t.csv")
    assert not [word for word in ("Doe", "1956", "99-99", "2500", "12:30") if word in str(refused.value)]


@pytest.mark.parametrize("value", ["1956-13-45", "24-12-1956", "99-99-9999", "1956-12-24 ", "１９５６1224"])
def test_sidecar_with_a_date_that_is_none_is_refused_without_it(tmp_path, value):
    (tmp_path / "case.dicom.json").write_text(json.dumps({"patient_id": "P9", "patient_birth_date": value}))
    with pytest.raises(TableError, match=r"case\.dicom\.json: patient_birth_date: Value error, ") as refused:
        find_study(tmp_path / "case.tif")
    assert not {"1956", "P9", value} & set(re.split(r"[ :,;]", str(refused.value)))


@pytest.mark.parametrize(
    ("date", "time"), [("1956-12-24", "235959"), ("19561224", "2359"), ("20240229", "23"), ("", "")]
)
def test_dates_and_times_are_kept_as_dicom_writes_them(date, time):
    found = StudyAttributes(patient_birth_date=date, study_date=date, study_time=time)
    assert (found.patient_birth_date, found.study_date) == (date.replace("-", ""), date.replace("-", ""))
    assert found.study_time == time


def test_real_source_without_patient_and_study_attributes_crashes_no_writer(shared, tmp_path):
    path = shared / "slides/camelyon_node_low_magnification.dcm"
    _, source, paths = write_all(path, tmp_path)
    assert set(paths) == NAMES
    assert source.linked
    own = {str(source.image.FrameOfReferenceUID)}
    assert {len(uid) for uid in own} == {66}  # what dciodvfy finds wrong is the source's own
    summary = "Error - Dicom dataset contains invalid data values for Value Representations"
    for path in paths.values():
        others = [line for line in errors_of(path) if not any(uid in line for uid in own)]
        assert others in ([], [summary])


def test_rejected_slide_gives_a_report_with_the_reason_and_a_picture(tissue_slide, tmp_path):
    none = dict.fromkeys(("predicted", "probabilities", "calibrated", "threshold", "logits", "bias", "patches"))
    _, _, paths = write_all(
        tissue_slide,
        tmp_path,
        status="rejected",
        reason="out of focus",
        decision="rejected",
        deciding_patches=[],
        **none,
    )
    assert set(paths) == {"report", "heatmap", "overview"}
    assert {name: errors_of(path) for name, path in paths.items()} == {name: [] for name in paths}
    assert "out of focus" in str(pydicom.dcmread(paths["report"]))


def test_slide_without_a_probable_patch_has_an_empty_segmentation(tissue_slide, tmp_path):
    with open_isolated(tissue_slide) as slide:
        patches = make_result(slide).patches
    low = patches.model_copy(update={"probabilities": [[0.9, 0.1]] * len(patches.probabilities)})
    _, _, paths = write_all(tissue_slide, tmp_path, patches=low)
    assert not pydicom.dcmread(paths["segmentation"]).pixel_array.any()
    assert len(hd.ann.annread(paths["annotations"]).get_annotation_groups()) == 1
    assert [errors_of(path) for path in paths.values()] == [[]] * 6


def test_overlapping_patches_keep_their_place(tissue_slide, tmp_path):
    found = write_all(tissue_slide, tmp_path, stride_px0=192.0, study=STUDY)
    written = (tmp_path, *found)
    test_segmentation_lies_where_the_regions_of_the_geojson_are(written)
    test_map_has_the_probability_of_each_patch_at_the_patch(written)
    test_annotations_outline_the_patches_of_the_geojson(written)


def test_patches_whose_side_is_not_whole_keep_their_place(tissue_slide, tmp_path):
    written = (tmp_path, *write_all(tissue_slide, tmp_path, side_px0=217.6, study=STUDY))
    test_map_has_the_probability_of_each_patch_at_the_patch(written)
    test_segmentation_lies_where_the_regions_of_the_geojson_are(written)


def test_headers_that_contradict_the_pixels_are_refused(shared, tmp_path):
    with open_isolated(shared / "slides/dicom_CMU-1-Small-Region") as slide:
        result = make_result(slide)
        picture = write_heatmap(result, slide, tmp_path / "heatmap.png")
        record = result.slide.model_copy(update={"size_px0": (2220, 2900)})
        with pytest.raises(SlideError, match=r"its DICOM headers have 2220 x 2967 pixels, .* read 2220 x 2900"):
            find_source(slide, result.model_copy(update={"slide": record}), picture)


@pytest.fixture
def damaged(dicom_slide, tmp_path):
    """Changes the header of a DICOM slide that is open, and finds the source of its results."""
    (tmp_path / "slide").mkdir()
    path = tmp_path / "slide" / "level0.dcm"
    path.write_bytes(next(dicom_slide.iterdir()).read_bytes())
    with open_isolated(tmp_path / "slide") as slide, quiet_pydicom():
        result = make_result(slide)
        picture = write_heatmap(result, slide, tmp_path / "heatmap.png")

        def write(place, change):
            header = pydicom.dcmread(path)
            *sequences, keyword = place.split(".")
            item = header
            for sequence in sequences:
                item = item[sequence].value[0]
            change(item, keyword)
            header.save_as(path)
            HospitalWriter().write(result, slide, picture, tmp_path)

        yield write


@pytest.mark.parametrize("place", NEEDED)
@pytest.mark.parametrize("change", [Dataset.__delitem__, lambda item, keyword: setattr(item, keyword, None)])
def test_headers_to_which_nothing_can_refer_are_refused_by_name(damaged, place, change):
    with pytest.raises(SlideError, match=f"slide: its DICOM header has no {place}, so results cannot refer to it"):
        damaged(place, change)


@pytest.mark.parametrize(
    "sequence", ["SharedFunctionalGroupsSequence", "SharedFunctionalGroupsSequence.PixelMeasuresSequence"]
)
def test_empty_sequence_is_refused_by_what_should_be_in_it(damaged, sequence):
    with pytest.raises(SlideError, match=r"has no SharedFunctionalGroupsSequence\.PixelMeasuresSequence\.PixelSp"):
        damaged(sequence, lambda item, keyword: setattr(item, keyword, []))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("ImageOrientationSlide", [1, 0, 0, 0], "has an ImageOrientationSlide of 4 numbers, not 6"),
        (NEEDED[-1], [0.0005] * 3, "has a PixelSpacing that is not two positive numbers"),
        (NEEDED[-1], [0.0005, -0.0005], "has a PixelSpacing that is not two positive numbers"),
        (NEEDED[-1], ["nan", "nan"], r"cannot be understood \(ValueError\)"),
        ("PatientBirthDate", ["Mustermann", "1956"], r"cannot be understood \(ValueError\)"),
        ("PatientName", ["Mustermann", "Zaphod"], r"cannot be understood \(TypeError\)"),
        ("StudyInstanceUID", ["1.2", "1.3"], r"cannot be understood \(TypeError\)"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_without_quoting_them(damaged, place, value, message):
    with pytest.raises(SlideError, match=f"slide: its DICOM header {message}") as refused:
        damaged(place, lambda item, keyword: setattr(item, keyword, value))
    assert "Mustermann" not in str(refused.value)


def test_empty_character_set_is_no_damage(damaged):
    damaged("SpecificCharacterSet", lambda item, keyword: setattr(item, keyword, None))


def test_rasters_of_more_than_a_tile_are_pyramids_in_place(tissue_slide, tmp_path):
    """384 x 320 patches of 4 px: more than a tile of 256."""
    with open_isolated(tissue_slide) as slide:
        result = make_result(slide, side_px0=4.0)
        source = find_source(slide, result, write_heatmap(result, slide, tmp_path / "heatmap.png"), STUDY)
    to_px0 = ToPixels(result, source)
    for kind, levels in (
        ("map", make_parametric_maps(result, source)),
        ("segmentation", make_segmentations(result, source)),
    ):
        assert [(level.TotalPixelMatrixColumns, level.TotalPixelMatrixRows) for level in levels] == [
            (384, 320),
            (192, 160),
        ]
        assert (
            len({level.PyramidUID for level in levels}) == len({level.SeriesInstanceUID for level in levels}) == 1
        )
        assert len({level.SOPInstanceUID for level in levels}) == 2
        bounds = []
        for number, level in enumerate(levels):
            write_object(level, tmp_path / f"{kind}{number}.dcm", written=WRITTEN)
            assert errors_of(tmp_path / f"{kind}{number}.dcm") == []
            found = pydicom.dcmread(tmp_path / f"{kind}{number}.dcm")
            squares = raster_squares(found, to_px0, lambda frame: frame >= 0.5)
            bounds.append(unary_bounds(squares))
        np.testing.assert_allclose(bounds[0], bounds[1], atol=0.5)  # the right half, to the pixel
        np.testing.assert_allclose(bounds[0], (768, 0, 1536, 1280), atol=0.5)


def unary_bounds(squares):
    edges = np.array([square.bounds for square in squares])
    return (*edges[:, :2].min(0), *edges[:, 2:].max(0))
