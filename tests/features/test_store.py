"""Feature files: whole or not at all, and readable by others."""

from __future__ import annotations

from dataclasses import fields

import h5py
import numpy as np
import pytest

from s4mil_monai.errors import FeatureFileError, OutputError
from s4mil_monai.features.store import FeatureBag, FeatureOrigin, load_bag, save_bag

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


def test_file_has_what_clam_and_trident_users_look_for(tmp_path):
    save_bag(tmp_path / "a.h5", make_bag())
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["features"].shape == (5, 3)
        assert file["coords"].shape == (5, 2)
        assert file["coords"].attrs["patch_size_level0"] == 0  # round(0.5)


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
