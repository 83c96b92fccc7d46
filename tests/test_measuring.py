"""Measures of scored slides, against numbers worked out in another way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from s4mil_monai.features.store import FeatureBag
from s4mil_monai.measures import MEASURES, SlideMeasures
from s4mil_monai.measuring import measure_slide
from s4mil_monai.result import SlideResult
from s4mil_monai.scoring import aggregate, embed_prepared, load_scorer, prepare_or_reject
from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.slides.tissue import TissueMask
from s4mil_monai.timing import Stages
from tests.conftest import GLASS, tissue_picture


@pytest.fixture(scope="module")
def scorer(bundle):
    return load_scorer(bundle)


def score(path, scorer) -> tuple[TissueMask, FeatureBag, SlideResult]:
    with open_isolated(path) as slide:
        prepared = prepare_or_reject(slide, scorer, Stages(), ignore_quality=True)
        embedded = embed_prepared(prepared, scorer)
        return prepared.tissue, embedded.bag, aggregate(embedded, scorer)


@pytest.fixture(scope="module")
def scored(tissue_slide, scorer):
    return score(tissue_slide, scorer)


@pytest.fixture(scope="module")
def measures(scored) -> SlideMeasures:
    return measure_slide(*scored)


def test_feature_numbers_are_those_of_all_values(scored, measures):
    features = scored[1].features.astype(np.float64)
    assert measures.patches == len(features) == 12
    assert measures.feature_mean == pytest.approx(features.mean(), rel=1e-5)
    assert measures.feature_deviation == pytest.approx(features.std(), rel=1e-5)
    assert measures.feature_zero_share == pytest.approx((features == 0).mean())
    # the norm of the sum over the sum of norms
    likeness = np.linalg.norm(features.sum(0)) / np.linalg.norm(features, axis=1).sum()
    assert measures.feature_likeness == pytest.approx(likeness, rel=1e-5)


def test_score_numbers_are_those_of_the_result(scored, measures):
    result = scored[2]
    best = result.classes.index(result.predicted)
    sizes = [abs(patch.contributions[best]) for patch in result.deciding_patches]
    assert measures.score == pytest.approx(result.probabilities[1])
    assert measures.top_share == pytest.approx(max(sizes) / sum(sizes))
    assert measures.probable_patches == sum(p[1] > 0.5 for p in result.patches.probabilities) / 12
    assert measures.sharpness == result.quality.measured["sharpness"]


def test_new_calibration_is_no_drift(scored, measures):
    tissue, bag, result = scored
    assert measure_slide(tissue, bag, result.model_copy(update={"calibrated": [0.01, 0.99]})) == measures


def test_patches_that_are_all_alike_have_a_likeness_of_one(scored):
    tissue, bag, result = scored
    alike = np.tile(np.float32([0.1, 0.0, 0.7]), (1000, 1))
    found = measure_slide(tissue, replace(bag, features=alike), result)
    assert found.feature_likeness == pytest.approx(1)
    assert found.feature_zero_share == pytest.approx(1 / 3)


def test_features_that_are_all_zero_are_measured(scored):
    tissue, bag, result = scored
    found = measure_slide(tissue, replace(bag, features=np.zeros((3, 4), np.float32)), result)
    assert (found.feature_mean, found.feature_deviation, found.feature_zero_share) == (0, 0, 1)


def test_slide_without_a_score_is_not_measured(scored):
    tissue, bag, result = scored
    with pytest.raises(ValueError, match="no_tissue"):
        measure_slide(tissue, bag, result.model_copy(update={"status": "no_tissue"}))


def test_nothing_in_the_measures_names_the_slide(measures):
    assert set(measures.model_dump()) == set(MEASURES)
    assert all(value is None or isinstance(value, float) for value in measures.model_dump().values())
    assert SlideMeasures.model_validate_json(measures.model_dump_json()) == measures


def test_denser_stain_shows_in_the_stain_and_dimmer_light_in_the_glass(tmp_path, scorer, measures):
    picture = tissue_picture() / np.array(GLASS)
    dense = write_pyramid((picture**1.5 * GLASS).round().astype(np.uint8), tmp_path / "dense.tif", mpp=0.5)
    dim = write_pyramid((picture * GLASS * 0.8).round().astype(np.uint8), tmp_path / "dim.tif", mpp=0.5)
    denser, dimmer = measure_slide(*score(dense, scorer)), measure_slide(*score(dim, scorer))
    # optical density is a logarithm: 1.5 times of it is the light to the power of 1.5
    assert denser.eosin_od == pytest.approx(1.5 * measures.eosin_od, rel=0.03)
    assert denser.glass_brightness == pytest.approx(measures.glass_brightness, abs=0.005)
    assert dimmer.glass_brightness == pytest.approx(0.8 * measures.glass_brightness, abs=0.005)
    assert dimmer.eosin_od == pytest.approx(measures.eosin_od, abs=0.01)


def test_real_slide_measures_the_same_as_svs_and_as_dicom(shared, scorer):
    svs = measure_slide(*score(shared / "slides" / "CMU-1-Small-Region.svs", scorer))
    dicom = measure_slide(*score(shared / "slides" / "dicom_CMU-1-Small-Region", scorer))
    assert dicom.model_dump() == pytest.approx(svs.model_dump(), rel=0.01)
    assert 0.2 < svs.tissue_share < 0.6  # a piece of tissue at the left, glass at the right
    assert svs.patches > 20


def test_real_slide_stained_denser_is_told_by_stain_brightness_and_saturation(shared, scorer, tmp_path):
    with open_isolated(shared / "slides" / "CMU-1-Small-Region.svs") as slide:
        pixels = slide.read_region(top_left_px0=(0, 0), size_px=slide.size_px0, level=0)
    table = (244 * (np.arange(256) / 244) ** 1.4).clip(0, 255).astype(np.uint8)
    denser = np.asarray(Image.fromarray(pixels).point(table.tolist() * 3))
    as_it_is = measure_slide(*score(write_pyramid(pixels, tmp_path / "a.tif", mpp=0.5), scorer))
    found = measure_slide(*score(write_pyramid(denser, tmp_path / "b.tif", mpp=0.5), scorer))
    assert found.haematoxylin_od > 1.25 * as_it_is.haematoxylin_od
    assert found.eosin_od > 1.2 * as_it_is.eosin_od
    assert found.saturation > 1.1 * as_it_is.saturation
    assert found.tissue_brightness < 0.93 * as_it_is.tissue_brightness
    assert found.sharpness == pytest.approx(as_it_is.sharpness, rel=0.03)
