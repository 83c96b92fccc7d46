"""`s4mil batch` as cron calls it: real processes, real slides."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading

import pytest

from s4mil_monai.batch.passes import run_passes
from s4mil_monai.batch.states import JobState
from s4mil_monai.cli.batch import parse_duration
from s4mil_monai.cli.usage import UsageError


def results(site):
    return sorted(
        path.parent.relative_to(site.out / "results") for path in site.out.glob("results/*/*/result.json")
    )


def look_again(site):
    """One pass in this process: exit code and line."""
    [done] = run_passes(site.file, stop=threading.Event(), every_s=None, default_bundle=lambda: site.folder)
    return done.exit_code, done.line


def test_new_slides_are_scored_once_and_a_renamed_copy_is_not_new(site):
    site.scan("a.tif", seed=1)
    site.scan("ward/b.tif", seed=2)
    first = site.call("run")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("2 published; open ")
    found = results(site)
    assert len(found) == 2
    for folder in found:  # as sha256sum checks them, without this package
        place = site.out / "results" / folder
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=place, check=True, stdout=-3)

    shutil.copy(site.share / "a.tif", site.share / "copy of a.tif")
    assert look_again(site) == (0, "nothing new")
    assert results(site) == found
    assert len(site.jobs()) == 2


def test_a_bad_slide_is_told_first_and_the_others_are_scored(site):
    site.configure(tries=2)
    whole = site.scan("good.tif", seed=1)
    (site.share / "bad.tif").write_bytes(whole.read_bytes()[:20000])
    done = site.call("run")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert site.states() == {"good.tif": JobState.PUBLISHED, "bad.tif": JobState.QUARANTINED}
    report = json.loads(next(site.out.glob("runs/*/run.json")).read_text())
    assert report["counts"] == {"published": 1, "quarantined": 1}  # slides, not tries: there were two
    assert done.stdout.startswith("1 published; 1 quarantined; open ")
    assert look_again(site) == (0, "nothing new; 1 in quarantine, see `s4mil batch quarantine`")


def test_a_slide_whose_name_is_no_utf_8_is_scored_like_any_other(site):
    """As a scanner's PC writes it whose share is mounted in Latin-1."""
    name = os.fsdecode(b"M\xfcller.tif")
    site.scan("a.tif").rename(site.share / name)
    done = site.call("run")
    assert (done.returncode, site.states()) == (0, {name: JobState.PUBLISHED}), done.stderr
    [folder] = results(site)
    assert (
        json.loads((site.out / "results" / folder / "result.json").read_text())["slide"]["name"]
        == "M\\udcfcller.tif"
    )
    assert "ller" not in done.stderr  # it may be the patient's


def test_standing_scheduler_outlasts_a_share_that_is_away_and_stops_when_asked(site):
    site.scan("a.tif", seed=1)
    process = site.start("run", "--every", "0.2s")
    assert process.stdout is not None
    said = iter(process.stdout.readline, "")
    assert next(said).startswith("1 published; open ")
    site.share.rename(site.folder / "away")
    assert any("is the share mounted?" in line for line in said)
    (site.folder / "away").rename(site.share)
    site.scan("b.tif", seed=2)
    assert any(line.startswith("1 published; open ") for line in said)
    process.send_signal(signal.SIGTERM)
    _, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    assert "Traceback" not in complaints
    assert set(site.states().values()) == {JobState.PUBLISHED}


@pytest.mark.parametrize("every", ["10", "0s", "often", "-1m"])
def test_a_time_that_is_none_is_wrong_use(every):
    with pytest.raises(UsageError, match="--every is a time such as 30s, 10m or 2h"):
        parse_duration("every", every)


def test_times_may_be_in_seconds_minutes_hours_and_days():
    assert [parse_duration("every", text) for text in ("30s", "10m", "1.5h", "1d")] == [30, 600, 5400, 86400]


def test_passes_that_find_nothing_leave_no_report(site):
    assert look_again(site) == (0, "nothing new")
    assert not (site.out / "runs").exists()


def test_a_file_that_cannot_be_read_through_is_told_as_such_until_it_is_asked_for_again(site):
    """Nobody can read a directory that is called like a slide's data file; the pass after it rests."""
    site.configure(backoff_s=3600)
    (site.share / "a.mrxs").write_bytes(b"index")
    (site.share / "a").mkdir()
    (site.share / "a" / "Data.dat").symlink_to("/proc/self/mem")  # reading it is an I/O error
    assert look_again(site) == (1, f"1 could not be looked at; open {next(site.out.glob('runs/*/run.html'))}")
    assert look_again(site) == (0, "1 unreadable, asked for again later")
