"""Regions for QuPath."""

from __future__ import annotations

import json

import numpy as np
import pytest
from shapely.geometry import shape

from s4mil_monai.outputs.geojson import write_geojson
from s4mil_monai.outputs.heatmap import colour_of, paint_heat
from s4mil_monai.result import (
    DecidingPatch,
    EncoderRecord,
    ModelRecord,
    PatchScores,
    PatchSettings,
    SlideRecord,
    SlideResult,
)


def make_result(corners, probabilities, side_px0=100.0) -> SlideResult:
    return SlideResult(
        status="scored",
        slide=SlideRecord(
            name="s.svs", sha256="0", size_px0=(1000, 800), mpp=0.5, mpp_source="tiff", backend="cucim"
        ),
        model=ModelRecord(bundle="b", version="1", sha256="0", intended_use=""),
        encoder=EncoderRecord(name="e", sha256="0", width=8),
        settings=PatchSettings(),
        classes=("normal", "tumour"),
        predicted="tumour",
        probabilities=[0.1, 0.9],
        logits=[0.0, 2.2],
        bias=[0.0, 0.2],
        deciding_patches=[DecidingPatch(index=0, top_left_px0=corners[0], contributions=[0.0, 2.0])],
        patches=PatchScores(
            side_px0=side_px0, mpp=0.5, top_left_px0=corners, probabilities=[[1 - p, p] for p in probabilities]
        ),
        software={},
        seconds={},
    )


def features(tmp_path, result):
    write_geojson(result, tmp_path / "r.geojson")
    collection = json.loads((tmp_path / "r.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    assert "crs" not in collection  # a geographic frame would be a lie
    return collection["features"]


def regions(found):
    return [f for f in found if f["properties"]["classification"]["name"] == "tumour"]


def test_neighbouring_probable_patches_become_one_region_in_level_0_pixels(tmp_path):
    result = make_result([(0, 0), (100, 0), (200, 0), (500, 500)], [0.9, 0.8, 0.2, 0.6])
    found = regions(features(tmp_path, result))
    assert sorted(shape(f["geometry"]).bounds for f in found) == [(0, 0, 200, 100), (500, 500, 600, 600)]
    largest = max(found, key=lambda f: shape(f["geometry"]).area)
    assert largest["properties"]["objectType"] == "annotation"
    assert largest["properties"]["measurements"] == {"patches": 2, "largest p(tumour)": 0.9}


def test_patches_whose_side_is_not_whole_still_join(tmp_path):
    side = 100.3
    corners = [(round(i * side), 0) for i in range(9)]
    found = regions(features(tmp_path, make_result(corners, [0.9] * 9, side)))
    assert len(found) == 1


def test_deciding_patches_are_objects_with_their_share(tmp_path):
    found = [
        f
        for f in features(tmp_path, make_result([(300, 200)], [0.1]))
        if f["properties"]["classification"]["name"] == "Deciding patch"
    ]
    assert shape(found[0]["geometry"]).bounds == (300, 200, 400, 300)
    assert found[0]["properties"]["measurements"] == {"rank": 1, "share of logit(tumour)": 2.0}


def test_heat_covers_exactly_the_patches():
    heat = paint_heat(make_result([(0, 0), (500, 400)], [0.0, 1.0]), (80, 100), (10.0, 10.0))
    assert heat[:10, :10, 3].all()
    assert heat[40:50, 50:60, 3].all()
    assert int((heat[..., 3] > 0).sum()) == 200
    blue, red = heat[5, 5].astype(int), heat[45, 55].astype(int)
    assert blue[2] > blue[0]  # against
    assert red[0] > red[2]  # for


def test_heat_is_the_mean_where_patches_overlap_in_whatever_order():
    # halves of 100 pixels overlap: 1.0 alone, then the mean with 0.0, then 0.0 alone
    corners, probabilities = [(0, 0), (50, 0)], [1.0, 0.0]
    heat = paint_heat(make_result(corners, probabilities), (10, 20), (10.0, 10.0))
    assert heat[0, :15, :3].tolist() == colour_of(np.repeat([1.0, 0.5, 0.0], 5)).tolist()
    assert not heat[:, 15:, 3].any()
    backwards = paint_heat(make_result(corners[::-1], probabilities[::-1]), (10, 20), (10.0, 10.0))
    np.testing.assert_array_equal(heat, backwards)


def test_overlapping_probable_patches_are_one_region_and_each_is_counted(tmp_path):
    found = regions(features(tmp_path, make_result([(0, 0), (50, 0), (50, 50)], [0.9, 0.8, 0.7])))
    assert [f["properties"]["measurements"]["patches"] for f in found] == [3]
    assert shape(found[0]["geometry"]).area == 100 * 100 + 2 * 50 * 100


def test_slide_without_a_score_has_an_empty_collection(tmp_path):
    result = make_result([(0, 0)], [0.9]).model_copy(
        update={"status": "no_tissue", "patches": None, "predicted": None, "deciding_patches": []}
    )
    assert features(tmp_path, result) == []


@pytest.mark.parametrize("classes", [("a", "b", "c")])
def test_with_more_classes_the_predicted_one_is_drawn(tmp_path, classes):
    result = make_result([(0, 0)], [0.9]).model_copy(
        update={
            "classes": classes,
            "predicted": "b",
            "patches": PatchScores(side_px0=100, mpp=0.5, top_left_px0=[(0, 0)], probabilities=[[0.1, 0.7, 0.2]]),
        }
    )
    assert features(tmp_path, result)[0]["properties"]["classification"]["name"] == "b"
