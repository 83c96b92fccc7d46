"""Outlines of three formats, and the exact share of each patch they cover."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.draw import polygon2mask

from s4mil_monai.training.annotations import (
    AnnotationError,
    Annotations,
    PatchLabelRule,
    coverage,
    label_patches,
    read_annotations,
)

SQUARE = [(0, 0), (100, 0), (100, 100), (0, 100)]
HOLE = [(20, 20), (60, 20), (60, 60), (20, 60)]


def asap(*shapes: tuple[str, list], kind: str = "Polygon") -> str:
    """Annotations of the given groups and vertices, as ASAP writes them."""
    written = ""
    for i, (group, vertices) in enumerate(shapes):
        points = "".join(f'<Coordinate Order="{k}" X="{x}" Y="{y}"/>' for k, (x, y) in enumerate(vertices))
        written += f'<Annotation Name="A{i}" Type="{kind}" PartOfGroup="{group}">'
        written += f"<Coordinates>{points}</Coordinates></Annotation>"
    return f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{written}</Annotations></ASAP_Annotations>'


def geojson(*shapes: tuple[str | None, dict]) -> dict:
    """Features of the given classes and geometries, as QuPath writes them."""
    features = [
        {
            "type": "Feature",
            "geometry": geometry,
            "properties": {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {}),
        }
        for name, geometry in shapes
    ]
    return {"type": "FeatureCollection", "features": features}


@pytest.fixture
def read(tmp_path):
    def written(content: str | bytes | dict | list, name: str = "a.xml", **groups) -> Annotations:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_annotations(path, **groups)

    return written


# Files --------------------------------------------------------------------------------------------------------


def test_xml_and_json_of_one_slide_are_the_same_region(shared):
    xml = read_annotations(shared / "annotations" / "Tumor_001.xml")
    js = read_annotations(shared / "annotations" / "Tumor_001.json")
    assert len(xml.positive) == len(js.positive) == 2
    assert shapely.symmetric_difference(xml.region(), js.region()).area == 0


def test_exclusions_of_a_real_xml_are_cut_out(shared):
    drawn = read_annotations(shared / "annotations" / "Tumor_003.xml")
    assert (len(drawn.positive), len(drawn.exclusions)) == (13, 1)
    whole = shapely.union_all(drawn.positive).area
    assert drawn.region().area == pytest.approx(whole - shapely.union_all(drawn.exclusions).area, rel=1e-9)


def test_real_outlines_that_cross_themselves_are_repaired_and_named(shared):
    for path in sorted((shared / "annotations").iterdir()):
        drawn = read_annotations(path)
        assert all(polygon.is_valid for polygon in (*drawn.positive, *drawn.exclusions))
        assert any("is repaired" in note for note in drawn.notes)


@pytest.mark.parametrize("hole", ["_2", "Exclusion", "exclusion", "normal"])
@pytest.mark.parametrize("tumour", ["Tumor", "_0", "_1", "metastases"])
def test_groups_of_camelyon_are_tumour_or_holes(read, tumour, hole):
    assert read(asap((tumour, SQUARE), (hole, HOLE))).region().area == 10_000 - 1600


def test_unknown_group_is_refused_unless_it_is_declared(read):
    with pytest.raises(AnnotationError, match=r"A0 is of the group 'Stroma', which is none of Tumor, .*_2"):
        read(asap(("Stroma", SQUARE)))
    with pytest.raises(AnnotationError, match="group 'None'"):
        read(asap(("None", SQUARE)))
    assert read(asap(("Stroma", SQUARE)), positive_groups=["stroma"]).region().area == 10_000


def test_vertices_are_taken_in_their_order_not_that_of_the_file(read):
    shuffled = asap(("Tumor", SQUARE)).replace('Order="1"', 'Order="9"').replace('Order="2"', 'Order="1"')
    shuffled = shuffled.replace('Order="3"', 'Order="2"').replace('Order="9"', 'Order="3"')
    # 0, 3, 1, 2 of the square: crosses itself, two triangles of 2500
    assert read(shuffled).region().area == pytest.approx(5000)


def test_what_has_no_area_is_left_out_and_noted(read):
    drawn = read(asap(("Tumor", [(1, 1)]), kind="Dot"))
    assert drawn.positive == ()
    assert drawn.notes == ("A0 is left out: a Dot has no area",)
    assert read(asap(("Tumor", [(1, 1), (2, 2)]))).notes == ("A0 is left out: it has 2 vertices",)


def test_outline_that_goes_round_some_of_it_twice_has_no_hole_there(read):
    # A loop of hand and mouse: around (0, 0) - (10, 10), and again around (2, 2) - (12, 12).
    curl = [(0, 0), (10, 0), (10, 10), (2, 10), (2, 2), (12, 2), (12, 12), (0, 12)]
    assert read(asap(("Tumor", curl))).region().area == 140  # 12 x 12 less the corner of 2 x 2


def test_qupath_polygons_with_holes_parts_and_exclusions(read):
    square = {"type": "Polygon", "coordinates": [[*SQUARE, SQUARE[0]], [*HOLE, HOLE[0]]]}
    far = [[x + 1000, y] for x, y in SQUARE]
    parts = {"type": "MultiPolygon", "coordinates": [[far], [[[x, y + 1000] for x, y in SQUARE]]]}
    point = {"type": "Point", "coordinates": [1, 1]}
    drawn = read(
        geojson(("Tumor", square), ("Tumor: in situ", parts), ("Tumor", point), ("Ignore*", square)), "a.geojson"
    )
    assert drawn.region().area == 20_000
    assert drawn.notes == ("feature 2 is left out: a Point has no area",)


def test_qupath_list_of_features_is_read_too(read):
    content = geojson(("Tumor", {"type": "Polygon", "coordinates": [SQUARE]}))["features"]
    assert read(content, "a.geojson").region().area == 10_000


def test_qupath_object_without_class_is_refused(read):
    with pytest.raises(AnnotationError, match="feature 0 is of the group 'None'"):
        read(geojson((None, {"type": "Polygon", "coordinates": [SQUARE]})), "a.geojson")


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha">{}]><ASAP_Annotations>&j;</ASAP_Annotations>'.format(
    "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9))
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", LAUGHS, "declares a document type"),
        ("a.xml", LAUGHS.encode("utf-16"), "declares a document type"),
        ("a.xml", '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "declares a document type"),
        ("a.xml", "<ASAP_Annotations>", "is no XML of ASAP"),
        ("a.xml", b"\x00\xff", "is no XML of ASAP"),
        ("a.xml", "<other/>", "no annotations in it"),
        ("a.xml", asap(("Tumor", [("x", 1)])), "could not convert"),
        ("a.xml", asap(("Tumor", [("nan", 1), (2, 3), (4, 5)])), "A0 has a vertex that is no number"),
        ("a.xml", asap(("Tumor", SQUARE)).replace("X=", "Z="), "lacks 'X'"),
        ("a.json", "[" * 100_000, "neither CAMELYON's JSON nor GeoJSON"),
        ("a.json", "{", "neither CAMELYON's JSON nor GeoJSON"),
        ("a.json", '{"positive": [{"name": "_0"}]}', "lacks 'vertices'"),
        ("a.json", '{"positive": [{"vertices": [[1, 2], [3]]}]}', "neither CAMELYON's JSON nor GeoJSON"),
        ("a.json", '{"positive": [{"vertices": [[1, 2], [3, NaN], [5, 6]]}]}', "vertex that is no number"),
        ("a.geojson", "[7]", "neither CAMELYON's JSON nor GeoJSON"),
        ("a.geojson", "{}", "lacks 'geometry'"),
    ],
)
def test_hostile_or_damaged_file_is_refused_in_one_line(read, name, content, message):
    with pytest.raises(AnnotationError, match=message) as caught:
        read(content, name)
    assert "\n" not in str(caught.value)


def test_file_that_is_too_long_is_refused(tmp_path):
    path = tmp_path / "a.xml"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(AnnotationError, match="is longer than 64 MiB"):
        read_annotations(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(AnnotationError, match=r"gone\.xml: cannot be read"):
        read_annotations(tmp_path / "gone.xml")


# Coverage -----------------------------------------------------------------------------------------------------


def test_triangles_cover_what_one_works_out_by_hand():
    triangle = Annotations((shapely.Polygon([(0, 0), (20, 0), (0, 20)]),))
    corners = [(0, 0), (10, 0), (0, 10), (10, 10), (5, 5), (20, 20), (-5, -5)]
    # The hypotenuse is x + y = 20: (0, 0) lies under it, it is the diagonal of (10, 0), (0, 10) and (5, 5), and
    # touches (10, 10); of (-5, -5) a quarter reaches into the right angle.
    expected = [1, 0.5, 0.5, 0, 0.5, 0, 0.25]
    np.testing.assert_array_equal(coverage(triangle, corners, side_px0=10), expected)
    np.testing.assert_array_equal(label_patches(triangle, corners, side_px0=10), [1, 1, 1, 0, 1, 0, 0])
    assert label_patches(triangle, corners, side_px0=10, min_share=0.51).sum() == 1


def test_overlapping_polygons_count_once_and_exclusions_win():
    square = shapely.box(0, 0, 10, 10)
    drawn = Annotations(
        (square, square, shapely.box(5, 0, 20, 10)), (shapely.box(0, 0, 5, 5), shapely.box(0, 0, 5, 5))
    )
    np.testing.assert_array_equal(coverage(drawn, [(0, 0), (10, 0)], side_px0=10), [0.75, 1])


def test_patch_side_need_not_be_whole():
    drawn = Annotations((shapely.box(0, 0, 10.5, 5.25),))
    assert coverage(drawn, [(0, 0)], side_px0=10.5).tolist() == [0.5]


def test_coverage_agrees_with_a_fine_rasterisation(shared):
    drawn = read_annotations(shared / "annotations" / "Tumor_016.json")  # with exclusions
    lesion = min(drawn.exclusions, key=lambda polygon: polygon.area)
    left, top = (int(v) - 300 for v in lesion.bounds[:2])
    side, scale, count = 160, 0.25, 8  # a raster pixel is 4 x 4 level-0 pixels, 1 / 1600 of a patch
    pixels = int(side * count * scale)

    def rasterise(polygons) -> np.ndarray:
        mask = np.zeros((pixels, pixels), bool)
        for polygon in polygons:
            rings = [polygon.exterior, *polygon.interiors]
            inside = [
                polygon2mask(mask.shape, (np.array(ring.coords)[:, ::-1] - (top, left)) * scale - 0.5)
                for ring in rings
            ]
            mask |= inside[0] & ~np.logical_or.reduce([*inside[1:], np.zeros_like(mask)])
        return mask

    mask = rasterise(drawn.positive) & ~rasterise(drawn.exclusions)
    per_patch = mask.reshape(count, pixels // count, count, pixels // count).mean((1, 3)).ravel()
    ys, xs = np.divmod(np.arange(count * count), count)
    exact = coverage(drawn, np.stack((left + xs * side, top + ys * side), 1), side_px0=side)
    assert 0 < exact.mean() < 1
    np.testing.assert_allclose(exact, per_patch, atol=0.02)


def test_real_lesions_are_covered_by_the_patches_that_tile_them(shared):
    drawn = read_annotations(shared / "annotations" / "Tumor_011.json")
    region = drawn.region()
    left, top, right, bottom = region.bounds
    grid = np.meshgrid(np.arange(left - 7, right, 511.5), np.arange(top - 3, bottom, 511.5))
    shares = coverage(drawn, np.stack(grid, -1).reshape(-1, 2), side_px0=511.5)
    assert shares.sum() * 511.5**2 == pytest.approx(region.area, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=3, max_size=200),
    st.integers(1, 40),
)
def test_any_outline_is_covered_whole_by_the_patches_of_a_grid(vertices, side):
    polygon = shapely.make_valid(shapely.Polygon(vertices), method="structure", keep_collapsed=False)
    steps = np.arange(0, 61, side)
    corners = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    shares = coverage(Annotations((polygon,)), corners, side_px0=side)
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert shares.sum() * side**2 == pytest.approx(polygon.area, abs=1e-4)


def test_nothing_drawn_and_no_patches_are_no_special_cases():
    assert coverage(Annotations(()), [(0, 0)], side_px0=5).tolist() == [0]
    assert len(coverage(Annotations((shapely.box(0, 0, 1, 1),)), np.empty((0, 2), int), side_px0=5)) == 0


@pytest.mark.parametrize(
    ("corners", "side", "share", "message"),
    [
        ([1, 2], 5, 0.5, r"top_left_px0 is \(n, 2\), got \(2,\)"),
        ([(1, 2)], 0, 0.5, "side_px0 is above 0, got 0"),
        ([(1, 2)], 5, 0, r"min_share is a fraction in \(0, 1\], got 0"),
    ],
)
def test_argument_out_of_range_is_quoted(corners, side, share, message):
    with pytest.raises(ValueError, match=message):
        label_patches(Annotations(()), corners, side_px0=side, min_share=share)


# The rule of a slide ------------------------------------------------------------------------------------------

CORNERS = np.array([(0, 0), (500, 500)])


@pytest.fixture
def drawn(tmp_path) -> str:
    path = tmp_path / "tumor.xml"
    path.write_text(asap(("Tumor", SQUARE)))
    return str(path)


def test_patches_of_an_annotated_slide_are_positive_or_negative(drawn):
    assert PatchLabelRule(drawn)(CORNERS, 50).tolist() == [1, 0]


def test_unmarked_patches_of_a_partly_annotated_slide_are_unknown(drawn):
    assert PatchLabelRule(drawn, partly=True)(CORNERS, 50).tolist() == [1, -1]


def test_without_annotations_a_negative_slide_is_all_negative_and_another_unknown():
    assert PatchLabelRule(None, negative=True)(CORNERS, 50).tolist() == [0, 0]
    assert PatchLabelRule(None)(CORNERS, 50) is None


def test_file_without_a_positive_polygon_says_nothing_of_a_tumour_slide(tmp_path):
    path = tmp_path / "empty.xml"
    path.write_text(asap(("_2", SQUARE)))
    assert PatchLabelRule(str(path))(CORNERS, 50) is None
    assert PatchLabelRule(str(path), negative=True)(CORNERS, 50).tolist() == [0, 0]


def test_rule_crosses_process_boundaries(drawn):
    rule = pickle.loads(pickle.dumps(PatchLabelRule(drawn)))
    assert rule(CORNERS, 50).tolist() == [1, 0]
    assert Path(rule.path).name == "tumor.xml"
