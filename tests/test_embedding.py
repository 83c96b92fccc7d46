"""A folder of slides in, one feature file each, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s4mil_monai.embedding import EmbeddingRun, _changed_at, embed_slides, report_run
from s4mil_monai.features.claim import claim
from s4mil_monai.features.store import load_bag
from s4mil_monai.result import PatchSettings
from s4mil_monai.slides.folder import find_slides, name_outputs
from s4mil_monai.slides.overrides import Override, Overrides
from s4mil_monai.slides.pyramid import write_pyramid
from tests.conftest import tissue_picture


@pytest.fixture
def slides(tissue_slide, white_slide, tmp_path) -> Path:
    """A share as it is: good slides, blank glass, an incomplete copy, and something else."""
    folder = tmp_path / "slides"
    (folder / "monday").mkdir(parents=True)
    shutil.copy(tissue_slide, folder / "a.tif")
    shutil.copy(white_slide, folder / "b_white.tif")
    (folder / "c_cut.svs").write_bytes(tissue_slide.read_bytes()[:30_000])
    (folder / "d_text.svs").write_text("not a slide")
    shutil.copy(tissue_slide, folder / "monday" / "e.tif")
    return folder


def files_for(slides: Path, out: Path) -> dict[Path, Path]:
    found = find_slides(slides)
    return {slide: out / f"{name}.h5" for slide, name in name_outputs(found, slides).items()}


@pytest.fixture
def run(lite0) -> EmbeddingRun:
    return EmbeddingRun(lite0, PatchSettings())


def test_bad_slides_do_not_stop_the_others_and_each_has_its_reason(slides, run, tmp_path):
    done = {Path(slide.slide).name: slide for slide in embed_slides(files_for(slides, tmp_path / "out"), run)}
    assert {name: slide.status for name, slide in done.items()} == {
        "a.tif": "embedded",
        "b_white.tif": "failed",
        "c_cut.svs": "failed",
        "d_text.svs": "failed",
        "e.tif": "embedded",
    }
    assert "no tissue" in done["b_white.tif"].reason
    assert "the copy is incomplete" in done["c_cut.svs"].reason
    assert "not a readable slide" in done["d_text.svs"].reason
    bag = load_bag(tmp_path / "out" / "monday" / "e.h5")
    assert (len(bag), done["e.tif"].patches) == (12, 12)
    np.testing.assert_array_equal(bag.features, load_bag(tmp_path / "out" / "a.h5").features)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["a.h5", "e.h5", "monday"]


def test_what_is_there_is_left_alone_until_something_changes(slides, run, tmp_path, tissue_slide):
    files = files_for(slides, tmp_path / "out")
    list(embed_slides(files, run))
    before = {file: file.stat().st_mtime_ns for file in files.values() if file.exists()}
    again = [slide.status for slide in embed_slides(files, run)]
    assert again.count("present") == 2
    assert {file: file.stat().st_mtime_ns for file in before} == before

    other = EmbeddingRun(run.encoder, PatchSettings(min_tissue=0.9))
    done = [slide for slide in embed_slides(files, other) if slide.status == "embedded"]
    assert [slide.reason for slide in done] == ["least share of tissue: 0.5, wanted 0.9"] * 2

    list(embed_slides(files, run))
    changed = bytearray(tissue_slide.read_bytes())
    changed[-1] ^= 1
    (slides / "a.tif").write_bytes(changed)
    os.utime(slides / "a.tif", (time.time() + 60, time.time() + 60))
    statuses = {Path(slide.slide).name: slide.status for slide in embed_slides(files, run)}
    assert (statuses["a.tif"], statuses["e.tif"]) == ("embedded", "present")


def test_slide_of_several_files_has_changed_with_the_last_of_them(tmp_path):
    (tmp_path / "a").mkdir()
    for name, written_s in (("a.mrxs", 100), ("a/Data0000.dat", 300), ("b.mrxs", 500)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (written_s, written_s))
    assert _changed_at(tmp_path / "a.mrxs") == 300
    assert _changed_at(tmp_path / "gone.svs") == 0


def test_slide_whose_level_is_read_as_it_is_counts_as_embedded_at_the_resolution_set(run, tmp_path):
    slide = write_pyramid(tissue_picture(), tmp_path / "near.tif", mpp=0.499)
    files = {slide: tmp_path / "near.h5"}
    assert [slide.status for slide in embed_slides(files, run)] == ["embedded"]
    assert [slide.status for slide in embed_slides(files, run)] == ["present"]


def test_features_of_a_resolution_that_was_corrected_since_are_made_anew(tissue_slide, run, tmp_path):
    files = {tissue_slide: tmp_path / "kept.h5"}

    def embed(mpp: float):
        (done,) = embed_slides(files, replace(run, overrides=Overrides((Override(mpp, slide="*.tif"),))))
        return done

    assert (embed(0.25).patches, embed(0.25).status) == (2, "present")  # fewer are 512 px wide
    anew = embed(0.5)
    assert (anew.status, anew.patches, anew.mpp) == ("embedded", 12, 0.5)
    assert anew.reason == "slide resolution in µm/px: 0.25, wanted 0.5"
    assert load_bag(files[tissue_slide]).origin.slide_mpp == 0.5
    assert [slide.status for slide in embed_slides(files, run)] == ["present"]  # as the file itself says


def test_features_of_a_slide_whose_resolution_nobody_knows_any_more_are_not_called_present(run, tmp_path):
    slide = write_pyramid(tissue_picture(), tmp_path / "silent.tif", mpp=None)
    files = {slide: tmp_path / "silent.h5"}
    told = replace(run, overrides=Overrides((Override(0.5, slide="silent.tif"),)))
    assert [slide.status for slide in embed_slides(files, told)] == ["embedded"]
    kept = files[slide].read_bytes()
    (done,) = embed_slides(files, run)
    assert done.status == "failed"
    assert "no microns-per-pixel in the file" in done.reason
    assert files[slide].read_bytes() == kept


def test_a_slide_another_process_works_on_is_left_to_it(slides, run, tmp_path):
    files = files_for(slides, tmp_path / "out")
    program = "import sys\nfrom pathlib import Path\nfrom s4mil_monai.features.claim import claim\n"
    program += "with claim(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    command = [sys.executable, "-c", program, str(files[slides / "a.tif"])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        done = {Path(slide.slide).name: slide.status for slide in embed_slides(files, run)}
        holder.kill()
    assert (done["a.tif"], done["e.tif"]) == ("busy", "embedded")
    assert not files[slides / "a.tif"].exists()
    assert [slide.status for slide in embed_slides({slides / "a.tif": files[slides / "a.tif"]}, run)] == [
        "embedded"
    ]


def test_claims_are_let_go_when_the_caller_stops_in_the_middle(slides, run, tmp_path):
    files = files_for(slides, tmp_path / "out")
    started = embed_slides(files, run)
    next(started)
    started.close()
    for file in files.values():
        with claim(file):
            pass


def test_report_adds_up_and_says_how_busy_each_stage_was(slides, run, tmp_path):
    done = list(embed_slides(files_for(slides, tmp_path / "out"), run))
    report = report_run(run, done, seconds=10.0)
    assert (report.count("embedded"), report.count("failed")) == (2, 3)
    assert {"opening", "tissue", "quality", "reading", "preparing", "encoding", "writing"} <= set(report.busy)
    encoding = sum(slide.seconds.get("encoding", 0.0) for slide in done)
    assert report.busy["encoding"] == pytest.approx(encoding / 10, abs=1e-3)


def s4mil(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "s4mil_monai", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_names_failures_at_the_end_and_leaves_with_one(slides, tmp_path):
    finished = s4mil("embed", slides, "--out", tmp_path / "out", "--runtime", "torch")
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert len(finished.stderr.splitlines()) == 3
    lines = finished.stdout.splitlines()
    assert [line for line in lines if line.startswith("5 slides: 2 embedded, 3 failed; ")]
    assert sum(line.startswith("failed: ") for line in lines) == 3
    report = json.loads((tmp_path / "out" / "embedding.json").read_text())
    assert [slide["status"] for slide in report["slides"]].count("failed") == 3


def test_killed_at_any_moment_it_goes_on_and_nothing_is_half_written(tissue_slide, tmp_path):
    folder, out = tmp_path / "many", tmp_path / "out"
    folder.mkdir()
    for number in range(6):
        shutil.copy(tissue_slide, folder / f"{number}.tif")
    command = [sys.executable, "-m", "s4mil_monai", "embed", str(folder), "--out", str(out), "--runtime", "torch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("0.h5" in line for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    whole = [load_bag(file) for file in out.glob("*.h5")]  # raises on a damaged one
    assert len(whole) >= 1  # and 6 where this process had to wait for a core
    finished = s4mil("embed", folder, "--out", out, "--runtime", "torch")
    assert finished.returncode == 0
    assert f"{len(whole)} present" in finished.stdout
    assert len([load_bag(file) for file in out.glob("*.h5")]) == 6
    assert not [path for path in out.iterdir() if path.suffix == ".part"]
