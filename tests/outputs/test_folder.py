"""Folders of results: what is put in place, and what is left of killed processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from s4mil_monai.errors import OutputError, UnreadableSlideError
from s4mil_monai.outputs import folder as folder_module
from s4mil_monai.outputs.folder import DAY_S, check_target, clear_leftovers, whole_folder
from s4mil_monai.processes import name_machine, started_at
from s4mil_monai.slides.reader import open_slide
from tests.outputs.results import make_result


@pytest.fixture
def write_result(tissue_slide):
    """Writes a result of the slide into a folder, or one of another slide of that name."""
    with open_slide(tissue_slide) as slide:

        def write(folder: Path, sha256: str = "ab" * 32) -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").write_text(make_result(slide, sha256=sha256).to_json())
            return folder

        yield write


@contextmanager
def whole_folder_that_fails(target: Path, match: str) -> Iterator[Path]:
    with pytest.raises(OutputError, match=match), whole_folder(target) as part:
        yield part


@pytest.fixture
def dead() -> str:
    """What a process of this machine that has ended is called."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = started_at(process.pid)
        process.kill()
    return f"{process.pid}-{started}@{name_machine()}"


def me() -> str:
    return f"{os.getpid()}-{started_at(os.getpid())}@{name_machine()}"


def test_what_the_dead_have_left_is_put_right(write_result, dead, tmp_path):
    write_result(tmp_path / f".free.{dead}.old")
    write_result(tmp_path / "taken")
    write_result(tmp_path / f".taken.{dead}.old")
    write_result(tmp_path / f".a.b.svs.{dead}.part")
    clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["free", "taken"]


def test_a_number_that_another_process_has_now_is_no_life(write_result, tmp_path):
    write_result(tmp_path / f".a.{os.getpid()}-1@{name_machine()}.part")  # the first process of the machine
    clear_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_may_be_a_living_processs_and_what_is_not_ours_stays(write_result, dead, tmp_path):
    elsewhere = dead.replace("@", "@other.")
    kept = [f".a.{me()}.part", f".b.{me()}.old", f".c.{elsewhere}.part", f".d.{elsewhere}.old"]
    kept += [".e.1.old", "f.part"]
    for name in kept:
        write_result(tmp_path / name)
    (tmp_path / f".g.{dead}.part").write_text("a file")
    clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, f".g.{dead}.part"])


def test_what_another_machine_left_a_day_ago_is_nobodys(write_result, dead, tmp_path, monkeypatch):
    elsewhere = dead.replace("@", "@other.")
    write_result(tmp_path / f".c.{elsewhere}.part")
    write_result(tmp_path / f".d.{elsewhere}.old")
    in_a_day = time.time() + DAY_S + 1
    monkeypatch.setattr(folder_module.time, "time", lambda: in_a_day)
    clear_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["d"]


def test_result_set_aside_is_not_removed_for_one_of_another_slide(write_result, dead, tmp_path):
    write_result(tmp_path / f".a.{dead}.old", sha256="11" * 32)
    write_result(tmp_path / "a", sha256="22" * 32)
    clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f".a.{dead}.old", "a"]


def test_result_of_another_slide_that_came_meanwhile_is_not_replaced(write_result, tmp_path):
    with whole_folder_that_fails(tmp_path / "a", r"another slide called tissue\.tif") as part:
        write_result(part, sha256="11" * 32)
        write_result(tmp_path / "a", sha256="22" * 32)
    assert "22" * 32 in (tmp_path / "a" / "result.json").read_text()
    assert os.listdir(tmp_path) == ["a"]


def test_new_result_that_cannot_get_its_name_leaves_it_to_the_earlier_one(write_result, tmp_path, monkeypatch):
    write_result(tmp_path / "a")
    real = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.suffix == ".part":
            raise PermissionError(13, "Permission denied")
        return real(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with whole_folder_that_fails(tmp_path / "a", "Permission denied") as part:
        write_result(part)
    assert os.listdir(tmp_path) == ["a"]


def test_slide_that_cannot_be_read_replaces_no_result(write_result, tissue_slide, tmp_path, monkeypatch):
    def away(path: Path) -> str:
        raise OSError(5, "Input/output error")

    write_result(tmp_path / "tissue")
    monkeypatch.setattr(folder_module, "fingerprint_slide", away)
    with pytest.raises(UnreadableSlideError, match=r"tissue\.tif: cannot be read \(Input/output error\)"):
        check_target(tmp_path, tissue_slide)
