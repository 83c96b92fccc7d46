"""Which slides are new and whole: files that are being copied, moved, renamed, or made of several parts."""

from __future__ import annotations

import os
import shutil

import pytest

from s4mil_monai.batch.database import Database
from s4mil_monai.batch.intake import Intake
from s4mil_monai.batch.ledger import JobKind, Ledger
from s4mil_monai.batch.settings import read_site
from s4mil_monai.slides.fingerprint import fingerprint_slide

KIND = JobKind("m" * 64, "s" * 64, "tiny-1.0")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def intake(site, clock):
    """Of a site whose files settle within a minute."""
    return make_intake(site, clock)


def make_intake(site, clock, kind=KIND, **settings):
    site.configure(settle_s=60, **settings)
    site.out.mkdir(exist_ok=True)
    database = Database(f"sqlite:///{site.folder / 'ledger.sqlite'}", clock=clock)
    return Intake(read_site(site.file), Ledger(database, lease_s=5, tries=3, losses=5, backoff_s=0), kind)


def put(site, name, content=b"pixels"):
    path = site.share / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names(look):
    return [candidate.name for candidate in look.new]


def take_in(intake, look):
    return [intake.add(found, found.slide or fingerprint_slide(found.path)) for found in look.new]


def test_a_file_counts_when_it_has_not_changed_for_a_minute(site, intake, clock):
    path = put(site, "a.svs")
    assert (names(intake.look()), intake.look().changing) == ([], ["a.svs"])
    clock.now_s += 59
    assert intake.look().changing == ["a.svs"]
    clock.now_s += 1
    assert names(intake.look()) == ["a.svs"]
    path.write_bytes(b"pixels and more pixels")  # the copy went on
    assert (names(intake.look()), intake.look().changing) == ([], ["a.svs"])
    clock.now_s += 60
    assert names(intake.look()) == ["a.svs"]


def test_a_file_whose_size_stays_and_time_moves_is_still_being_written(site, intake, clock):
    path = put(site, "a.svs", bytes(100))
    intake.look()
    clock.now_s += 60
    os.utime(path, ns=(5, 5))  # preallocated, written in place
    assert intake.look().changing == ["a.svs"]


def test_a_clock_that_is_set_back_costs_one_more_minute(site, intake, clock):
    put(site, "a.svs")
    intake.look()
    clock.now_s -= 86400
    assert intake.look().changing == ["a.svs"]
    clock.now_s += 60
    assert names(intake.look()) == ["a.svs"]


def test_a_slide_that_changes_while_it_is_read_through_is_not_taken(site, intake, clock):
    path = put(site, "a.svs")
    intake.look()
    clock.now_s += 60
    found = intake.look().new[0]
    fingerprint = fingerprint_slide(path)
    path.write_bytes(b"others")
    assert intake.add(found, fingerprint) is False


def test_a_renamed_copy_is_the_same_slide(site, intake, clock):
    put(site, "a.svs")
    put(site, "ward/copy of a.svs")
    intake.look()
    clock.now_s += 60
    assert take_in(intake, intake.look()) == [True, False]
    assert intake.look().new == []
    shutil.move(site.share / "a.svs", site.share / "moved.svs")
    intake.look()
    clock.now_s += 60
    assert take_in(intake, intake.look()) == [False]
    assert intake.look().new == []


def test_a_slide_is_found_where_it_lies_now(site, intake, clock):
    path = put(site, "a.svs")
    other = put(site, "b/a.svs")
    intake.look()
    clock.now_s += 60
    take_in(intake, intake.look())
    slide = fingerprint_slide(path)
    path.unlink()
    assert intake.find_place(slide, str(path)) == other
    other.unlink()
    assert intake.find_place(slide, str(path)) is None


def test_another_slide_in_its_place_is_not_taken_for_it(site, intake, clock):
    """A scanner begins anew at scan001 every day."""
    path = put(site, "scan001.svs", b"of yesterday")
    intake.look()
    clock.now_s += 60
    take_in(intake, intake.look())
    slide = fingerprint_slide(path)
    assert intake.find_place(slide, str(path)) == path
    put(site, "scan001.svs", b"of today")
    assert intake.find_place(slide, str(path)) is None  # though nothing has looked since
    intake.look()
    assert intake.find_place(slide, str(path)) is None
    kept = put(site, "archive/scan001.svs", b"of yesterday")
    intake.look()
    clock.now_s += 60
    take_in(intake, intake.look())
    assert intake.find_place(slide, str(path)) == kept


def test_another_model_makes_new_work_without_reading_the_files_again(site, intake, clock):
    put(site, "a.svs")
    intake.look()
    clock.now_s += 60
    take_in(intake, intake.look())
    other = make_intake(site, clock, JobKind("n" * 64, KIND.settings, "tiny-2.0"))
    assert [found.slide is not None for found in other.look().new] == [True]
    assert take_in(other, other.look()) == [True]
    assert intake.look().new == other.look().new == []


def test_a_slide_of_several_files_is_one_and_whole_when_all_are(site, intake, clock):
    path = put(site, "a.mrxs", b"index")
    put(site, "a/Data0001.dat", b"12")
    intake.look()
    clock.now_s += 60
    before = fingerprint_slide(path)
    put(site, "a/Data0002.dat", b"34")  # the scanner goes on
    assert (names(intake.look()), intake.look().changing) == ([], ["a.mrxs"])
    clock.now_s += 60
    assert names(intake.look()) == ["a.mrxs"]
    assert fingerprint_slide(path) != before


def test_a_dicom_series_is_one_slide_wherever_its_files_lie(site, intake, clock, dicom_slide):
    shutil.copytree(dicom_slide, site.share / "series")
    shutil.copy(next(dicom_slide.iterdir()), site.share / "among others.dcm")
    put(site, "a.svs")
    intake.look()
    clock.now_s += 60
    look = intake.look()
    assert sorted(names(look)) == ["a.svs", "among others.dcm", "series/level0.dcm"]
    assert [path for path in (found.path for found in look.new) if not path.exists()] == []
    assert sorted(take_in(intake, look)) == [False, True, True]  # the series is the same in both places
    assert intake.look().new == []


def test_a_worklist_names_slides_and_a_bad_row_is_that_rows_problem(site, clock):
    put(site, "a.svs")
    rows = ["ward,slide", "3,share/a.svs", "3,share/gone.svs", "3,", "3", f"3,{'x' * 300}", "3,\0"]
    (site.folder / "list.csv").write_text("\n".join(rows))
    intake = make_intake(site, clock, sources=[{"worklist": "list.csv"}])
    intake.look()
    clock.now_s += 60
    look = intake.look()
    assert names(look) == ["share/a.svs"]
    assert look.problems == {
        "list.csv line 3": "there is no slide share/gone.svs",
        "list.csv line 4": "there is no slide (empty)",
        "list.csv line 5": "there is no slide (empty)",
        "list.csv line 6": f"there is no slide {'x' * 300}",
        "list.csv line 7": "there is no slide \0",
    }


def test_a_share_that_is_away_is_a_problem_and_nothing_is_forgotten(site, intake, clock):
    put(site, "a.svs")
    intake.look()
    clock.now_s += 60
    site.share.rename(site.folder / "away")
    look = intake.look()
    assert look.new == []
    assert "is the share mounted" in look.problems[str(site.folder / "share")]
    (site.folder / "away").rename(site.share)
    assert names(intake.look()) == ["a.svs"]


def test_an_empty_mount_point_is_a_problem_where_slides_had_been(site, intake, clock):
    """What is left of a share that was unmounted is an empty folder on another device."""
    assert intake.look().problems == {}
    path = put(site, "a.svs")
    intake.look()
    path.unlink()
    with intake._ledger.database._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE sources SET device = 'another'")
    assert intake.look().problems == {str(site.share): "there is no slide left in it; is the share mounted?"}


def test_a_pipe_that_is_called_like_a_slide_is_a_problem_and_nobody_waits_for_it(site, intake, clock):
    os.mkfifo(site.share / "a.svs")
    put(site, "b.svs")
    assert "is a pipe or a device, not a file" in intake.look().problems["a.svs"]
    clock.now_s += 60
    assert names(intake.look()) == ["b.svs"]


def test_a_file_that_cannot_be_read_through_is_tried_less_and_less_often(site, clock):
    intake = make_intake(site, clock, tries=3, backoff_s=600)
    path = put(site, "a.svs")
    intake.look()
    clock.now_s += 60
    for pause_s in (600, 1200, 86400, 86400):
        look = intake.look()
        assert names(look) == ["a.svs"]
        intake.fail(look.new[0])
        clock.now_s += pause_s - 1
        look = intake.look()
        assert (look.new, look.resting, look.problems) == ([], ["a.svs"], {})
        clock.now_s += 1
    intake.fail(intake.look().new[0])
    path.write_bytes(b"copied once more")
    intake.look()
    clock.now_s += 60
    assert take_in(intake, intake.look()) == [True]


def test_a_pause_ends_when_the_clock_is_set_back(site, clock):
    intake = make_intake(site, clock, tries=1)
    put(site, "a.svs")
    clock.now_s += 2 * 86400
    intake.look()
    clock.now_s += 60
    intake.fail(intake.look().new[0])
    clock.now_s -= 86400
    intake.look()
    clock.now_s += 60
    assert names(intake.look()) == ["a.svs"]


def test_an_inbox_that_was_emptied_is_no_problem(site, intake, clock):
    path = put(site, "a.svs")
    intake.look()
    path.unlink()
    assert intake.look().problems == {}
