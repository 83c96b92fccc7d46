"""The runtime auto: fastest of those that are right, remembered, measured again when anything changes."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import Tensor

from s4mil_monai.features.encoder import candidates, load_encoder
from s4mil_monai.features.encoder_choice import (
    choose_runtime,
    describe_place,
    measure_runtimes,
    textured_patches,
    worst_cosine,
)

KEY = {"encoder": "abc", "threads": "2"}
PATCHES = torch.ones(4, 3, 2, 2)


class Clock:
    """Time that passes when a runtime says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def flat(patches: Tensor) -> Tensor:
    return patches.mean(dim=(2, 3))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def runtime(clock):
    """A runtime that takes some seconds a batch and is off by some share in one feature."""

    def make(seconds: float, *, off: float = 0.0):
        def embed(patches: Tensor) -> Tensor:
            clock.now_s += seconds
            return flat(patches) + torch.tensor([off, 0.0, 0.0])

        return lambda: embed

    return make


def never():
    raise AssertionError("was started")


def broken():
    raise RuntimeError("no kernel for this processor\nand a long trace")


def measure(starts, clock):
    return measure_runtimes(starts, flat, KEY, patches=PATCHES, least_cosine=0.9999, clock=clock)


def test_the_fastest_is_taken(runtime, clock):
    choice = measure({"torch": runtime(2.0), "onnxruntime": runtime(0.5), "compiled": runtime(1.0)}, clock)
    assert choice.runtime == "onnxruntime"
    # 4 patches a batch
    assert choice.patches_per_s == {"torch": 2.0, "onnxruntime": 8.0, "compiled": 4.0}


def test_a_faster_one_with_other_features_is_not_taken(runtime, clock):
    # cosine of (1.1, 1, 1) and (1, 1, 1): 3.1 / sqrt(3.21 * 3) = 0.99896
    choice = measure({"torch": runtime(2.0), "compiled": runtime(0.1, off=0.1)}, clock)
    assert choice.runtime == "torch"
    assert choice.cosine["compiled"] == pytest.approx(0.99896, abs=1e-5)


def test_features_that_are_not_numbers_are_not_taken(runtime, clock):
    choice = measure({"torch": runtime(2.0), "compiled": runtime(0.1, off=float("nan"))}, clock)
    assert (choice.runtime, choice.cosine["compiled"]) == ("torch", -1.0)


def test_one_that_cannot_be_started_is_passed_over(runtime, clock, caplog):
    caplog.set_level("INFO")
    choice = measure({"torch": runtime(2.0), "compiled": broken}, clock)
    assert (choice.runtime, list(choice.patches_per_s)) == ("torch", ["torch"])
    assert "compiled cannot be used here: no kernel for this processor" in caplog.text


def test_the_worst_patch_counts():
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert worst_cosine(features, torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == pytest.approx(0.5**0.5)
    assert worst_cosine(features, features[:, :1]) == -1.0


def choose(starts, key, folder, clock):
    return choose_runtime(
        starts, flat, key, patches=PATCHES, least_cosine=0.9999, folder=folder, clock=clock
    ).runtime


def test_a_choice_is_remembered_and_not_measured_again(runtime, clock, tmp_path):
    assert choose({"torch": runtime(2.0), "compiled": runtime(1.0)}, KEY, tmp_path, clock) == "compiled"
    assert choose({"torch": never, "compiled": never}, KEY, tmp_path, clock) == "compiled"


def test_another_machine_or_version_is_measured_anew(runtime, clock, tmp_path):
    choose({"torch": runtime(2.0), "compiled": runtime(1.0)}, KEY, tmp_path, clock)
    other = {**KEY, "threads": "8"}
    assert choose({"torch": runtime(1.0), "compiled": runtime(2.0)}, other, tmp_path, clock) == "torch"
    assert choose({"torch": never, "compiled": never}, KEY, tmp_path, clock) == "compiled"


def test_a_remembered_runtime_that_is_no_candidate_any_more_is_measured_anew(runtime, clock, tmp_path):
    choose({"torch": runtime(2.0), "compiled": runtime(1.0)}, KEY, tmp_path, clock)
    assert choose({"torch": runtime(2.0)}, KEY, tmp_path, clock) == "torch"


@pytest.mark.parametrize("damage", [b"", b"\xff\x00", b'{"runtime": "compiled"}', b"[]"])
def test_a_damaged_choice_is_measured_anew_and_mended(runtime, clock, tmp_path, damage):
    choose({"torch": runtime(1.0), "compiled": runtime(2.0)}, KEY, tmp_path, clock)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(damage)
    assert choose({"torch": runtime(2.0), "compiled": runtime(1.0)}, KEY, tmp_path, clock) == "compiled"
    assert json.loads(kept.read_text())["runtime"] == "compiled"


def test_a_choice_of_another_key_under_the_same_name_does_not_count(runtime, clock, tmp_path):
    choose({"torch": runtime(2.0), "compiled": runtime(1.0)}, KEY, tmp_path, clock)
    (kept,) = tmp_path.iterdir()
    kept.write_text(kept.read_text().replace("abc", "abd"))
    assert choose({"torch": runtime(1.0), "compiled": runtime(2.0)}, KEY, tmp_path, clock) == "torch"


def test_without_a_folder_to_write_the_choice_is_made_all_the_same(runtime, clock, tmp_path):
    (tmp_path / "file").write_text("in the way")
    starts = {"torch": runtime(2.0), "compiled": runtime(1.0)}
    assert choose(starts, KEY, tmp_path / "file" / "runtimes", clock) == "compiled"


def test_the_pictures_to_measure_with_are_the_same_every_time():
    first = textured_patches(64, count=2)
    torch.testing.assert_close(first, textured_patches(64, count=2), atol=0, rtol=0)
    assert first.shape == (2, 3, 64, 64)
    fine = (first[..., 1:] - first[..., :-1]).std()
    assert 0 < fine < first.std()  # neighbours are alike, and not the same


def test_place_names_what_speed_depends_on():
    place = describe_place(
        fingerprint="abc",
        device=torch.device("cpu"),
        processor="Some CPU",
        precision="float32",
        patch_side_px=256,
    )
    assert place["device"] == "cpu: Some CPU"
    assert place["threads"] == str(torch.get_num_threads())
    assert place["torch"] == torch.__version__
    assert place["onnxruntime"]


def test_candidates_on_a_cpu_start_at_once_in_float32():
    assert candidates(torch.device("cpu"), "float32") == ("torch", "onnxruntime")
    assert candidates(torch.device("cuda"), "float32") == ("torch", "compiled", "onnxruntime")
    assert candidates(torch.device("cuda"), "float16") == ("torch", "compiled")


@pytest.mark.slow
def test_auto_gives_the_same_encoder_the_second_time_from_what_it_kept(lite0, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load_encoder("efficientnet_lite0", runtime="auto")
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.suffix for path in kept} == {".json", ".onnx"}
    second = load_encoder("efficientnet_lite0", runtime="auto")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == kept
    assert first.runtime == second.runtime
    assert first.runtime in ("torch", "onnxruntime")
    assert first.fingerprint == second.fingerprint == lite0.fingerprint
    forced = load_encoder("efficientnet_lite0", runtime="onnxruntime")
    patches = textured_patches(256, count=3)
    for encoder in (first, second, forced):
        assert worst_cosine(encoder.encode(patches), lite0.encode(patches)) > 0.9999
    assert forced.runtime == "onnxruntime"
    assert os.environ["XDG_CACHE_HOME"] in str(next(iter(kept)))
