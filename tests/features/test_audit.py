"""Verify: every kind of damage has its finding, and a sound folder has none."""

from __future__ import annotations

import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest

from s4mil_monai.errors import FeatureFileError
from s4mil_monai.features.audit import audit_features
from s4mil_monai.features.store import FeatureBag, save_bag
from s4mil_monai.processes import name_machine
from s4mil_monai.slides.fingerprint import fingerprint_slide
from tests.features.test_store import end_a_process, make_real_bag


def save(folder, name, *, n=5, change=lambda bag: bag, **facts):
    """Save a bag of a slide NAME.tif, with a fingerprint of its own unless it is given."""
    bag = make_real_bag(n)
    facts = {"slide": f"{name}.tif", "slide_sha256": name.ljust(64, "0"), **facts}
    save_bag(folder / f"{name}.h5", change(replace(bag, origin=replace(bag.origin, **facts))))
    return folder / f"{name}.h5"


def codes(findings):
    return [(finding.path.name, finding.code) for finding in findings]


def test_sound_folder_has_no_findings(tmp_path):
    for name in ("a", "b", "c"):
        save(tmp_path / "deeper", name)
    assert audit_features(tmp_path, encoder_sha256="e" * 64) == []


def test_truncated_file_is_found(tmp_path):
    path = save(tmp_path, "a")
    path.write_bytes(path.read_bytes()[:2000])
    (finding,) = audit_features(tmp_path)
    assert (finding.path, finding.code) == (path, "unreadable")
    assert "embed the slide again" in finding.text


def test_one_wrong_byte_among_the_features_is_found(tmp_path):
    path = save(tmp_path, "a")
    whole = path.read_bytes()
    place = whole.index(make_real_bag().features.tobytes())
    path.write_bytes(whole[:place] + b"\0" + whole[place + 1 :])
    assert codes(audit_features(tmp_path)) == [("a.h5", "unreadable")]


def test_features_changed_by_a_program_are_found(tmp_path):
    with h5py.File(save(tmp_path, "a"), "a") as file:
        file["features"][0, 0] = 7
    assert codes(audit_features(tmp_path)) == [("a.h5", "checksum")]


def test_file_without_checksum_is_named(tmp_path):
    with h5py.File(save(tmp_path, "a"), "a") as file:
        del file.attrs["content_sha256"]
    assert codes(audit_features(tmp_path)) == [("a.h5", "no_checksum")]


def test_file_of_another_tool_is_told_from_a_damaged_one(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.ones((2, 3))
    assert codes(audit_features(tmp_path)) == [("a.h5", "other_format")]


def change_features(bag):
    features = bag.features.copy()
    features[1, 0], features[3, 2] = np.nan, np.inf
    return replace(bag, features=features)


def change_places(bag):
    corners = bag.top_left_px0.copy()
    corners[3] = corners[0]
    return replace(bag, top_left_px0=corners)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (change_features, "not_finite", "2 of 5 patches have features that are no numbers"),
        (change_places, "duplicate_places", "1 of 5 patches lie where another one does"),
    ],
)
def test_odd_values_are_counted(tmp_path, change, code, words):
    save(tmp_path, "a", change=change)
    (finding,) = audit_features(tmp_path)
    assert (finding.code, finding.text) == (code, words)


def test_wrong_shape_and_no_patches_are_found(tmp_path):
    with h5py.File(save(tmp_path, "a"), "a") as file:
        del file["coords"]
        file["coords"] = np.zeros((3, 2), np.int64)
    save(tmp_path, "b", change=lambda bag: FeatureBag(bag.features[:0], bag.top_left_px0[:0], bag.origin))
    assert codes(audit_features(tmp_path)) == [("a.h5", "wrong_shape"), ("b.h5", "empty")]


def test_odd_one_out_is_named_with_what_the_majority_has(tmp_path):
    for name in ("a", "b", "c"):
        save(tmp_path, name)
    save(tmp_path, "odd", encoder="uni", encoder_sha256="f" * 64, patch_mpp=0.25)
    (finding,) = audit_features(tmp_path)
    assert (finding.path.name, finding.code) == ("odd.h5", "mixed")
    assert "encoder uni, but resnet50_block3 in 3 of 4 files here" in finding.text
    assert "encoder_sha256 ffffffffffff…, but eeeeeeeeeeee… in 3 of 4" in finding.text
    assert "patch_mpp 0.25, but about 0.5" in finding.text


def test_different_folders_may_have_different_encoders(tmp_path):
    save(tmp_path / "uni", "a", encoder="uni")
    save(tmp_path / "resnet", "a")
    assert audit_features(tmp_path) == []


def test_file_of_another_encoder_than_wanted_is_found(tmp_path):
    save(tmp_path, "a")
    (finding,) = audit_features(tmp_path, encoder_sha256="f" * 64)
    assert (finding.code, finding.text) == (
        "other_encoder",
        "embedded with resnet50_block3 eeeeeeeeeeee, wanted weights ffffffffffff",
    )


def test_renamed_file_and_slide_under_two_names_are_found(tmp_path):
    save(tmp_path, "a").rename(tmp_path / "b.h5")
    save(tmp_path, "c", slide_sha256="a".ljust(64, "0"))
    assert codes(audit_features(tmp_path)) == [("b.h5", "other_slide"), ("c.h5", "same_slide")]


def test_features_beside_a_result_are_named_after_its_folder(tmp_path):
    save(tmp_path / "a", "a").rename(tmp_path / "a" / "features.h5")
    assert audit_features(tmp_path) == []


def test_leftover_of_a_killed_process_is_found(tmp_path):
    leftover = tmp_path / f".a.h5.{end_a_process()}@{name_machine()}.part"
    leftover.touch()
    (finding,) = audit_features(tmp_path)
    assert (finding.path, finding.code) == (leftover, "leftover")


# With the slides ----------------------------------------------------------------------------------------------


@pytest.fixture
def slides(tmp_path, tissue_slide):
    folder = tmp_path / "slides" / "deeper"
    folder.mkdir(parents=True)
    shutil.copy(tissue_slide, folder / "a.tif")  # 1536 x 1280
    return tmp_path / "slides"


def test_features_that_fit_their_slide_have_no_findings(tmp_path, slides):
    sha256 = fingerprint_slide(slides / "deeper" / "a.tif")
    save(tmp_path / "features", "a", n=3, slide_sha256=sha256)  # corners 0, 512, 1024
    assert audit_features(tmp_path / "features", slides=slides) == []


def test_patches_outside_the_slide_are_found(tmp_path, slides):
    sha256 = fingerprint_slide(slides / "deeper" / "a.tif")
    save(tmp_path / "features", "a", n=5, slide_sha256=sha256)  # 1536 and 2048 lie outside
    (finding,) = audit_features(tmp_path / "features", slides=slides)
    assert (finding.code, finding.text) == (
        "outside_slide",
        "2 of 5 patches begin outside the slide of 1536x1280",
    )


def test_slide_whose_content_changed_or_that_is_gone_is_found(tmp_path, slides):
    save(tmp_path / "features", "a", n=3)
    save(tmp_path / "features", "b", n=3)
    assert codes(audit_features(tmp_path / "features", slides=slides)) == [
        ("a.h5", "slide_changed"),
        ("b.h5", "slide_missing"),
    ]


def test_slide_that_cannot_be_read_is_found(tmp_path, slides):
    (slides / "a.tif").write_bytes(b"no slide")
    (slides / "deeper" / "a.tif").unlink()
    save(tmp_path / "features", "a", n=3, slide_sha256=fingerprint_slide(slides / "a.tif"))
    assert codes(audit_features(tmp_path / "features", slides=slides)) == [("a.h5", "slide_unreadable")]


def test_imported_features_without_a_fingerprint_are_not_called_changed(tmp_path, slides):
    save(tmp_path / "features", "a", n=3, slide="a", slide_sha256="")
    assert audit_features(tmp_path / "features", slides=slides) == []


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FeatureFileError, match="no such folder"):
        audit_features(tmp_path / "gone")
    with pytest.raises(FeatureFileError, match="no such folder"):
        audit_features(tmp_path, slides=tmp_path / "gone")
