"""The one path from slide to result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from tifffile import TiffFile

from s4mil_monai.errors import BundleError, OutputError, SlideError
from s4mil_monai.features.store import load_bag
from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.bundle import describe_bundle, ship_weights
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.result import SlideResult, read_result
from s4mil_monai.scoring import CALIBRATION_FILE, fingerprint_model, load_scorer, score_slide, score_to_folder
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.statistics.calibration import Calibration, write_calibration
from s4mil_monai.statistics.drift_reference import DRIFT_REFERENCE_FILE
from s4mil_monai.streaming.choose import ChosenRuntime
from s4mil_monai.streaming.torch_runtime import TorchRuntime
from tests.conftest import GLASS, tissue_picture

FILES = {"result.json", "heatmap.png", "regions.geojson", "features.h5", "report.html"}


@pytest.fixture(scope="module")
def scorer(bundle):
    return load_scorer(bundle)


@pytest.fixture(scope="module")
def result(tissue_slide, scorer) -> SlideResult:
    return score_slide(tissue_slide, scorer)


def test_result_has_the_probabilities_of_its_logits(result):
    exponents = np.exp(result.logits)
    np.testing.assert_allclose(result.probabilities, exponents / exponents.sum(), rtol=1e-5)
    assert result.predicted == result.classes[int(np.argmax(result.logits))]


def test_shares_of_the_deciding_patches_and_the_bias_add_up_to_the_logits(result):
    shares = np.array([patch.contributions for patch in result.deciding_patches])
    np.testing.assert_allclose(shares.sum(0) + result.bias, result.logits, atol=1e-5)


def test_deciding_patches_come_with_their_place_largest_share_first(result):
    best = result.classes.index(result.predicted)
    shares = [patch.contributions[best] for patch in result.deciding_patches]
    assert shares == sorted(shares, reverse=True)
    for patch in result.deciding_patches:
        assert result.patches.top_left_px0[patch.index] == patch.top_left_px0


def test_result_says_how_the_slide_was_read(result):
    assert result.status == "scored"
    assert (result.slide.name, result.slide.mpp, result.slide.mpp_source) == ("tissue.tif", 0.5, "tiff")
    assert result.slide.backend in {"cucim", "openslide"}
    stages = {"opening", "tissue", "quality", "fingerprint", "reading", "preparing", "encoding", "aggregation"}
    assert set(result.seconds) == stages | {"last_patch_to_score", "total"}
    assert result.quality is not None
    assert result.quality.verdict in {"pass", "warn"}


def test_result_says_what_ran_the_slide_model(result):
    aggregator = result.aggregator
    assert (aggregator.runtime, aggregator.precision, aggregator.passed_over) == ("torch", "float32", ())


def test_streamed_score_is_that_of_the_whole_bag_and_told_on_the_way(scorer, tmp_path):
    picture = np.pad(
        np.tile(tissue_picture()[256:1024, 256:1280], (3, 2, 1)), ((256, 256), (256, 256), (0, 0)), "edge"
    )
    picture[:256] = picture[-256:] = picture[:, :256] = picture[:, -256:] = GLASS
    path = write_pyramid(picture, tmp_path / "large.tif", mpp=0.5)  # 8 x 9 patches
    in_chunks = replace(scorer, aggregator=ChosenRuntime(TorchRuntime(scorer.bundle.model, chunk=64)))
    told = []
    found = score_slide(path, in_chunks, features_path=tmp_path / "f.h5", so_far=told.append)
    features = torch.from_numpy(load_bag(tmp_path / "f.h5").features)
    assert len(features) > 64
    with torch.inference_mode():
        wanted, first = (scorer.bundle.model(bag.unsqueeze(0)) for bag in (features, features[:64]))
    np.testing.assert_allclose(found.logits, wanted.logits[0].tolist(), atol=1e-5)
    np.testing.assert_allclose(found.patches.probabilities, wanted.patch_logits[0].softmax(1).tolist(), atol=1e-5)
    assert {patch.index for patch in found.deciding_patches} == set(wanted.winners[0].tolist())
    assert [now.patches for now in told] == [64]
    np.testing.assert_allclose(told[0].probabilities, first.logits[0].softmax(0).tolist(), atol=1e-5)


def damage_tile(path: Path, *, number: int) -> None:
    """Overwrite the pixels of a tile of level 0 with zeros, as a copy with a hole in it has."""
    with TiffFile(path) as file:
        page = file.pages[0]
        offset, count = int(page.dataoffsets[number]), int(page.databytecounts[number])
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))


def test_slide_with_a_damaged_patch_gets_the_score_of_its_sound_ones_and_is_called_degraded(scorer, tmp_path):
    picture = np.full((1792, 2048, 3), GLASS, np.uint8)
    picture[256:1536, 256:1792] = np.tile(tissue_picture()[256:896, 256:1024], (2, 2, 1))  # 6 x 5 patches
    path = write_pyramid(picture, tmp_path / "hole.tif", mpp=0.5, compression=None)
    damage_tile(path, number=2 * 8 + 3)  # of 8 in a row
    found = score_slide(path, scorer, features_path=tmp_path / "f.h5")
    bag = load_bag(tmp_path / "f.h5")
    sound = [(x, y) for y in range(256, 1536, 256) for x in range(256, 1792, 256) if (x, y) != (768, 512)]
    assert found.status == "degraded"
    assert [finding.code for finding in found.quality.findings if finding.code == "damaged"] == ["damaged"]
    assert found.patches.top_left_px0 == sound
    assert bag.top_left_px0.tolist() == [list(corner) for corner in sound]
    assert len(bag.features) == 29
    with torch.inference_mode():
        wanted = scorer.bundle.model(torch.from_numpy(bag.features).unsqueeze(0))
    np.testing.assert_allclose(found.logits, wanted.logits[0].tolist(), atol=1e-5)
    np.testing.assert_allclose(found.patches.probabilities, wanted.patch_logits[0].softmax(1).tolist(), atol=1e-5)
    assert {patch.index for patch in found.deciding_patches} == set(wanted.winners[0].tolist())


def test_result_comes_back_from_its_json(result, tmp_path):
    (tmp_path / "result.json").write_text(result.to_json())
    assert read_result(tmp_path / "result.json") == result
    assert json.loads(result.to_json())["format"] == "s4mil.result/1"


def test_json_of_another_format_is_refused(tmp_path):
    (tmp_path / "result.json").write_text('{"format": "s4mil.result/9"}')
    with pytest.raises(OutputError, match=r"is not a result of format s4mil\.result/1"):
        read_result(tmp_path / "result.json")


def test_white_slide_gives_a_result_without_a_score(white_slide, scorer):
    result = score_slide(white_slide, scorer)
    assert (result.status, result.probabilities, result.predicted) == ("no_tissue", None, None)
    assert "no tissue found" in result.reason


def test_folder_appears_whole_with_all_its_files(tissue_slide, scorer, tmp_path):
    result, folder = score_to_folder(tissue_slide, scorer, tmp_path / "out")
    assert folder == tmp_path / "out" / "tissue"
    assert {path.name for path in folder.iterdir()} == FILES
    assert os.listdir(tmp_path / "out") == ["tissue"]
    assert read_result(folder / "result.json") == result
    assert load_bag(folder / "features.h5").features.shape == (12, 1280)


def test_scoring_again_gives_the_same_but_for_the_seconds(tissue_slide, scorer, tmp_path):
    _, folder = score_to_folder(tissue_slide, scorer, tmp_path)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    _, folder = score_to_folder(tissue_slide, scorer, tmp_path)
    again = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("heatmap.png", "regions.geojson", "features.h5"):
        assert first[name] == again[name]
    results = [json.loads(files["result.json"]) for files in (first, again)]
    for found in results:
        found.pop("seconds")
    assert results[0] == results[1]


def test_failure_leaves_nothing_behind(scorer, tmp_path):
    path = tmp_path / "notes.svs"
    path.write_text("no slide")
    with pytest.raises(SlideError):
        score_to_folder(path, scorer, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_failure_leaves_the_earlier_result_as_it_was(tissue_slide, scorer, tmp_path, monkeypatch):
    _, folder = score_to_folder(tissue_slide, scorer, tmp_path)
    before = (folder / "result.json").read_bytes()

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s4mil_monai.scoring.write_report", broken)
    with pytest.raises(OutputError, match="No space left on device"):
        score_to_folder(tissue_slide, scorer, tmp_path)
    assert (folder / "result.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["tissue"]


def test_folder_of_another_slide_is_not_overwritten(tissue_slide, scorer, tmp_path):
    other = tmp_path / "tissue.svs"
    other.write_bytes(tissue_slide.read_bytes())
    score_to_folder(tissue_slide, scorer, tmp_path / "out")
    with pytest.raises(
        OutputError, match=r"holds the result of tissue\.tif; choose another --out for tissue\.svs"
    ):
        score_to_folder(other, scorer, tmp_path / "out")


def test_result_of_another_slide_of_the_same_name_is_not_replaced(tissue_slide, scorer, tmp_path):
    """Every hospital has a 1.tif in many folders."""
    for name, seed in (("A", 0), ("B", 1)):
        (tmp_path / name).mkdir()
        write_pyramid(tissue_picture(seed=seed), tmp_path / name / "1.tif", mpp=0.5)
    first, folder = score_to_folder(tmp_path / "A" / "1.tif", scorer, tmp_path / "out")
    refused = r"holds the result of another slide called 1\.tif .*another --out"
    with pytest.raises(OutputError, match=refused) as error:
        score_to_folder(tmp_path / "B" / "1.tif", scorer, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert first.slide.sha256[:12] in str(error.value)
    assert read_result(folder / "result.json") == first
    assert os.listdir(tmp_path / "out") == ["1"]
    score_to_folder(tmp_path / "A" / "1.tif", scorer, tmp_path / "out")  # its own is


def test_folder_that_is_no_result_is_not_touched(tissue_slide, scorer, tmp_path):
    (tmp_path / "tissue").mkdir()
    (tmp_path / "tissue" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is not a result"):
        score_to_folder(tissue_slide, scorer, tmp_path)
    assert (tmp_path / "tissue" / "thesis.txt").exists()


def score_and_die(slide: Path, bundle: Path, out: Path, deadly: str) -> None:
    """Score in a real process that a real SIGKILL meets at the line that ``deadly`` arranges."""
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nimport s4mil_monai.scoring as s\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{deadly}\n"
        "s.score_to_folder(sys.argv[1], s.load_scorer(sys.argv[2]), sys.argv[3])\n"
    )
    process = subprocess.run([sys.executable, "-c", program, str(slide), str(bundle), str(out)], check=False)
    assert process.returncode == -9


def test_killed_in_the_middle_leaves_no_result_folder_and_the_next_one_cleans_up(
    tissue_slide, scorer, bundle, tmp_path
):
    score_and_die(tissue_slide, bundle, tmp_path, "s.write_report = die")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tissue.")
    assert left.suffix == ".part"
    score_to_folder(tissue_slide, scorer, tmp_path)  # nothing stands in the way
    assert os.listdir(tmp_path) == ["tissue"]
    assert (tmp_path / "tissue" / "result.json").exists()


def test_killed_between_the_renames_the_earlier_result_gets_its_name_back(
    tissue_slide, white_slide, scorer, bundle, tmp_path
):
    """The earlier one is set aside and the new one has no name yet: the only moment without a result."""
    _, folder = score_to_folder(tissue_slide, scorer, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    deadly = (
        "real = Path.rename\nPath.rename = lambda path, to: die() if path.suffix == '.part' else real(path, to)\n"
    )
    score_and_die(tissue_slide, bundle, tmp_path, deadly)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".old", ".part"]
    score_to_folder(white_slide, scorer, tmp_path)  # another slide's scoring puts it right
    assert sorted(os.listdir(tmp_path)) == ["tissue", "white"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_encoder_the_bundle_was_not_trained_with_is_refused(bundle):
    with pytest.raises(BundleError, match="features of efficientnet_lite0, not of resnet50_block3"):
        load_scorer(bundle, encoder="resnet50_block3")


def test_other_weights_of_the_encoder_are_refused(bundle, tmp_path):
    import torch

    from s4mil_monai.features.encoder import ENCODERS
    from s4mil_monai.weights import read_weights

    state = read_weights(ENCODERS["efficientnet_lite0"].find_weights())
    state["_conv_stem.weight"] += 0.01
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(BundleError, match="was trained with other weights of efficientnet_lite0"):
        load_scorer(bundle, encoder_weights=tmp_path / "other.pth")


def test_dicom_gives_the_grid_and_the_score_of_the_svs(shared):
    shipped = load_scorer(Path(__file__).resolve().parents[1] / "bundles" / "s4mil_slide")
    svs = score_slide(shared / "slides/CMU-1-Small-Region.svs", shipped)
    dicom = score_slide(shared / "slides/dicom_CMU-1-Small-Region", shipped)
    assert svs.patches.top_left_px0 == dicom.patches.top_left_px0
    np.testing.assert_allclose(svs.probabilities, dicom.probabilities, atol=0.02)


def write_calibration_of(bundle, folder, *, refer=(0.2, 0.8), threshold=0.5):
    """A copy of the bundle that halves logits, with a threshold and a refer band."""
    copy = folder / "calibrated"
    shutil.copytree(bundle, copy)
    calibration = Calibration(
        method="temperature",
        classes=2,
        temperature=2.0,
        threshold=threshold,
        refer_low=refer[0],
        refer_high=refer[1],
        class_floors=(0.1, 0.1),
        alpha=0.1,
        n=100,
        n_patients=100,
        provenance="a test",
        model_sha256=describe_bundle(bundle)[1].weights.sha256,
    )
    write_calibration(calibration, copy / CALIBRATION_FILE)
    return copy


@pytest.mark.parametrize(
    ("refer", "threshold", "decision"),
    [((0.0, 1.0), 0.5, "refer"), ((0.001, 0.001), 0.001, "positive"), ((0.999, 0.999), 0.999, "negative")],
)
def test_calibration_of_the_bundle_gives_probability_and_decision(
    tissue_slide, bundle, tmp_path, refer, threshold, decision
):
    scorer = load_scorer(write_calibration_of(bundle, tmp_path, refer=refer, threshold=threshold))
    result = score_slide(tissue_slide, scorer)
    halved = torch.tensor(result.logits).div(2).softmax(0)  # a temperature of 2
    assert result.calibrated == pytest.approx(halved.tolist(), abs=1e-6)
    assert (result.decision, result.threshold) == (decision, threshold)


def test_the_decision_is_that_of_class_1(tissue_slide, bundle, tmp_path):
    scorer = load_scorer(write_calibration_of(bundle, tmp_path, refer=(0.5, 0.5)))
    first, second = score_slide(tissue_slide, scorer).calibrated
    assert abs(first - second) > 0.01
    between = (first + second) / 2  # 0.5, and between what the two classes have
    expected = "positive" if second >= between else "negative"
    assert score_slide(tissue_slide, scorer).decision == expected


def test_calibration_for_other_classes_is_refused(bundle, tmp_path):
    copy = write_calibration_of(bundle, tmp_path)
    content = json.loads((copy / CALIBRATION_FILE).read_text())
    content |= {"classes": 3, "class_floors": [0.1, 0.1, 0.1]}
    (copy / CALIBRATION_FILE).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="is for 3 classes, the model has 2"):
        load_scorer(copy)


@pytest.mark.parametrize("weights", ["0" * 64, None])
def test_calibration_of_other_weights_is_refused(bundle, tmp_path, weights):
    copy = write_calibration_of(bundle, tmp_path)
    content = json.loads((copy / CALIBRATION_FILE).read_text()) | {"model_sha256": weights}
    (copy / CALIBRATION_FILE).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="run s4mil calibrate again"):
        load_scorer(copy)


def test_new_weights_take_calibration_and_drift_reference_with_them(bundle, tmp_path):
    copy = write_calibration_of(bundle, tmp_path)
    (copy / DRIFT_REFERENCE_FILE).write_text("{}")
    _, settings = describe_bundle(copy)
    torch.manual_seed(7)
    torch.save(SlideLogits(S4MIL(**settings.network.model_dump())).state_dict(), copy / "new.pt")
    ship_weights(copy, copy / "new.pt", settings)
    assert load_scorer(copy).calibration is None
    assert not (copy / DRIFT_REFERENCE_FILE).exists()


def test_names_of_classes_are_part_of_what_a_score_is(bundle):
    _, settings = describe_bundle(bundle)
    swapped = settings.model_copy(update={"classes": settings.classes[::-1]})
    assert fingerprint_model(settings, None) != fingerprint_model(swapped, None)


def test_patches_of_the_result_lie_where_the_slide_has_tissue(result):
    expected = [(x, y) for y in (256, 512, 768) for x in (256, 512, 768, 1024)]
    assert result.patches.top_left_px0 == expected
    for patch in result.deciding_patches:
        assert patch.top_left_px0 == expected[patch.index]


def blur_slide(tissue_picture, folder):
    blurred = np.stack([gaussian_filter(tissue_picture[..., c], 4) for c in range(3)], axis=-1)
    return write_pyramid(blurred, folder / "blurred.tif", mpp=0.5)


def test_slide_out_of_focus_gets_no_score_unless_that_is_asked_for(bundle, tmp_path):
    slide = blur_slide(tissue_picture(), tmp_path)
    scorer = load_scorer(write_calibration_of(bundle, tmp_path))
    rejected = score_slide(slide, scorer)
    assert (rejected.status, rejected.decision, rejected.probabilities) == ("rejected", "rejected", None)
    assert rejected.reason == "100% of the sampled patches are out of focus"
    assert rejected.quality.verdict == "reject"
    scored = score_slide(slide, scorer, ignore_quality=True)
    assert (scored.status, scored.quality.verdict) == ("scored", "reject")
