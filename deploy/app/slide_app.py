"""The MONAI Deploy application: slides in a folder → results a hospital's systems understand."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application, parse_args

import steps
from operators import PublishOperator, SlideOperator, SlideSourceOperator
from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.errors import OutputError, PathError, S4MilError
from s4mil_monai.models.seal import verify_bundle
from s4mil_monai.outputs.hospital import HospitalWriter
from s4mil_monai.scoring import Scorer, load_scorer
from s4mil_monai.slides.isolation import reader_pool
from s4mil_monai.slides.mixed_folder import Survey, survey_folder
from s4mil_monai.slides.overrides import Overrides, read_overrides
from summary import EXIT_FAILED, Summary

logger = logging.getLogger("s4mil.app")

RESOLUTIONS, STUDIES = "S4MIL_RESOLUTIONS", "S4MIL_STUDIES"
"""Environment variables: tables of the site, as ``s4mil score`` takes them with --resolutions and --studies."""


@dataclass(frozen=True)
class SiteTables:
    """What the site knows about its slides beyond the files."""

    overrides: Overrides | None
    hospital: HospitalWriter
    """Knows the studies."""


class SlideScoringApp(Application):
    """Source → tissue and quality → embedding → aggregation → a writer for each output → published."""

    def __init__(
        self,
        *args: Any,
        survey: Survey,
        scorer: Scorer,
        site: SiteTables,
        out: Path,
        summary: Summary,
        **kwargs: Any,
    ):
        self._survey, self._scorer, self._site = survey, scorer, site
        self._out, self._summary = out, summary
        super().__init__(*args, **kwargs)

    def compose(self) -> None:
        slides, scorer, site = self._survey.slides, self._scorer, self._site
        work = {
            "tissue_and_quality": partial(steps.find_tissue_and_judge, scorer=scorer),
            "embedding": partial(steps.embed_patches, scorer=scorer),
            "aggregation": partial(steps.finish_score, scorer=scorer),
            "heatmap_writer": steps.write_heatmap,
            "geojson_writer": steps.write_regions,
            "report_writer": steps.write_report,
            "dicom_and_fhir_writer": partial(steps.write_for_hospital, writer=site.hospital),
            "result_writer": steps.write_result,
        }
        chain = [
            SlideSourceOperator(
                self,
                CountCondition(self, len(slides)),
                slides=slides,
                out=self._out,
                overrides=site.overrides,
                name="slide_source",
            ),
            *(SlideOperator(self, step, name=name) for name, step in work.items()),
            PublishOperator(self, summary=self._summary, name="publish"),
        ]
        for before, after in pairwise(chain):
            self.add_flow(before, after, {("job", "job")})


def main(argv: Sequence[str]) -> int:
    """Run the application; gives its exit code."""
    given = parse_args(list(argv))  # leaves with 2 where the arguments are wrong
    keep_large_buffers()
    reader_pool().warm_up()
    try:
        return _run(list(argv), Path(given.model or os.environ.get("HOLOSCAN_MODEL_PATH", "models")))
    except S4MilError as error:
        print(f"s4mil app: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_FAILED


def _run(argv: list[str], folder: Path) -> int:
    models = verify_bundle(folder)  # before the SDK's context, which tries to load what it finds there
    site = _read_site()
    context = Application.init_app_context(argv)
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # else a line for every module of every object
    source, out = _existing(context), Path(context.output_path)
    with tempfile.TemporaryDirectory(prefix="s4mil-", dir=_workdir(context)) as staging:
        survey = survey_folder(source, Path(staging))
        summary = _begin_summary(out, survey)
        for path, reason in survey.passed_over.items():
            logger.warning("%s: passed over, %s", path, reason)
        if not survey.slides:
            raise PathError(str(source), "there are no slides in the input folder")
        scorer = load_scorer(models.bundle, encoder_weights=models.encoder_weights, device=_device())
        SlideScoringApp([], survey=survey, scorer=scorer, site=site, out=out, summary=summary).run()
    return summary.exit_code()


def _read_site() -> SiteTables:
    resolutions, studies = os.environ.get(RESOLUTIONS), os.environ.get(STUDIES)
    return SiteTables(
        overrides=read_overrides(resolutions) if resolutions else None,
        hospital=HospitalWriter(Path(studies) if studies else None),
    )


def _existing(context: AppContext) -> Path:
    source = Path(context.input_path)
    if not source.is_dir():
        raise PathError(str(source), "there is no such input folder; give it with -i or HOLOSCAN_INPUT_PATH")
    return source


def _workdir(context: AppContext) -> str | None:
    """Where links to DICOM series may be made; the system's temporary folder by default."""
    workdir = context.workdir
    return workdir if workdir and os.path.isdir(workdir) and os.access(workdir, os.W_OK) else None


def _begin_summary(out: Path, survey: Survey) -> Summary:
    try:
        return Summary(out, survey)
    except OSError as error:
        raise OutputError(str(out), f"cannot be written ({error.strerror})") from error


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
