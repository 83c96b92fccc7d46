"""Feature files: whole or not at all, and readable by others."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from s4mil_monai.errors import FeatureFileError, OutputError
from s4mil_monai.features.claim import claim
from s4mil_monai.features.store import (
    FeatureBag,
    FeatureOrigin,
    OtherFormatError,
    WantedFeatures,
    clear_leftovers,
    export_stamp,
    find_reason_to_embed,
    load_bag,
    mismatch,
    read_origin,
    save_bag,
)
from s4mil_monai.processes import name_machine
from s4mil_monai.result import PatchSettings

VALUES = {"str": "x", "float": 0.5, "int": 256}


def make_bag(n: int = 5, d: int = 3) -> FeatureBag:
    origin = FeatureOrigin(**{field.name: VALUES[field.type] for field in fields(FeatureOrigin)})
    generator = np.random.default_rng(0)
    return FeatureBag(generator.random((n, d), np.float32), generator.integers(0, 9999, (n, 2)), origin)


def test_bag_comes_back_as_it_was_written(tmp_path):
    bag = make_bag()
    save_bag(tmp_path / "a.h5", bag)
    back = load_bag(tmp_path / "a.h5")
    np.testing.assert_array_equal(back.features, bag.features)
    np.testing.assert_array_equal(back.top_left_px0, bag.top_left_px0)
    assert back.origin == bag.origin


REAL_ORIGIN = FeatureOrigin(
    slide="a.svs",
    slide_sha256="5" * 64,
    slide_mpp=0.25,
    slide_mpp_source="vendor:aperio",
    backend="openslide",
    encoder="resnet50_block3",
    encoder_sha256="e" * 64,
    patch_mpp=0.5,
    patch_side_px=256,
    patch_side_px0=512.0,
    patch_note="",
    min_tissue=0.5,
    scan_order="row_major",
    patch_stage="torch",
    software="s4mil_monai 0",
)
WANTED = WantedFeatures("resnet50_block3", "e" * 64, PatchSettings())


def make_real_bag(n: int = 5, d: int = 3) -> FeatureBag:
    """Patches of 512 level-0 pixels in one row, each at its own place."""
    features = np.random.default_rng(1).random((n, d), np.float32)
    corners = np.stack((np.arange(n) * 512, np.zeros(n)), axis=1).astype(np.int64)
    return FeatureBag(features, corners, REAL_ORIGIN)


def test_clam_reads_features_and_level_0_coordinates(tmp_path):
    bag = make_real_bag()
    save_bag(tmp_path / "a.h5", bag)
    with h5py.File(tmp_path / "a.h5") as file:  # as CLAM's data set does, and its .pt is a tensor of this
        features, coords = torch.from_numpy(file["features"][:]), file["coords"][:]
    assert features.dtype is torch.float32
    np.testing.assert_array_equal(features.numpy(), bag.features)
    np.testing.assert_array_equal(coords, bag.top_left_px0)


def test_trident_reads_features_coordinates_and_side_in_level_0_pixels(tmp_path):
    bag = make_real_bag()
    save_bag(tmp_path / "a.h5", bag)
    with h5py.File(tmp_path / "a.h5") as file:  # as TRIDENT's slide encoders do
        coords, features, facts = file["coords"][:], file["features"][:], dict(file["coords"].attrs)
        assert file["features"].attrs["encoder"] == b"resnet50_block3"
    batch = torch.from_numpy(features).float().unsqueeze(0), torch.from_numpy(coords).to(torch.int64)
    assert batch[0].shape == (1, 5, 3)
    assert batch[1].tolist() == bag.top_left_px0.tolist()
    assert (int(facts["patch_size_level0"]), int(facts["patch_size"]), int(facts["overlap"])) == (512, 256, 0)


def test_stamp_reads_the_exported_file(tmp_path):
    bag = make_real_bag()
    export_stamp(bag, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:  # as STAMP's bag data set does
        feats, coords_um = torch.from_numpy(file["feats"][()]).float(), file["coords"][:]
        tile_size_um, tile_size_px = float(file.attrs["tile_size_um"]), int(file.attrs["tile_size_px"])
        assert file.attrs.get("feat_type") == "tile"
        assert "encoder" not in file.attrs  # STAMP would take it for the embedding of a slide
    np.testing.assert_array_equal(feats.numpy(), bag.features)
    assert coords_um[:, 0].tolist() == [0, 128, 256, 384, 512]  # 512 px of 0.25 µm
    assert tile_size_um / tile_size_px == 0.5


def test_stamp_gets_no_file_without_a_resolution(tmp_path):
    bag = make_real_bag()
    unknown = replace(bag, origin=replace(bag.origin, slide_mpp=-1.0))
    with pytest.raises(OutputError, match=r"resolution of a\.svs is not known"):
        export_stamp(unknown, tmp_path / "a.h5")
    assert list(tmp_path.iterdir()) == []


def test_file_of_an_earlier_version_loads_with_defaults(tmp_path):
    new = ("overlap_px", "encoder_runtime", "encoder_precision", "damaged_patches", "quality")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["format"] = "s4mil.features/1"
        for key, value in asdict(REAL_ORIGIN).items():
            if key not in new:
                file.attrs[key] = value
        file["features"] = np.ones((2, 3), np.float32)
        file["coords"] = np.zeros((2, 2), np.int64)
    assert load_bag(tmp_path / "a.h5").origin == REAL_ORIGIN
    assert read_origin(tmp_path / "a.h5") == REAL_ORIGIN


def test_origin_is_read_without_the_arrays(tmp_path):
    save_bag(tmp_path / "a.h5", make_real_bag())
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["features"], file["coords"]
    assert read_origin(tmp_path / "a.h5") == REAL_ORIGIN


@pytest.mark.parametrize("name", ["ünïcode.svs", "", "bad\udcff.svs"])
def test_any_name_a_slide_can_have_comes_back(tmp_path, name):
    bag = make_real_bag()
    save_bag(tmp_path / "a.h5", replace(bag, origin=replace(bag.origin, slide=name)))
    assert load_bag(tmp_path / "a.h5").origin.slide == name


def test_bag_larger_than_a_chunk_and_bag_without_patches_come_back(tmp_path):
    for n in (0, 3000):
        bag = make_real_bag(n, 256)
        save_bag(tmp_path / "a.h5", bag)
        np.testing.assert_array_equal(load_bag(tmp_path / "a.h5").features, bag.features)


def test_same_bag_gives_the_same_bytes(tmp_path):
    save_bag(tmp_path / "a.h5", make_bag())
    save_bag(tmp_path / "b.h5", make_bag())
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch):
    save_bag(tmp_path / "a.h5", make_bag(5))
    before = (tmp_path / "a.h5").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s4mil_monai.features.store.os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save_bag(tmp_path / "a.h5", make_bag(9))
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
    assert (tmp_path / "a.h5").read_bytes() == before


def test_truncated_file_is_refused(tmp_path):
    save_bag(tmp_path / "a.h5", make_bag(500, 64))
    data = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(FeatureFileError, match="damaged or incomplete"):
        load_bag(tmp_path / "a.h5")


def test_file_of_another_format_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.zeros((2, 3))
    with pytest.raises(FeatureFileError, match=r"format is None, wanted 's4mil\.features/1'"):
        load_bag(tmp_path / "a.h5")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FeatureFileError, match=r"gone\.h5: there is no such feature file"):
        load_bag(tmp_path / "gone.h5")


def test_wrong_shapes_are_not_written(tmp_path):
    bag = make_real_bag()
    with pytest.raises(ValueError, match="do not go together"):
        save_bag(tmp_path / "a.h5", replace(bag, top_left_px0=bag.top_left_px0[:3]))


@pytest.mark.parametrize("array", ["features", "coords"])
def test_array_changed_after_writing_is_found_by_the_checksum(tmp_path, array):
    save_bag(tmp_path / "a.h5", make_real_bag())
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file[array][2, 1] += 1
    with pytest.raises(FeatureFileError, match="not those that were written"):
        load_bag(tmp_path / "a.h5")


def test_no_wrong_byte_is_read_as_something_else(tmp_path):
    bag = make_real_bag()
    save_bag(tmp_path / "a.h5", bag)
    whole = (tmp_path / "a.h5").read_bytes()
    assert b"FRHP" not in whole  # HDF5's heaps for attributes and texts have no checksum
    assert b"GCOL" not in whole
    errors = []
    for place in range(0, len(whole), 11):
        wrong = bytearray(whole)
        wrong[place] ^= 0xFF
        (tmp_path / "b.h5").write_bytes(wrong)
        try:
            back = load_bag(tmp_path / "b.h5")
        except FeatureFileError as error:
            errors.append(str(error))
        else:  # a byte that nothing uses
            assert back.origin == bag.origin
            np.testing.assert_array_equal(back.features, bag.features)
            np.testing.assert_array_equal(back.top_left_px0, bag.top_left_px0)
    assert len(errors) > 100
    assert not [error for error in errors if "\n" in error]


def test_other_tools_stop_at_damaged_features_too(tmp_path):
    bag = make_real_bag()
    save_bag(tmp_path / "a.h5", bag)
    whole = (tmp_path / "a.h5").read_bytes()
    place = whole.index(bag.features.tobytes())
    (tmp_path / "a.h5").write_bytes(whole[:place] + b"\0" + whole[place + 1 :])
    with h5py.File(tmp_path / "a.h5") as file, pytest.raises(OSError, match="filter returned failure"):
        file["features"][:]


def test_fact_of_another_type_is_refused(tmp_path):
    save_bag(tmp_path / "a.h5", make_real_bag())
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["patch_side_px"] = "many"
    with pytest.raises(FeatureFileError, match="patch_side_px is no int"):
        load_bag(tmp_path / "a.h5")


def test_file_and_folder_are_on_disk_before_a_save_returns(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def record(handle):
        synced.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    monkeypatch.setattr("s4mil_monai.features.store.os.fsync", record)
    save_bag(tmp_path / "a.h5", make_real_bag())
    assert synced == ["file", "folder"]


def test_full_disk_gives_one_line_and_leaves_the_earlier_file(tmp_path):
    save_bag(tmp_path / "a.h5", make_real_bag())
    script = f"""
import resource
from pathlib import Path
from s4mil_monai.errors import OutputError
from s4mil_monai.features.store import save_bag
from tests.features.test_store import make_real_bag
bag = make_real_bag(3000, 64)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_bag(Path({str(tmp_path)!r}) / "a.h5", bag)
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "a.h5: cannot be written" in done.stdout
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert len(load_bag(tmp_path / "a.h5")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


# Resuming -----------------------------------------------------------------------------------------------------


def test_features_that_are_what_is_wanted_are_not_embedded_again(tmp_path):
    save_bag(tmp_path / "a.h5", make_real_bag())
    full = replace(WANTED, slide_sha256="5" * 64, slide_mpp=0.25, patch_stage="torch")
    assert find_reason_to_embed(tmp_path / "a.h5", WANTED) is None
    assert find_reason_to_embed(tmp_path / "a.h5", full) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"encoder": "uni"}, "encoder: resnet50_block3, wanted uni"),
        ({"encoder_sha256": "f" * 64}, "encoder weights: eeeeeeeeeeee…, wanted ffffffffffff…"),
        ({"encoder_runtime": "onnx"}, "encoder runtime: torch, wanted onnx"),
        ({"encoder_precision": "bfloat16"}, "encoder precision: float32, wanted bfloat16"),
        ({"patch_stage": "dali"}, "patch stage: torch, wanted dali"),
        ({"slide_sha256": "6" * 64}, "slide content: 555555555555…, wanted 666666666666…"),
        ({"slide_mpp": 0.24}, "slide resolution in µm/px: 0.25, wanted 0.24"),
        ({"settings": PatchSettings(mpp=1.0)}, "patch resolution in µm/px: 0.5, wanted 1"),
        ({"settings": PatchSettings(side_px=224)}, "patch side in px: 256, wanted 224"),
        ({"settings": PatchSettings(overlap_px=64)}, "overlap in px: 0, wanted 64"),
        ({"settings": PatchSettings(min_tissue=0.1)}, "least share of tissue: 0.5, wanted 0.1"),
        ({"settings": PatchSettings(scan_order="column_major")}, "scan order: row_major, wanted column_major"),
    ],
)
def test_what_changed_since_is_said_in_words(changed, words):
    assert mismatch(REAL_ORIGIN, replace(WANTED, **changed)) == words


def test_resolution_that_reading_gives_for_the_one_wanted_is_no_mismatch():
    # 256 px of 0.5 are 256.5 px of 0.499, so 257 are read, which is 0.50095; and 257.3 px of 0.4975: 0.49944.
    for slide_mpp in (0.499, 0.4975):
        found = replace(REAL_ORIGIN, patch_mpp=slide_mpp * 257 / 256, slide_mpp=slide_mpp)
        assert mismatch(found, WANTED) is None
    assert mismatch(replace(REAL_ORIGIN, patch_mpp=0.4951), WANTED) is None  # within 1 %, a level is read as it is
    assert mismatch(replace(REAL_ORIGIN, patch_mpp=0.506), WANTED) is not None


def test_missing_and_damaged_files_are_embedded_and_those_of_others_left_alone(tmp_path):
    path = tmp_path / "a.h5"
    assert find_reason_to_embed(path, WANTED) == "not embedded yet"
    path.write_bytes(b"half")
    assert "damaged" in str(find_reason_to_embed(path, WANTED))
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((2, 3))
    with pytest.raises(OtherFormatError):
        find_reason_to_embed(path, WANTED)


# Leftovers ----------------------------------------------------------------------------------------------------


def end_a_process() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    gone = end_a_process()
    old = tmp_path / f".a.h5.{os.getpid()}@elsewhere-1.part"
    leftovers = [tmp_path / f".a.h5.{gone}@{name_machine()}.part", tmp_path / f".b.h5.{gone}.part", old]
    living = [
        tmp_path / f".c.h5.{os.getpid()}@{name_machine()}.part",
        tmp_path / f".d.h5.{gone}@elsewhere-1.part",  # another machine's numbers say nothing here
        tmp_path / "e.h5",
        tmp_path / f".notes.txt.{gone}.part",
    ]
    for path in leftovers + living:
        path.write_bytes(b"x")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    os.utime(tmp_path / "e.h5", (two_days_ago, two_days_ago))
    assert clear_leftovers(tmp_path) == sorted(leftovers)
    assert sorted(tmp_path.iterdir()) == sorted(living)


def test_locks_nobody_holds_are_removed_and_held_ones_stay(tmp_path):
    (tmp_path / ".a.h5.lock").touch()
    with claim(tmp_path / "b.h5"):
        clear_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".b.h5.lock"]


def test_folder_that_is_not_there_has_no_leftovers(tmp_path):
    assert clear_leftovers(Path(tmp_path / "none")) == []
