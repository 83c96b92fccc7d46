"""Feature files of other tools: what they say is kept, what they do not say stays unknown."""

from __future__ import annotations

import pickle

import h5py
import numpy as np
import pytest
import torch

from s4mil_monai.errors import FeatureFileError, UnknownNameError
from s4mil_monai.features.foreign import import_features
from s4mil_monai.features.store import export_stamp, load_bag, save_bag
from tests.features.test_store import make_real_bag

FEATURES = np.arange(12, dtype=np.float32).reshape(4, 3)
ROWS = np.array([[0, 0], [512, 0], [0, 512], [512, 512]])


def write_h5(path, *, of_file=(), of_coords=(), of_features=(), **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
        file.attrs.update(of_file)
        for name, facts in (("coords", of_coords), ("features", of_features)):
            if facts:
                file[name].attrs.update(facts)
    return path


def write_pt(path, held):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, path)
    return path


def test_clam_h5_gives_features_places_and_no_invented_facts(tmp_path):
    found = import_features(write_h5(tmp_path / "a.h5", features=FEATURES, coords=ROWS.astype(np.int32)))
    np.testing.assert_array_equal(found.features, FEATURES)
    np.testing.assert_array_equal(found.top_left_px0, ROWS)
    origin = found.origin
    assert (origin.slide, origin.scan_order) == ("a", "row_major")
    assert origin.software.startswith("CLAM, imported by s4mil_monai")
    assert (origin.encoder, origin.encoder_sha256, origin.slide_sha256) == ("unknown", "", "")
    assert (origin.encoder_precision, origin.encoder_runtime, origin.quality) == ("unknown",) * 3
    assert (origin.slide_mpp, origin.patch_mpp, origin.patch_side_px, origin.min_tissue) == (-1, -1, -1, -1)
    assert (origin.overlap_px, origin.damaged_patches) == (-1, -1)


def test_clam_h5_with_a_leading_one_and_wider_numbers_is_read(tmp_path):
    path = write_h5(tmp_path / "a.h5", features=FEATURES[None].astype(np.float64), coords=ROWS[None])
    found = import_features(path)
    assert found.features.shape == (4, 3)
    assert found.features.dtype == np.float32
    assert found.top_left_px0 is not None
    assert found.top_left_px0.shape == (4, 2)


def test_clam_pt_takes_its_places_from_the_h5_folder_beside(tmp_path):
    write_h5(tmp_path / "h5_files" / "a.h5", features=FEATURES, coords=ROWS)
    found = import_features(write_pt(tmp_path / "pt_files" / "a.pt", torch.from_numpy(FEATURES)))
    np.testing.assert_array_equal(found.to_bag().top_left_px0, ROWS)


def test_clam_pt_alone_has_features_and_no_places(tmp_path):
    found = import_features(write_pt(tmp_path / "a.pt", torch.from_numpy(FEATURES).bfloat16()))
    np.testing.assert_array_equal(found.features, FEATURES)
    assert found.top_left_px0 is None
    assert found.origin.scan_order == "unknown"
    with pytest.raises(FeatureFileError, match=r"a\.pt: CLAM left no coordinates"):
        found.to_bag()
    with pytest.raises(FeatureFileError, match="cannot be sorted row_major"):
        import_features(tmp_path / "a.pt", scan_order="row_major")


def test_places_can_be_given(tmp_path):
    path = write_pt(tmp_path / "a.pt", torch.from_numpy(FEATURES))
    assert len(import_features(path, top_left_px0=ROWS).to_bag()) == 4
    with pytest.raises(FeatureFileError, match=r"features \(4, 3\) and coords \(3, 2\) do not go together"):
        import_features(path, top_left_px0=ROWS[:3])


def test_clam_pt_that_disagrees_with_its_h5_is_refused(tmp_path):
    write_h5(tmp_path / "a.h5", features=FEATURES[:2], coords=ROWS[:2])  # cut off by a kill
    with pytest.raises(FeatureFileError, match=r"\(4, 3\) are not those of .*a\.h5 \(2, 3\); one is damaged"):
        import_features(write_pt(tmp_path / "a.pt", torch.from_numpy(FEATURES)))


def test_trident_h5_says_encoder_sides_and_overlap(tmp_path):
    facts = {
        "patch_size": 256,
        "patch_size_level0": 512,
        "overlap": 0,
        "target_magnification": 20,
        "level0_magnification": 40,
        "name": "slide_7",
    }
    path = write_h5(
        tmp_path / "a.h5",
        features=FEATURES,
        coords=ROWS,
        of_coords=facts,
        of_features={"encoder": "uni_v1", "name": "slide_7"},
    )
    origin = import_features(path, slide_mpp=0.2525).origin
    assert origin.software.startswith("TRIDENT, imported")
    assert (origin.slide, origin.encoder, origin.overlap_px) == ("slide_7", "uni_v1", 0)
    assert (origin.patch_side_px, origin.patch_side_px0) == (256, 512.0)
    assert origin.patch_mpp == pytest.approx(0.505)  # 512 px of 0.2525 µm in 256 px: measured, not 20x
    assert origin.patch_note == "TRIDENT calls the patches 20x"
    assert import_features(path).origin.patch_mpp == -1


def test_trident_h5_with_nothing_known_of_the_encoder_says_so(tmp_path):
    path = write_h5(tmp_path / "a.h5", features=FEATURES, coords=ROWS, of_features={"encoder": "None"})
    assert import_features(path).origin.encoder == "unknown"
    assert import_features(path, encoder="mine", encoder_sha256="ab").origin.encoder == "mine"


STAMP_FACTS = {
    "2.4": {
        "stamp_version": "2.4.0",
        "unit": "um",
        "tile_size_um": 256.0,
        "tile_size_px": 224,
        "extractor": "ctranspath",
        "feat_type": "tile",
    },
    "2.0": {"stamp_version": "2.0.0", "unit": "um", "tile_size": 256.0, "extractor": "ctranspath"},
    "1": {"extractor": "ctranspath"},
}


@pytest.mark.parametrize("version", STAMP_FACTS)
def test_stamp_h5_of_every_version_gives_level_0_places(tmp_path, version):
    # Tiles of 256 µm on a slide of 0.5 µm/px are 512 px; version 1 counts 224 for 256 µm.
    unit = 224 / 256 if version == "1" else 1.0
    path = write_h5(
        tmp_path / "a.h5",
        feats=FEATURES.astype(np.float16),
        coords=(ROWS * 0.5 * unit).astype(np.float32),
        of_file=STAMP_FACTS[version],
    )
    found = import_features(path, slide_mpp=0.5)
    np.testing.assert_array_equal(found.features, FEATURES)
    np.testing.assert_array_equal(found.top_left_px0, ROWS)
    assert found.origin.encoder == "ctranspath"
    assert found.origin.patch_side_px0 == 512
    assert found.origin.patch_side_px == (224 if version == "2.4" else -1)
    assert found.origin.patch_mpp == (256 / 224 if version == "2.4" else -1)


def test_stamp_h5_has_no_places_in_pixels_without_the_slides_resolution(tmp_path):
    path = write_h5(tmp_path / "a.h5", feats=FEATURES, coords=ROWS * 0.5, of_file=STAMP_FACTS["2.4"])
    with pytest.raises(FeatureFileError, match=r"coordinates are in µm; give the slide's µm per pixel"):
        import_features(path).to_bag()


def test_stamp_h5_of_a_whole_slide_is_no_bag(tmp_path):
    for facts in ({"feat_type": "slide"}, {"encoder": "titan"}):
        path = write_h5(tmp_path / "a.h5", feats=FEATURES[:1], of_file=facts)
        with pytest.raises(FeatureFileError, match="one embedding of a slide, not of its patches"):
            import_features(path)


def test_copies_with_changed_colours_of_stamp_1_are_left_out(tmp_path):
    augmented = np.array([False, False, False, True])
    path = write_h5(tmp_path / "a.h5", feats=FEATURES, coords=ROWS[:3] * 0.4375, augmented=augmented)
    assert len(import_features(path, slide_mpp=0.5).to_bag()) == 3


def test_file_exported_for_stamp_comes_back(tmp_path):
    bag = make_real_bag()
    export_stamp(bag, tmp_path / "a.h5")
    back = import_features(tmp_path / "a.h5", slide_mpp=0.25).to_bag()
    np.testing.assert_array_equal(back.features, bag.features)
    np.testing.assert_array_equal(back.top_left_px0, bag.top_left_px0)
    assert (back.origin.patch_mpp, back.origin.patch_side_px0, back.origin.encoder) == (
        0.5,
        512,
        "resnet50_block3",
    )


def test_file_of_this_package_keeps_its_own_origin(tmp_path):
    bag = make_real_bag()
    save_bag(tmp_path / "a.h5", bag)
    assert import_features(tmp_path / "a.h5", encoder="other").origin == bag.origin


def test_imported_features_are_saved_and_loaded(tmp_path):
    bag = import_features(write_h5(tmp_path / "clam.h5", features=FEATURES, coords=ROWS)).to_bag()
    save_bag(tmp_path / "ours.h5", bag)
    assert load_bag(tmp_path / "ours.h5").origin == bag.origin
    with h5py.File(tmp_path / "ours.h5") as file:
        assert set(file["coords"].attrs) == {"name"}  # no sides of -1 pixels


@pytest.mark.parametrize(
    ("coords", "order"),
    [
        (ROWS, "row_major"),
        (ROWS[[0, 2, 1, 3]], "column_major"),
        (ROWS[[3, 0, 1, 2]], "unknown"),
    ],
)
def test_scan_order_is_named_only_if_the_patches_are_in_one(tmp_path, coords, order):
    path = write_h5(tmp_path / "a.h5", features=FEATURES, coords=coords)
    assert import_features(path).origin.scan_order == order


def test_patches_are_sorted_with_their_features_when_an_order_is_asked_for(tmp_path):
    shuffle = [3, 0, 2, 1]
    path = write_h5(tmp_path / "a.h5", features=FEATURES[shuffle], coords=ROWS[shuffle])
    found = import_features(path, scan_order="row_major")
    np.testing.assert_array_equal(found.features, FEATURES)
    np.testing.assert_array_equal(found.top_left_px0, ROWS)
    assert found.origin.scan_order == "row_major"
    with pytest.raises(UnknownNameError):
        import_features(path, scan_order="spiral")


def test_order_along_a_grid_is_by_the_grids_rows_and_not_by_pixels(tmp_path):
    path = write_h5(tmp_path / "a.h5", features=FEATURES, coords=ROWS)  # all corners are even numbers
    found = import_features(path, scan_order="serpentine", patch_side_px0=512)
    assert found.features.tolist() == FEATURES[[0, 1, 3, 2]].tolist()  # back along the second row
    assert found.origin.scan_order == "serpentine"
    hilbert = import_features(path, scan_order="hilbert", patch_side_px0=512)
    assert hilbert.features.tolist() == FEATURES[[0, 1, 3, 2]].tolist()  # (0, 0), (1, 0), (1, 1), (0, 1)
    with pytest.raises(FeatureFileError, match="nothing says its patches' side"):
        import_features(path, scan_order="serpentine")
    pieces = write_h5(
        tmp_path / "b.h5", features=FEATURES, coords=np.add(ROWS, [[0, 0], [0, 0], [9, 70], [9, 70]])
    )
    with pytest.raises(FeatureFileError, match="lie on none of 512 px"):
        import_features(pieces, scan_order="hilbert", patch_side_px0=512)


NAN = np.where(np.arange(12).reshape(4, 3) == 5, np.nan, FEATURES).astype(np.float32)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"features": FEATURES[:0], "coords": ROWS[:0]}, "is empty"),
        ({"features": FEATURES[:, 0], "coords": ROWS}, r"features are float32 \(4,\)"),
        ({"features": FEATURES.astype(int), "coords": ROWS}, "features are int64"),
        ({"features": FEATURES, "coords": ROWS[:3]}, "do not go together"),
        ({"features": FEATURES, "coords": ROWS * np.nan}, "no pixels of a slide"),
        ({"features": FEATURES, "coords": ROWS * 1e12}, "no pixels of a slide"),
        ({"features": NAN, "coords": ROWS}, "1 of 4 patches have features that are no numbers"),
        ({"coords": ROWS}, "has neither 'features'"),
        ({"feats": FEATURES, "coords": ROWS, "augmented": [True]}, "damaged"),
    ],
)
def test_h5_that_is_no_bag_is_refused_in_one_line(tmp_path, arrays, words):
    with pytest.raises(FeatureFileError, match=words) as caught:
        import_features(write_h5(tmp_path / "a.h5", **arrays))
    assert str(caught.value).startswith(str(tmp_path / "a.h5"))
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return print, ("code from the file ran",)


def test_pt_runs_no_code(tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Trap()))
    torch.save(Trap(), tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(FeatureFileError, match="damaged, or holds more than numbers"):
            import_features(tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["a.pt", "a.h5"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_damaged_file_is_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FeatureFileError, match="damaged") as caught:
        import_features(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("held", [{"state": 1}, [1, 2], torch.arange(4)])
def test_pt_without_features_is_refused(tmp_path, held):
    with pytest.raises(FeatureFileError, match="no tensor of features"):
        import_features(write_pt(tmp_path / "a.pt", held))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FeatureFileError, match="no such feature file"):
        import_features(tmp_path / "gone.h5")
