"""What the operators do to a slide's job: each step calls one function of s4mil_monai."""

from __future__ import annotations

from s4mil_monai.features.prepare import PreparedSlide
from s4mil_monai.features.store import save_bag
from s4mil_monai.outputs import geojson, heatmap, report
from s4mil_monai.outputs.hospital import HospitalWriter
from s4mil_monai.scoring import Scorer, aggregate, embed_prepared, prepare_or_reject
from slide_job import SlideJob


def find_tissue_and_judge(job: SlideJob, scorer: Scorer) -> None:
    """Find tissue, lay the grid, judge the quality; gives the result of slides that get no score."""
    found = prepare_or_reject(job.slide, scorer, job.stages)
    if isinstance(found, PreparedSlide):
        job.prepared = found
    else:
        job.result = found


def embed_patches(job: SlideJob, scorer: Scorer) -> None:
    """Embed the patches; the slide model reads each chunk of them while the next are still being embedded."""
    if job.prepared is not None:
        job.embedded = embed_prepared(job.prepared, scorer)


def finish_score(job: SlideJob, scorer: Scorer) -> None:
    """End the stream with the slide's score, and keep the features."""
    if job.embedded is not None:
        job.result = aggregate(job.embedded, scorer)
        save_bag(job.part / "features.h5", job.embedded.bag)
        job.embedded = job.prepared = None  # all features of the slide


def write_heatmap(job: SlideJob) -> None:
    """``heatmap.png``; keeps the picture for the writers that follow."""
    job.picture = heatmap.write_heatmap(job.result, job.slide, job.part / "heatmap.png")


def write_regions(job: SlideJob) -> None:
    """``regions.geojson``."""
    geojson.write_geojson(job.result, job.part / "regions.geojson")


def write_report(job: SlideJob) -> None:
    """``report.html``."""
    report.write_report(job.result, job.slide, job.picture, job.part / "report.html")


def write_for_hospital(job: SlideJob, writer: HospitalWriter) -> None:
    """``dicom/*.dcm`` and ``fhir.json``."""
    writer.write(job.result, job.slide, job.picture, job.part)


def write_result(job: SlideJob) -> None:
    """``result.json``, the last file: a folder with it is whole."""
    (job.part / "result.json").write_text(job.result.to_json(), encoding="utf-8")
