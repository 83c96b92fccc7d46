"""Slides are scored on the machines of a Ray cluster as they are on this one, and none is lost with a machine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from s4mil_monai.batch.far_slide import SeenSlide
from s4mil_monai.batch.ray_cluster import plan_actors
from s4mil_monai.batch.reading_actor import ReadingActor
from s4mil_monai.batch.site import read_checked_site
from s4mil_monai.batch.slide_worker import hash_order
from s4mil_monai.batch.states import JobState
from s4mil_monai.batch.work import Began, Failed, Lost, Scored, Work
from s4mil_monai.errors import ClusterError, MissingExtraError
from s4mil_monai.scoring import load_scorer, score_slide
from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.pyramid import write_pyramid
from tests.batch.small_site import SmallSite
from tests.conftest import PINK

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def can_have_a_network() -> bool:
    made = subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return made.returncode == 0


class Trial:
    """An executor with slides for it."""

    def __init__(self, site: SmallSite, executor):
        self.site, self.executor = site, executor

    def submit(self, slide: Path) -> str:
        lease = uuid.uuid4().hex
        self.executor.submit(Work(lease, fingerprint_slide(slide), slide, self.site.folder / "work" / lease))
        return lease

    def wait_for(self, lease: str, *kinds: type):
        """The next event of one of these kinds for a lease; those of others are left out."""
        end = time.monotonic() + 300
        while time.monotonic() < end:
            for event in self.executor.poll(1):
                if event.lease == lease and isinstance(event, kinds):
                    return event
        raise AssertionError(f"{kinds} did not come")


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=with_ray)])
def trial(request, tmp_path_factory, sealed_bundle):
    site = SmallSite(tmp_path_factory.mktemp(request.param), sealed_bundle)
    site.configure(executor=request.param, features="features")
    executor = read_checked_site(site.file, default_bundle=lambda: sealed_bundle).make_executor()
    before = signal.getsignal(signal.SIGTERM)
    executor.start()
    assert signal.getsignal(signal.SIGTERM) is before
    yield Trial(site, executor)
    executor.stop()


def large_slide(folder: Path, name: str) -> Path:
    """144 patches of tissue: some seconds of work."""
    picture = np.full((3072, 3072, 3), PINK, np.int16)
    picture += np.random.default_rng(0).integers(-30, 31, (3072, 3072, 1), np.int16)
    return write_pyramid(picture.astype(np.uint8), folder / name, mpp=0.5)


def test_a_slide_begins_and_gets_the_score_it_has_anywhere(trial, sealed_bundle):
    slide = trial.site.scan("a.tif", seed=1)
    lease = trial.submit(slide)
    assert trial.wait_for(lease, Began, Scored, Failed) == Began(lease)
    scored = trial.wait_for(lease, Scored, Failed)
    assert isinstance(scored, Scored)
    expected = score_slide(slide, load_scorer(sealed_bundle))
    assert scored.facts["patch_order"] == hash_order(expected.patches.top_left_px0)
    assert scored.facts["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert scored.facts["slide"] == expected.slide.model_dump(mode="json", exclude={"name"})
    assert {"opening", "reading", "encoding"} <= scored.facts["seconds"].keys()
    written = {path.name for path in (trial.site.folder / "work" / lease).iterdir()}
    assert written == set(scored.outputs) >= {"result.json", "features.h5", "heatmap.png", "report.html"}


def test_a_slide_with_kept_features_is_not_encoded_again_and_says_how_long_its_look_took(trial):
    slide = trial.site.scan("kept.tif", seed=4)
    first, again = (trial.wait_for(trial.submit(slide), Scored, Failed).facts for _ in range(2))
    assert again["probabilities"] == pytest.approx(first["probabilities"], abs=1e-6)
    assert "encoding" in first["seconds"]
    assert "encoding" not in again["seconds"]
    assert {"opening", "tissue"} <= again["seconds"].keys()


def test_a_slide_without_tissue_has_a_result_that_says_so(trial, white_slide):
    scored = trial.wait_for(trial.submit(white_slide), Scored, Failed)
    assert scored.facts["status"] == "no_tissue"


def test_a_slide_that_fails_says_why_and_leaves_nothing(trial):
    whole = trial.site.scan("whole.tif", seed=2)
    broken = whole.with_name("broken.tif")
    broken.write_bytes(whole.read_bytes()[:20000])
    lease = trial.submit(broken)
    failed = trial.wait_for(lease, Scored, Failed)
    assert isinstance(failed, Failed)
    assert failed.failure.error == "UnreadableSlideError"
    assert not failed.of_the_machine
    assert not (trial.site.folder / "work" / lease).exists()


def test_a_slide_that_is_dropped_is_lost_and_the_next_one_is_scored(trial):
    slide = large_slide(trial.site.share, "large.tif")
    lease = trial.submit(slide)
    trial.wait_for(lease, Began)
    trial.executor.drop(lease)
    assert isinstance(trial.wait_for(lease, Lost, Scored, Failed), Lost)
    assert isinstance(trial.wait_for(trial.submit(trial.site.scan("b.tif", seed=3)), Scored, Failed), Scored)


def test_a_stop_loses_what_is_in_work_and_leaves_no_process(trial):
    slide = large_slide(trial.site.share, "large.tif")
    leases = {trial.submit(slide) for _ in range(2)}
    trial.executor.poll(1)
    events = trial.executor.stop()
    assert {event.lease for event in events if isinstance(event, Lost)} == leases
    assert not processes_of_a_cluster_of(os.getpid())
    assert not list(Path(tempfile.gettempdir()).glob(f"s4mil-ray-*/session_*_{os.getpid()}"))


def processes_of_a_cluster_of(driver: int) -> list[str]:
    """Command lines with the folder of the Ray session that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found.append(path.read_text(errors="replace").replace("\0", " "))
    return [line for line in found if "s4mil-ray-" in line and f"_{driver}/" in line]


@with_ray
@pytest.mark.slow
@pytest.mark.skipif(
    not can_have_a_network(), reason="no network namespace can be made here: unshare -n needs root"
)
def test_no_slide_is_lost_with_a_machine_and_none_is_published_twice(site):
    for number in range(8):
        site.scan(f"{number}.tif", seed=number)
    with tempfile.TemporaryDirectory(prefix="s4mil-") as home:  # short: paths of sockets lie in it
        script = [sys.executable, "-m", "tests.batch.ray_scenario", str(site.folder), str(site.bundle)]
        done = subprocess.run(
            ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *script],
            env={**os.environ, "HOME": home, "RAY_TMPDIR": home, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "LostProcessError" in done.stderr  # a machine died in the middle of a slide
    assert set(site.states().values()) == {JobState.PUBLISHED}
    assert len(list(site.out.glob("results/*/*/result.json"))) == 8
    recorded = [json.loads(link.record)["job"] for link in site.ledger().chain()]
    assert sorted(recorded) == sorted(job.key for job in site.jobs().values())
    assert not list((site.out / ".work").iterdir())  # what processes of dead machines still wrote was swept
    assert done.stdout == ""


@with_ray
@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_a_cluster_that_does_not_answer_is_refused_before_anything_is_touched(site, address):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        site.configure(executor="ray", ray_address=address.format(port=taken.getsockname()[1]))
        with pytest.raises(ClusterError, match=r"nobody answers there .*ray status"):
            read_checked_site(site.file, default_bundle=lambda: site.bundle)
    assert not site.out.exists()


@with_ray
def test_another_server_is_not_taken_for_a_cluster(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site.configure(executor="ray", ray_address=f"127.0.0.1:{server.server_port}")
        with pytest.raises(ClusterError, match="no Ray cluster; is it the right port"):
            read_checked_site(site.file, default_bundle=lambda: site.bundle)
        server.shutdown()


@with_ray
def test_what_is_no_address_of_a_cluster_is_refused(site):
    site.configure(executor="ray", ray_address="head")
    with pytest.raises(ClusterError, match="head: is no address of a Ray cluster; write host:6379"):
        read_checked_site(site.file, default_bundle=lambda: site.bundle)


def test_where_ray_is_missing_the_extra_that_brings_it_is_named(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    site.configure(executor="ray")
    with pytest.raises(MissingExtraError, match=r"s4mil-monai\[ray\]"):
        read_checked_site(site.file, default_bundle=lambda: site.bundle)


def test_a_process_that_was_given_up_gets_no_patches_of_the_slide_that_is_open_now(site):
    settings = read_checked_site(site.file, default_bundle=lambda: site.bundle).worker_settings()
    patches = load_scorer(site.bundle).bundle.settings.patches
    reader = ReadingActor(settings)
    assert reader.load() is None
    works = []
    for number in range(2):
        slide = site.scan(f"{number}.tif", seed=number)
        works.append(Work(f"lease{number}", fingerprint_slide(slide), slide, site.folder / f"part{number}"))
        assert isinstance(reader.open(works[-1], patches), SeenSlide)
    assert isinstance(reader.read_on("lease0"), Failed)
    assert reader.read_on("lease1").start == 0
    reader.let_go("lease0")
    assert reader.finish_reading("lease1").slide_sha256 == works[1].slide
    reader.let_go("lease1")
    assert isinstance(reader.read_on("lease1"), Failed)


@pytest.mark.parametrize("nodes", [[{"CPU": 1}], [{"CPU": 2}], [{"CPU": 2}, {"CPU": 2}], [{"CPU": 64}, {}]])
def test_where_there_is_any_cpu_there_is_room_for_both_kinds_of_actors(nodes):
    plan = plan_actors(nodes, workers=8, readers=24, device="auto")
    assert plan.embedding >= 1
    assert plan.reading >= 1
    assert (plan.embedding + plan.reading) * plan.cpu_share <= sum(node.get("CPU", 0) for node in nodes)


@with_ray
@pytest.mark.gpu
def test_an_embedding_actor_has_a_gpu_of_its_own(site):
    site.configure(executor="ray", device="auto")
    trial = Trial(site, read_checked_site(site.file, default_bundle=lambda: site.bundle).make_executor())
    trial.executor.start()
    try:
        import ray

        assert ray.available_resources().get("GPU", 0) == ray.cluster_resources()["GPU"] - 1
        assert isinstance(trial.wait_for(trial.submit(site.scan("a.tif")), Scored, Failed), Scored)
    finally:
        trial.executor.stop()
