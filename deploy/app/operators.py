"""Operators: the source opens a slide, each that follows does its work to the slide's job, the last publishes it.

A slide that fails goes on to the end as a failure, so that the next one is not held up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monai.deploy.core import Fragment, Operator, OperatorSpec

from s4mil_monai.errors import OutputError, S4MilError
from s4mil_monai.slides.mixed_folder import FoundSlide
from s4mil_monai.slides.overrides import Overrides
from slide_job import SlideJob
from summary import Summary

logger = logging.getLogger("s4mil.app")

Work = Callable[[SlideJob], None]
"""What is done to a job; raises S4MilError or OSError."""


class SlideSourceOperator(Operator):
    """Opens the slides of the input folder, one each time it runs; it runs as often as there are slides."""

    def __init__(
        self,
        fragment: Fragment,
        *args: Any,
        slides: list[FoundSlide],
        out: Path,
        overrides: Overrides | None = None,
        **kwargs: Any,
    ):
        self._slides, self._out, self._overrides = iter(slides), out, overrides
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        spec.output("job")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        job = SlideJob(next(self._slides), self._out, self._overrides)
        attempt(SlideJob.begin, job)
        op_output.emit(job, "job")


class SlideOperator(Operator):
    """Does its work to a job that has not failed, and passes every job on."""

    def __init__(self, fragment: Fragment, work: Work, *, name: str):
        self._work = work
        super().__init__(fragment, name=name)

    def setup(self, spec: OperatorSpec) -> None:
        spec.input("job")
        spec.output("job")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        job = op_input.receive("job")
        attempt(self._work, job)
        op_output.emit(job, "job")


class PublishOperator(Operator):
    """Lets results appear in the output folder, and adds each slide to the summary."""

    def __init__(self, fragment: Fragment, *args: Any, summary: Summary, **kwargs: Any):
        self._summary = summary
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        spec.input("job")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        job = op_input.receive("job")
        attempt(SlideJob.publish, job)
        self._summary.add(job)


def attempt(work: Work, job: SlideJob) -> None:
    """Do something to a job that has not failed; what goes wrong with the slide or its folder is its failure."""
    if job.failure is not None:
        return
    try:
        work(job)
    except S4MilError as error:
        job.fail(error)
    except OSError as error:
        job.fail(OutputError(str(job.part), f"cannot be written ({error.strerror or error})"))
