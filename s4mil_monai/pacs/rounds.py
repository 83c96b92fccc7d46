"""run_round(): one pass over a PACS. New slides are fetched and scored, their results stored back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
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


@dataclass(frozen=True)
class Outcome:
    """What became of one series in this pass."""

    series: RemoteSeries
    status: Literal["stored", "failed"]
    detail: str
    """The score in a few words, or the reason."""
    folder: Path | None = None


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
    ):
        """Prepare a pass.

        Args:
            pacs: Where slides are found.
            scorer: Model and encoder.
            out: Folder that gets a folder for each series, and the ledger.
            store: Brings results back.
            target: Names where to; results are stored again if it changes.
            retry_failed: Try slides again that could not be scored.
        """
        self._pacs, self._scorer, self._out = pacs, scorer, out
        self._store, self._target, self._retry_failed = store, target, retry_failed
        self._ledger, self._hospital = Ledger(out), HospitalWriter()

    def run(self) -> Iterator[Outcome]:
        """Bring every new series as far as it goes; what fails is tried again by the next pass.

        Raises:
            PacsError: The PACS cannot be searched.
            OutputError: The folder for results cannot be written.
        """
        for series in self._pacs.search_slides():
            key = key_of(series, self._scorer, self._target)
            state = self._ledger.read(series)
            known = state if state is not None and state.key == key else None
            if known is None or known.stage == "scored" or (known.stage == "failed" and self._retry_failed):
                yield self._attempt(series, key, known)

    def _attempt(self, series: RemoteSeries, key: str, known: SeriesState | None) -> Outcome:
        try:
            return self._bring_through(series, key, known)
        except PacsError as error:
            return Outcome(series, "failed", f"{error}; the next run tries again")
        except SlideError as error:
            self._ledger.write(series, SeriesState(key=key, stage="failed", reason=str(error)))
            return Outcome(series, "failed", str(error))
        except S4MilError as error:
            return Outcome(series, "failed", str(error))
        except OSError as error:
            raise OutputError(str(self._out), f"cannot be written ({error.strerror or error})") from error

    def _bring_through(self, series: RemoteSeries, key: str, known: SeriesState | None) -> Outcome:
        folder = self._out / series.series
        if known is None or known.stage != "scored" or not (folder / "result.json").is_file():
            self._score(series)
            self._ledger.write(series, SeriesState(key=key, stage="scored"))
        files = sorted((folder / DICOM_FOLDER).glob("*.dcm"))
        self._store(files)
        self._ledger.write(series, SeriesState(key=key, stage="stored"))
        return Outcome(series, "stored", f"{len(files)} objects stored in {self._target}", folder)

    def _score(self, series: RemoteSeries) -> None:
        """Fetch a series into a folder of its own, and score it; what was fetched is removed in any case."""
        fetched = self._ledger.folder / "fetched" / _as_name(series.series)
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir(parents=True)
        try:
            for instance in series.instances:
                self._pacs.fetch_instance(series, instance, fetched / f"{_as_name(instance)}.dcm")
            score_to_folder(fetched, self._scorer, self._out, hospital=self._hospital)
        finally:
            shutil.rmtree(fetched, ignore_errors=True)


def _as_name(uid: str) -> str:
    """A UID as a file name; it comes from outside.

    Raises:
        PacsError: It is no UID.
    """
    if not is_uid(uid):
        raise PacsError("search result", "names an object by what is no UID")
    return uid
