"""What a process that scores makes of errors that are not the slide's."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import h5py
import pytest

from s4mil_monai.batch import slide_worker
from s4mil_monai.batch.local_executor import LocalExecutor
from s4mil_monai.batch.scoring_process import run_pipeline
from s4mil_monai.batch.site import read_checked_site
from s4mil_monai.batch.slide_worker import Opened, SlideWorker, _keep, describe_failure, name_device
from s4mil_monai.batch.work import Began, EndedElsewhereError, Failed, Scored, Work
from s4mil_monai.errors import UnreadableSlideError
from s4mil_monai.features.store import load_bag
from s4mil_monai.slides.fingerprint import fingerprint_slide
from tests.features.test_store import make_bag


@pytest.fixture
def worker(site):
    return SlideWorker(read_checked_site(site.file, default_bundle=lambda: site.bundle).worker_settings())


@pytest.fixture
def work(site):
    slide = site.scan("a.tif", seed=1)
    return Work("lease", fingerprint_slide(slide), slide, site.folder / "part")


def test_features_kept_under_a_resolution_that_was_corrected_since_are_not_used(site, work):
    """Nor does the score rest on them: it is that of a slide scored for the first time."""

    def score(mpp: float, **settings):
        (site.folder / "resolutions.csv").write_text(f"slide,scanner,mpp\na.tif,,{mpp}\n")
        site.configure(resolutions="resolutions.csv", ignore_quality=True, **settings)
        worker = SlideWorker(read_checked_site(site.file, default_bundle=lambda: site.bundle).worker_settings())
        opened = worker.prepare(work)
        assert isinstance(opened, Opened)
        kept = worker._recall(opened.found) is not None  # type: ignore[arg-type]
        embedded = worker.embed(opened)
        assert isinstance(embedded, Opened)
        assert isinstance(worker.write(embedded), Scored)
        return kept, embedded.result

    features = {"features": "kept"}
    assert score(0.25, **features)[0] is False
    assert score(0.25, **features)[0] is True
    kept, result = score(0.5, **features)
    fresh = score(0.5)[1]
    assert kept is False
    assert result.patches is not None
    assert (result.slide.mpp, len(result.patches.top_left_px0), result.patches.side_px0) == (0.5, 12, 256)
    assert result.patches == fresh.patches
    assert result.logits == fresh.logits
    (file,) = (site.folder / "kept").iterdir()
    assert load_bag(file).origin.slide_mpp == 0.5


def given_up():
    raise EndedElsewhereError
    yield


def test_a_slide_that_came_to_an_end_where_it_was_read_is_not_looked_into_again(worker, work):
    opened = worker.prepare(work)
    assert isinstance(opened, Opened)
    with pytest.raises(EndedElsewhereError):
        worker.embed(opened, given_up())
    assert work.part.exists()  # it is another's


def test_a_slide_that_cannot_be_measured_for_drift_keeps_its_score(worker, work, monkeypatch, caplog):
    def fail(*_):
        raise FloatingPointError("overflow")

    monkeypatch.setattr(slide_worker, "measure_slide", fail)
    events: list = []
    with caplog.at_level(logging.ERROR):
        run_pipeline(iter([work]), worker, events.append)
    assert [type(event) for event in events] == [Began, Scored]
    assert events[1].measures is None
    assert "cannot be measured for drift" in caplog.text


@pytest.mark.parametrize("place", ["writing", "telling"])
def test_an_error_in_the_thread_that_writes_is_told(work, place):
    """A real pipeline; its worker does nothing but what the test is about."""
    events: list = []

    def write(opened):
        if place == "writing":
            raise ValueError("no JSON")
        return Scored(work.lease, {}, {}, {})

    def tell(event):
        if place == "telling" and isinstance(event, Scored):
            raise TypeError("cannot be pickled")
        events.append(event)

    opened = SimpleNamespace(work=work)
    nothing = SimpleNamespace(prepare=lambda _: opened, embed=lambda _: opened, write=write)
    run_pipeline(iter([work]), nothing, tell)  # type: ignore[arg-type]
    assert [type(event) for event in events] == [Began, Failed]


def test_a_failure_is_text_that_any_database_takes(work):
    found = describe_failure(work, UnreadableSlideError("a.tif", "page \x00 of M\udcfcller"))
    assert found.failure.reason == r"page \x00 of M\udcfcller"


def test_processes_without_ray_know_which_of_them_they_are(site):
    settings = read_checked_site(site.file, default_bundle=lambda: site.bundle).worker_settings()
    processes = LocalExecutor(settings, workers=3)._processes
    assert [process._settings.process for process in processes] == [0, 1, 2]


@pytest.mark.gpu
def test_a_model_is_loaded_on_the_gpu_of_its_process(site):
    import torch

    site.configure(device="auto")
    settings = read_checked_site(site.file, default_bundle=lambda: site.bundle).worker_settings()
    for process in range(2):
        loaded = SlideWorker(dataclasses.replace(settings, process=process))
        wanted = name_device("auto", process, torch.cuda.device_count())
        assert loaded.scorer.encoder.device == torch.device(wanted)


def test_features_that_are_kept_already_and_files_of_others_are_left_alone(tmp_path):
    bag, path = make_bag(), tmp_path / "kept.h5"
    _keep(path, bag)
    before = path.stat().st_ino
    _keep(path, bag)
    assert path.stat().st_ino == before
    other = dataclasses.replace(bag, origin=dataclasses.replace(bag.origin, scan_order="hilbert"))
    _keep(path, other)
    assert load_bag(path).origin == other.origin
    path.write_bytes(path.read_bytes()[:100])  # cut short
    _keep(path, bag)
    assert load_bag(path).origin == bag.origin
    with h5py.File(path, "w") as file:
        file["features"] = [[1.0]]  # of another tool
    theirs = path.read_bytes()
    _keep(path, bag)
    assert path.read_bytes() == theirs
