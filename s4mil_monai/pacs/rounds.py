"""Round: one pass over a PACS. New slides are fetched and scored, their results stored back."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s4mil_monai.errors import OutputError, S4MilError, SlideError
from s4mil_monai.outputs.hospital import DICOM_FOLDER, HospitalWriter
from s4mil_monai.pacs.errors import PacsError
from s4mil_monai.pacs.ledger import Ledger, SeriesState, key_of
from s4mil_monai.pacs.web import PacsWeb, RemoteSeries
from s4mil_monai.scoring import Scorer, score_to_folder
from s4mil_monai.slides.dicom_header import is_uid

Store = Callable[[Sequence[Path]], None]
"""Brings DICOM files into a PACS; raises PacsError."""


SETTLE_S = 30.0
"""A scanner sends the levels of a slide one after the other; a series seen unchanged for so long is whole."""


@dataclass(frozen=True)
class Outcome:
    """What became of one series in this pass."""

    series: RemoteSeries
    status: Literal["stored", "failed", "arriving"]
    """``arriving``: more of it came while we waited, so it is left for the next pass."""
    detail: str
    """The score in a few words, or the reason."""
    folder: Path | None = None


@dataclass(frozen=True)
class Job:
    """A series that there is something to do for."""

    series: RemoteSeries
    key: str
    """As :func:`s4mil_monai.pacs.ledger.key_of` makes it."""
    since_s: float
    """Since when it is known to have these instances, in Unix time."""
    scored: bool
    """Its result has only to be stored."""


class Round:
    """One pass: what it needs for every series."""

    def __init__(
        self,
        pacs: PacsWeb,
        scorer: Scorer,
        out: Path,
        *,
        store: Store,
        target: str,
        retry_failed: bool = False,
        settle_s: float = SETTLE_S,
        now: Callable[[], float] = time.time,
        wait: Callable[[float], None] = time.sleep,
    ):
        """Prepare a pass.

        Args:
            pacs: Where slides are found.
            scorer: Model and encoder.
            out: Folder that gets a folder for each series, and the ledger.
            store: Brings results back.
            target: Names where to; results are stored again if it changes.
            retry_failed: Try slides again that could not be scored.
            settle_s: Seconds for which a series must have had the same instances before it is scored.
            now: Unix time, in seconds.
            wait: Waits so many seconds.
        """
        self._pacs, self._scorer, self._out = pacs, scorer, out
        self._store, self._target, self._retry_failed = store, target, retry_failed
        self._settle_s, self._now, self._wait = settle_s, now, wait
        self._ledger, self._hospital = Ledger(out), HospitalWriter()

    def run(self) -> Iterator[Outcome]:
        """Bring every new series as far as it goes; what fails is tried again by the next pass.

        Series that are seen for the first time may still be arriving: they come last, after one wait for all.

        Raises:
            PacsError: The PACS cannot be searched.
            OutputError: The folder for results cannot be written.
        """
        jobs: list[Job] = []
        for found in self._pacs.search_series():
            job = self._find_job(found)
            if isinstance(job, Outcome):
                yield job
            elif job is not None:
                jobs.append(job)
        looked_s = self._now()
        settled = [job for job in jobs if looked_s - job.since_s >= self._settle_s]
        unsettled = [job for job in jobs if looked_s - job.since_s < self._settle_s]
        for job in settled:
            yield self._attempt(job)
        self._wait_for(unsettled)
        for job in unsettled:
            yield self._attempt_if_settled(job)

    def _find_job(self, found: RemoteSeries) -> Job | Outcome | None:
        """What there is to do for a series; an outcome where that cannot be found out, None where nothing is."""
        series = self._list(found)
        if isinstance(series, Outcome) or not series.instances:
            return series if isinstance(series, Outcome) else None
        key = key_of(series, self._scorer, self._target)
        state = self._ledger.read(series)
        stage = state.stage if state is not None and state.key == key else None
        if stage == "stored" or (stage == "failed" and not self._retry_failed):
            return None
        with self._writing():
            since_s = self._ledger.note(series, now_s=self._now())
        return Job(series, key, since_s, scored=stage == "scored")

    def _list(self, series: RemoteSeries) -> RemoteSeries | Outcome:
        """The series with its instances; an outcome where the server, which is there, cannot list them.

        Raises:
            PacsError: The server is not there any more.
        """
        try:
            return self._pacs.list_instances(series)
        except PacsError as error:
            self._pacs.check()
            return Outcome(series, "failed", f"{error}; the next run tries again")

    def _wait_for(self, unsettled: list[Job]) -> None:
        """Wait until all of them have been seen for long enough."""
        left_s = max((job.since_s + self._settle_s - self._now() for job in unsettled), default=0.0)
        if left_s > 0:
            self._wait(left_s)

    def _attempt_if_settled(self, job: Job) -> Outcome:
        """Look at a series again, and leave it if it has changed."""
        series = self._list(job.series)
        if isinstance(series, Outcome):
            return series
        if series.instances == job.series.instances:
            return self._attempt(job)
        with self._writing():
            self._ledger.note(series, now_s=self._now())
        change = f"{len(job.series.instances)} instances, then {len(series.instances)}"
        return Outcome(series, "arriving", f"still arriving ({change}); left for the next run")

    def _attempt(self, job: Job) -> Outcome:
        with self._writing():
            try:
                return self._bring_through(job)
            except PacsError as error:
                return Outcome(job.series, "failed", f"{error}; the next run tries again")
            except SlideError as error:
                self._ledger.write(job.series, SeriesState(key=job.key, stage="failed", reason=str(error)))
                return Outcome(job.series, "failed", str(error))
            except S4MilError as error:
                return Outcome(job.series, "failed", str(error))
            except MemoryError:
                return Outcome(job.series, "failed", "memory is not enough; the next run tries again")

    def _bring_through(self, job: Job) -> Outcome:
        folder = self._out / job.series.series
        if not job.scored or not (folder / "result.json").is_file():
            self._score(job.series)
            self._ledger.write(job.series, SeriesState(key=job.key, stage="scored"))
        files = sorted((folder / DICOM_FOLDER).glob("*.dcm"))
        self._store_all(files)
        self._ledger.write(job.series, SeriesState(key=job.key, stage="stored"))
        return Outcome(job.series, "stored", f"{len(files)} objects stored in {self._target}", folder)

    def _score(self, series: RemoteSeries) -> None:
        """Fetch a series into a folder of its own, and score it; what was fetched is removed in any case.

        Raises:
            SlideError: It cannot be scored, whatever a library raises of what is in it.
        """
        fetched = self._ledger.folder / "fetched" / series.series
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir(parents=True)
        try:
            for instance in series.instances:
                self._pacs.fetch_instance(series, instance, fetched / f"{_as_name(instance)}.dcm")
            score_to_folder(fetched, self._scorer, self._out, hospital=self._hospital)
        except (S4MilError, OSError, MemoryError):
            raise
        except Exception as error:  # damaged files find places that nobody thought of; the other series go on
            raise SlideError(series.series, f"cannot be scored ({_where(error)})") from error
        finally:
            shutil.rmtree(fetched, ignore_errors=True)

    def _store_all(self, files: list[Path]) -> None:
        try:
            self._store(files)
        except (S4MilError, MemoryError):
            raise
        except Exception as error:  # of libraries that talk to other people's servers
            raise PacsError(self._target, f"does not take the results ({_where(error)})") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the file system refuses ends the pass.

        Raises:
            OutputError: It refused.
        """
        try:
            yield
        except OSError as error:
            raise OutputError(str(self._out), f"cannot be written ({error.strerror or error})") from error


def _where(error: Exception) -> str:
    """Kind of an error and the line that raised it; what it says may quote a header, and so a name."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"


def _as_name(uid: str) -> str:
    """A UID as a file name; it comes from outside.

    Raises:
        PacsError: It is no UID.
    """
    if not is_uid(uid):
        raise PacsError("search result", "names an object by what is no UID")
    return uid
