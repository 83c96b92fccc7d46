"""Slides out of a real PACS, results back into it, and everything that stands in the way."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import highdicom as hd
import pydicom
import pytest
from pydicom.encaps import encapsulate

from s4mil_monai.cli.main import main
from s4mil_monai.cli.pacs import sum_up
from s4mil_monai.outputs.dicom_codes import DECISION
from s4mil_monai.pacs.dimse import StoreTarget, send_files
from s4mil_monai.pacs.errors import PacsError
from s4mil_monai.pacs.rounds import Round
from s4mil_monai.pacs.web import PacsWeb, RemoteSeries
from s4mil_monai.result import read_result
from s4mil_monai.scoring import load_scorer
from s4mil_monai.slides.dicom_header import quiet_pydicom
from s4mil_monai.statistics.calibration import Calibration
from tests.pacs.orthanc import DICOM_PORT, PASSWORD, USER, Orthanc, own_network, why_not

TARGET = StoreTarget("ORTHANC", "127.0.0.1", DICOM_PORT)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with own_network():
        running = Orthanc(tmp_path_factory.mktemp("orthanc"))
        yield running
        running.stop()


@pytest.fixture
def orthanc(server):
    yield server
    server.empty()


@pytest.fixture(scope="module")
def scorer(bundle):
    return load_scorer(bundle)


@pytest.fixture
def pacs():
    return PacsWeb("http://127.0.0.1:8042/dicom-web", user=USER, password=PASSWORD, timeout_s=20)


def as_study(dicom_slide, folder, number):
    """The slide as another study of another patient, its label beside it."""
    level = pydicom.dcmread(next(dicom_slide.iterdir()))
    level.PatientID, level.PatientName = f"P{number}", f"Doe^{number}"
    level.StudyInstanceUID, level.SeriesInstanceUID = f"1.2.{number}.1", f"1.2.{number}.2"
    level.SOPInstanceUID = level.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number}.3"
    level.SeriesDescription, level.Modality = "slide", "SM"
    folder.mkdir(parents=True, exist_ok=True)
    level.save_as(folder / f"level{number}.dcm")
    label = pydicom.dcmread(folder / f"level{number}.dcm")
    label.ImageType = ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]
    label.SOPInstanceUID = label.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number}.4"
    label.save_as(folder / f"label{number}.dcm")
    return folder / f"level{number}.dcm", folder / f"label{number}.dcm"


@pytest.fixture
def one_study(orthanc, pacs, dicom_slide, tmp_path):
    """A patient with one slide in the PACS; gives the file of its level."""
    level, label = as_study(dicom_slide, tmp_path / "source", 1)
    for file in (level, label):
        pacs.store(file)
    return level


@pytest.fixture
def two_studies(orthanc, pacs, dicom_slide, tmp_path):
    """Two patients with one slide each in the PACS; gives the files of the levels."""
    files = [as_study(dicom_slide, tmp_path / "source", number) for number in (1, 2)]
    for pair in files:
        for file in pair:
            pacs.store(file)
    return [level for level, _ in files]


def run_round(pacs, scorer, out, **changes):
    given = {"store": pacs.store_all, "target": pacs.url, "settle_s": 0, **changes}
    return list(Round(pacs, scorer, out, **given).run())


def slides_of(pacs):
    return [listed for found in pacs.search_series() if (listed := pacs.list_instances(found)).instances]


def objects_of(orthanc, number):
    """Modalities of what lies in a study."""
    (study,) = orthanc.find("Study", StudyInstanceUID=f"1.2.{number}.1")
    series = orthanc.get(f"studies/{study}/series")
    return sorted(found["MainDicomTags"]["Modality"] for found in series)


def test_new_slides_are_scored_into_their_studies_and_a_second_pass_finds_nothing(
    orthanc, pacs, two_studies, scorer, tmp_path
):
    outcomes = run_round(pacs, scorer, tmp_path / "out")
    assert [(found.status, found.series.series) for found in outcomes] == [
        ("stored", "1.2.1.2"),
        ("stored", "1.2.2.2"),
    ]
    for number in (1, 2):
        assert objects_of(orthanc, number) == sorted(["SM", "SR", "SEG", "ANN", "OT", "OT"])
        (patient,) = orthanc.find("Patient", PatientID=f"P{number}")
        assert len(orthanc.get(f"patients/{patient}/studies")) == 1
    assert run_round(pacs, scorer, tmp_path / "out") == []
    assert not list((tmp_path / "out" / ".pacs" / "fetched").iterdir())


def decisions_of(orthanc, number):
    """What the reports in a study decide, as the PACS gives them back."""
    found = []
    for instance in orthanc.find("Instance", StudyInstanceUID=f"1.2.{number}.1", Modality="SR"):
        (slide_level, *_) = hd.sr.srread(orthanc.file(instance)).content.get_image_measurement_groups()
        judged = slide_level.get_qualitative_evaluations(name=DECISION)
        found += [(item.value.value, item.value.meaning) for item in judged]
    return sorted(found)


def calibrated(scorer, *, refer):
    """The scorer with a calibration that calls every slide positive, or refers every slide."""
    calibration = Calibration(
        method="temperature",
        classes=2,
        temperature=1.0,
        threshold=0.0,
        refer_low=0.0,
        refer_high=1.0 if refer else 0.0,
        class_floors=(0.5, 0.5),
        alpha=0.1,
        n=10,
        n_patients=10,
        provenance="made up",
    )
    return replace(scorer, calibration=calibration)


def test_rerun_elsewhere_is_what_the_pacs_has(orthanc, pacs, one_study, scorer, tmp_path):
    refers = calibrated(scorer, refer=True)
    run_round(pacs, refers, tmp_path / "a")
    before = orthanc.get("statistics")["CountInstances"]
    run_round(pacs, refers, tmp_path / "b")
    assert orthanc.get("statistics")["CountInstances"] == before
    assert decisions_of(orthanc, 1) == [("refer", "Refer to a pathologist")]


def test_new_calibration_brings_its_decision_into_the_pacs(orthanc, pacs, one_study, scorer, tmp_path):
    run_round(pacs, calibrated(scorer, refer=True), tmp_path / "out")
    (outcome,) = run_round(pacs, calibrated(scorer, refer=False), tmp_path / "out")
    assert (outcome.status, read_result(outcome.folder / "result.json").decision) == ("stored", "positive")
    assert decisions_of(orthanc, 1) == [("10828004", "Positive"), ("refer", "Refer to a pathologist")]


def test_instances_arrive_as_they_are_stored_and_labels_are_not_fetched(pacs, one_study, tmp_path):
    (series,) = slides_of(pacs)
    (instance,) = series.instances  # the label is the other one
    pacs.fetch_instance(series, instance, tmp_path / "fetched.dcm")
    found, stored = pydicom.dcmread(tmp_path / "fetched.dcm"), pydicom.dcmread(one_study)
    assert found.file_meta.TransferSyntaxUID == stored.file_meta.TransferSyntaxUID
    assert found.PixelData == stored.PixelData


def test_results_go_back_by_c_store(orthanc, pacs, one_study, scorer, tmp_path):
    outcomes = run_round(
        pacs, scorer, tmp_path / "out", store=lambda files: send_files(files, TARGET), target=str(TARGET)
    )
    assert [found.status for found in outcomes] == ["stored"]
    assert objects_of(orthanc, 1) == sorted(["SM", "SR", "SEG", "ANN", "OT", "OT"])


def test_overview_of_a_file_slide_is_no_slide_to_score(orthanc, pacs, dicom_slide, tmp_path):
    pacs.store(next(dicom_slide.iterdir()))
    assert len(orthanc.get("instances")) == 1
    assert slides_of(pacs) == []


def test_slide_that_vanishes_is_one_line_and_the_others_go_on(orthanc, pacs, two_studies, scorer, tmp_path):
    run = Round(pacs, scorer, tmp_path / "out", store=pacs.store_all, target=pacs.url, settle_s=0).run()
    assert next(run).status == "stored"
    (study,) = orthanc.find("Study", StudyInstanceUID="1.2.2.1")
    orthanc.session.delete(f"{orthanc.rest}/studies/{study}", timeout=30).raise_for_status()
    (second,) = run
    assert second.status == "failed"
    assert second.detail.endswith("is not there (any more) (HTTP 404); the next run tries again")
    assert not (tmp_path / "out" / "1.2.2.2").exists()
    for file in (tmp_path / "source").glob("*2.dcm"):
        pacs.store(file)  # and it is back
    assert [found.status for found in run_round(pacs, scorer, tmp_path / "out")] == ["stored"]


def test_result_that_could_not_be_stored_is_stored_by_the_next_run_without_scoring(
    orthanc, pacs, one_study, scorer, tmp_path
):
    def refuse(files):
        raise PacsError("pacs", "is full")

    failed = run_round(pacs, scorer, tmp_path / "out", store=refuse)
    assert [found.detail for found in failed] == ["pacs: is full; the next run tries again"]
    written = tmp_path / "out" / "1.2.1.2" / "result.json"
    before = written.stat()
    assert [found.status for found in run_round(pacs, scorer, tmp_path / "out")] == ["stored"]
    assert written.stat().st_mtime_ns == before.st_mtime_ns
    assert "SR" in objects_of(orthanc, 1)


def test_slide_that_cannot_be_scored_is_fetched_once(orthanc, pacs, dicom_slide, scorer, tmp_path):
    level, _ = as_study(dicom_slide, tmp_path / "source", 7)
    broken = pydicom.dcmread(level)
    frames = int(broken.NumberOfFrames)
    broken.PixelData = encapsulate([b"no JPEG at all\0\0"] * frames)
    broken["PixelData"].is_undefined_length = True
    broken.save_as(level)
    pacs.store(level)
    (outcome,) = run_round(pacs, scorer, tmp_path / "out")
    assert (outcome.status, "1.2.7.2" in outcome.detail) == ("failed", True)
    assert run_round(pacs, scorer, tmp_path / "out") == []
    assert len(run_round(pacs, scorer, tmp_path / "out", retry_failed=True)) == 1


def test_series_whose_header_lacks_a_place_is_recorded_and_the_others_go_on(
    orthanc, pacs, dicom_slide, scorer, tmp_path
):
    for number in (1, 2):
        level, _ = as_study(dicom_slide, tmp_path / "source", number)
        if number == 1:
            header = pydicom.dcmread(level)
            del header.TotalPixelMatrixOriginSequence[0].XOffsetInSlideCoordinateSystem
            header.save_as(level)
        pacs.store(level)
    bad, good = run_round(pacs, scorer, tmp_path / "out")
    assert (bad.status, good.status) == ("failed", "stored")
    assert "1.2.1.2: its DICOM header has no TotalPixelMatrixOriginSequence.XOffset" in bad.detail
    assert run_round(pacs, scorer, tmp_path / "out") == []
    (again,) = run_round(pacs, scorer, tmp_path / "out", retry_failed=True)
    assert again.detail == bad.detail


def test_whatever_a_slide_makes_a_library_raise_is_recorded_and_ends_no_pass(pacs, two_studies, scorer, tmp_path):
    broken = replace(scorer, encoder=None)
    outcomes = run_round(pacs, broken, tmp_path / "out")
    assert [found.status for found in outcomes] == ["failed", "failed"]
    assert "1.2.1.2: cannot be scored (AttributeError at " in outcomes[0].detail
    assert run_round(pacs, broken, tmp_path / "out") == []


def test_whatever_storing_raises_ends_no_pass_and_says_nothing_of_what_was_stored(
    orthanc, pacs, two_studies, scorer, tmp_path
):
    def raise_a_name(files):
        raise TypeError("Doe")

    outcomes = run_round(pacs, scorer, tmp_path / "out", store=raise_a_name)
    assert ["does not take the results (TypeError at test_pacs.py:" in found.detail for found in outcomes] == [
        True,
        True,
    ]
    assert not any("Doe" in found.detail for found in outcomes)
    assert [found.status for found in run_round(pacs, scorer, tmp_path / "out")] == ["stored", "stored"]


def test_series_with_a_name_that_leads_out_of_the_folder_ends_no_pass(pacs, one_study, scorer, tmp_path):
    class Strange(PacsWeb):
        def search_series(self):
            return [RemoteSeries("1.2", "../../x"), *super().search_series()]

    strange = Strange(pacs.url, user=USER, password=PASSWORD)
    bad, good = run_round(strange, scorer, tmp_path / "out", store=pacs.store_all)
    assert (bad.status, good.status) == ("failed", "stored")
    assert bad.detail == "search result: names an object by what is no UID; the next run tries again"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}


def test_series_whose_uid_breaks_the_standard_is_one_as_the_others(orthanc, pacs, dicom_slide, tmp_path):
    too_long = f"1.2.{'3' * 61}"  # real ones have 66
    level, _ = as_study(dicom_slide, tmp_path / "source", 1)
    with quiet_pydicom():
        header = pydicom.dcmread(level)
        header.StudyInstanceUID = header.SeriesInstanceUID = too_long
        header.save_as(level)
    pacs.store(level)
    assert [(found.study, found.series) for found in slides_of(pacs)] == [(too_long, too_long)]


class Clock:
    """Time that passes when it is waited for; what happens meanwhile is told it."""

    def __init__(self, *, meanwhile=lambda: None):
        self.time_s, self.waited_s, self._meanwhile = 1_000_000.0, [], meanwhile

    def now(self):
        return self.time_s

    def wait(self, seconds):
        self.waited_s.append(seconds)
        self.time_s += seconds
        self._meanwhile()


def run_settling(pacs, scorer, out, clock):
    return run_round(pacs, scorer, out, settle_s=30, now=clock.now, wait=clock.wait)


def test_series_that_grows_between_two_looks_is_left_for_the_next_pass(
    orthanc, pacs, two_studies, scorer, tmp_path
):
    late = another_instance(two_studies[0], "1.2.1.5")
    clock = Clock(meanwhile=lambda: pacs.store(late))
    outcomes = run_settling(pacs, scorer, tmp_path / "out", clock)
    assert [(found.series.series, found.status) for found in outcomes] == [
        ("1.2.1.2", "arriving"),
        ("1.2.2.2", "stored"),
    ]
    assert outcomes[0].detail == "still arriving (1 instances, then 2); left for the next run"
    assert clock.waited_s == [30]
    assert objects_of(orthanc, 1) == ["SM"]
    assert not (tmp_path / "out" / "1.2.1.2").exists()
    clock.time_s += 10
    (outcome,) = run_settling(pacs, scorer, tmp_path / "out", clock)
    assert (outcome.status, clock.waited_s) == ("stored", [30, 20])
    assert len(outcome.series.instances) == 2


def test_series_seen_unchanged_by_the_last_pass_is_not_waited_for(pacs, one_study, scorer, tmp_path):
    clock = Clock()
    with pytest.raises(PacsError, match="is full"):
        refuse_after_looking(pacs, scorer, tmp_path / "out", clock)
    clock.time_s += 600
    (outcome,) = run_settling(pacs, scorer, tmp_path / "out", clock)
    assert (outcome.status, clock.waited_s) == ("stored", [])
    assert run_settling(pacs, scorer, tmp_path / "out", clock) == []


def refuse_after_looking(pacs, scorer, out, clock):
    """A pass that is cut off while it waits."""

    def cut_off(seconds):
        raise PacsError("pacs", "is full")

    run_round(pacs, scorer, out, settle_s=30, now=clock.now, wait=cut_off)


def another_instance(level, uid):
    """The same pixels once more, as a tile of its own."""
    found = pydicom.dcmread(level)
    found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = uid
    path = level.with_name(f"{uid}.dcm")
    found.save_as(path)
    return path


def test_wrong_password_is_one_line(orthanc):
    stranger = PacsWeb(orthanc.web, user=USER, password="wrong")
    with pytest.raises(PacsError, match=r"refuses the user or the password \(HTTP 401\)"):
        stranger.search_series()


def test_server_that_is_not_there_is_one_line(server):
    with pytest.raises(PacsError, match="cannot be reached, or broke off"):
        PacsWeb("http://127.0.0.1:9/dicom-web").check()


def test_slow_server_is_given_up_after_the_time_that_was_set(server):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(PacsError, match=r"did not answer within 0\.3 s"):
            PacsWeb(url, timeout_s=0.3).check()


def test_answer_that_breaks_off_leaves_no_file(server, tmp_path, dicom_slide):
    body = b"--x\r\nContent-Type: application/dicom\r\n\r\n" + next(dicom_slide.iterdir()).read_bytes()[:50_000]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/related; boundary=x\r\nContent-Length: 900000\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=answer_once, args=(listening, head + body))
        answering.start()
        broken = PacsWeb(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_s=5)
        with pytest.raises(PacsError, match="cannot be reached, or broke off"):
            broken.fetch_instance(RemoteSeries("1.2", "1.3", ("1.4",)), "1.4", tmp_path / "got.dcm")
        answering.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["-1", "soon", "True"])
def test_time_to_settle_that_is_none_is_refused_before_anything_is_asked(given, capfd):
    with pytest.raises(SystemExit) as left:
        main(["pacs", "http://127.0.0.1:9", f"--settle_s={given}"])
    assert left.value.code == 2
    assert "--settle_s is a number of seconds, 0 or more, got" in capfd.readouterr().err


def test_pass_that_leaves_a_series_says_so_in_its_last_line():
    assert sum_up({"stored": 1, "failed": 0, "arriving": 2}) == "1 stored, 0 failed, 2 still arriving"
    assert sum_up({"stored": 0, "failed": 0, "arriving": 1}) == "0 stored, 0 failed, 1 still arriving"


def answer_once(listening, answer):
    connection, _ = listening.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(answer)


def test_peer_that_does_not_know_us_rejects_the_association(orthanc, dicom_slide):
    stranger = StoreTarget("SOMEONE", "127.0.0.1", DICOM_PORT, timeout_s=5)
    with pytest.raises(PacsError, match=r"SOMEONE@127\.0\.0\.1:4242: rejects us"):
        send_files(list(dicom_slide.iterdir()), stranger)
    nobody = StoreTarget("ORTHANC", "127.0.0.1", 9, timeout_s=2)
    with pytest.raises(PacsError, match=r"cannot be reached \(Connection refused\)"):
        send_files(list(dicom_slide.iterdir()), nobody)


def test_command_says_what_was_done_and_then_that_there_is_nothing_to_do(
    orthanc, one_study, bundle, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("s4mil_monai.allocator.keep_large_buffers", lambda: None)
    (tmp_path / "password").write_text(PASSWORD + "\n")
    options = [
        "--user",
        USER,
        "--password_file",
        tmp_path / "password",
        "--bundle",
        bundle,
        "--out",
        tmp_path / "out",
        "--settle_s",
        0,
    ]
    said = []
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            main(["pacs", orthanc.web, *map(str, options)])
        out, complaint = capfd.readouterr()
        assert (left.value.code, complaint) == (0, "")
        said.append(out.splitlines())
    assert said[0][-1] == "1 stored, 0 failed"
    assert said[0][0].startswith("1.2.1.2: 5 objects stored in http://127.0.0.1:8042/dicom-web")
    assert said[1] == ["nothing to do"]
    assert "Doe" not in "\n".join(said[0])


PROGRAM = """
import json, resource, sys
from pathlib import Path
from s4mil_monai.pacs.web import PacsWeb, RemoteSeries
from s4mil_monai.pacs.dimse import StoreTarget, send_files
url, user, password, file, fetched = sys.argv[1:]
pacs = PacsWeb(url, user=user, password=password, timeout_s=120)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pacs.store(Path(file))
(series,) = (pacs.list_instances(found) for found in pacs.search_series())
pacs.fetch_instance(series, series.instances[0], Path(fetched))
send_files([Path(fetched)], StoreTarget("ORTHANC", "127.0.0.1", 4242, timeout_s=120))
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))
"""


@pytest.mark.slow
def test_instance_of_several_hundred_megabytes_needs_a_fraction_of_it_in_memory(orthanc, dicom_slide, tmp_path):
    level, _ = as_study(dicom_slide, tmp_path / "source", 9)
    large = pydicom.dcmread(level)
    frame = bytes(8 << 20)
    large.NumberOfFrames = 40
    large.PixelData = encapsulate([frame] * 40)
    large["PixelData"].is_undefined_length = True
    large.save_as(tmp_path / "large.dcm")
    size = (tmp_path / "large.dcm").stat().st_size
    del large
    given = [orthanc.web, USER, PASSWORD, str(tmp_path / "large.dcm"), str(tmp_path / "fetched.dcm")]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *given], capture_output=True, text=True, check=True)
    assert size > 300 << 20
    assert json.loads(done.stdout) < size / 4
    assert (tmp_path / "fetched.dcm").stat().st_size >= size - 4096
