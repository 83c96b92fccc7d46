"""PacsWeb: the searching, fetching and storing that DICOMweb offers, with one clear line where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from s4mil_monai.extras import require
from s4mil_monai.outputs.dicom_overview import OVERVIEW_DESCRIPTION
from s4mil_monai.pacs.errors import PacsError
from s4mil_monai.pacs.multipart import PIECE, MultipartFile, NotMultipartError, boundary_of, copy_first_part
from s4mil_monai.slides.dicom_header import WHOLE_SLIDE, is_uid
from s4mil_monai.whole_file import write_whole

AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
"""Without the transfer syntax a server may decompress: ten times the bytes, and other ones than were scanned."""

NOT_PIXELS_OF_TISSUE = {"LABEL", "OVERVIEW"}
"""In ImageType; not even fetched: they may show names."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RemoteSeries:
    """A series of whole slide images in a PACS."""

    study: str
    series: str
    instances: tuple[str, ...] = ()
    """SOP instance UIDs, sorted; of the pyramid's levels where the PACS says which those are."""


class PacsWeb:
    """A DICOMweb server."""

    def __init__(
        self,
        url: str,
        *,
        user: str | None = None,
        password: str | None = None,
        ca_file: str | None = None,
        timeout_s: float = 30.0,
    ):
        """Prepare to talk to a server; nothing is sent yet.

        Args:
            url: Root of its DICOMweb services.
            user: For basic authentication, with ``password``.
            password: Never shown.
            ca_file: Certificates to trust instead of the public ones.
            timeout_s: How long an answer, or its next piece, may take.

        Raises:
            MissingExtraError: dicomweb-client is not installed.
        """
        api = require("dicomweb_client.api", extra="pacs")
        self._requests = require("requests", extra="pacs")
        self._session = self._requests.Session()
        if user is not None:
            self._session.auth = (user, password or "")
        if ca_file is not None:
            self._session.verify = ca_file
        self.url, self._timeout_s = url.rstrip("/"), timeout_s
        self._client = api.DICOMwebClient(self.url, session=self._session, timeout=timeout_s, permissive_uid=True)
        self._client.set_http_retry_params(retry=False)  # else a refused connection takes half a minute

    def check(self) -> None:
        """Ask for one series, to see whether the server is there and lets us in.

        Raises:
            PacsError: It is not, or does not.
        """
        self._ask(lambda: self._client.search_for_series(limit=1))

    def search_series(self) -> list[RemoteSeries]:
        """Every series that may be of slides, but for overviews that this package made; instances not yet listed.

        Raises:
            PacsError: The server cannot be asked.
        """
        found = self._ask(
            lambda: self._client.search_for_series(
                search_filters={"Modality": "SM"}, fields=["SeriesDescription"], get_remaining=True
            )
        )
        pairs = [(_value(row, "0020000D"), _value(row, "0020000E"), _value(row, "0008103E")) for row in found]
        wanted = sorted({(study, series) for study, series, text in pairs if text != OVERVIEW_DESCRIPTION})
        return [RemoteSeries(study, series) for study, series in wanted]

    def list_instances(self, wanted: RemoteSeries) -> RemoteSeries:
        """The series with the instances that it has now; none where it is of something else, or gone.

        Raises:
            PacsError: The server cannot be asked, or names the series by what is no UID.
        """
        for uid in (wanted.study, wanted.series):
            if not is_uid(uid):
                raise PacsError("search result", "names an object by what is no UID")
        rows = self._ask(
            lambda: self._client.search_for_instances(
                wanted.study, wanted.series, fields=["ImageType", "SOPClassUID"], get_remaining=True
            )
        )
        slides = [row for row in rows if _value(row, "00080016") == WHOLE_SLIDE]
        kept = [row for row in slides if not NOT_PIXELS_OF_TISSUE & set(_values(row, "00080008"))]
        return replace(wanted, instances=tuple(sorted(_value(row, "00080018") for row in kept)))

    def fetch_instance(self, wanted: RemoteSeries, instance: str, target: Path) -> None:
        """Write one instance as the PACS has it, compressed as it was stored.

        Raises:
            PacsError: It is not there any more, or the server does not give all of it.
        """
        url = f"{self.url}/studies/{wanted.study}/series/{wanted.series}/instances/{instance}"
        with (
            self._translated(),
            self._session.get(url, headers={"Accept": AS_STORED}, stream=True, timeout=self._timeout_s) as answer,
        ):
            answer.raise_for_status()
            try:
                write_whole(target, lambda part: _copy_instance(answer, part))
            except NotMultipartError as error:
                raise PacsError(self.url, f"instance {instance}: {error}") from error

    def store(self, file: Path) -> None:
        """Store one DICOM file.

        Raises:
            PacsError: The server does not take it.
        """
        headers = {"Content-Type": MultipartFile.content_type, "Accept": "application/dicom+json"}
        with self._translated():
            answer = self._session.post(
                f"{self.url}/studies", data=MultipartFile(file), headers=headers, timeout=self._timeout_s
            )
            answer.raise_for_status()
        if (reason := _failure(answer)) is not None:
            raise PacsError(self.url, f"does not store {file.name} (failure reason {reason})")

    def store_all(self, files: Sequence[Path]) -> None:
        """Store DICOM files one after the other.

        Raises:
            PacsError: The server does not take one.
        """
        for file in files:
            self.store(file)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        with self._translated():
            return question()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the transport become one line that says what to do."""
        problems = self._requests.exceptions
        try:
            yield
        except problems.HTTPError as error:
            raise self._refused(error) from error
        except problems.Timeout as error:
            raise PacsError(self.url, f"did not answer within {self._timeout_s:g} s") from error
        except (problems.ConnectionError, problems.ChunkedEncodingError) as error:
            said = "cannot be reached, or broke off; is it running, is the URL right?"
            raise PacsError(self.url, said) from error
        except (problems.RequestException, ValueError) as error:
            raise PacsError(self.url, f"answers what is no DICOMweb ({type(error).__name__})") from error

    def _refused(self, error: Any) -> PacsError:
        status = error.response.status_code
        if status in (401, 403):
            return PacsError(self.url, f"refuses the user or the password (HTTP {status})")
        if status == 404:
            return PacsError(self.url, "what was asked for is not there (any more) (HTTP 404)")
        return PacsError(self.url, f"answers with an error (HTTP {status})")


def _copy_instance(answer: Any, path: Path) -> None:
    boundary = boundary_of(answer.headers.get("Content-Type", ""))
    with path.open("wb") as file:
        copy_first_part(answer.iter_content(PIECE), boundary, file)


def _values(row: dict[str, Any], tag: str) -> list[str]:
    return [str(value) for value in row.get(tag, {}).get("Value") or []]


def _value(row: dict[str, Any], tag: str) -> str:
    return next(iter(_values(row, tag)), "")


def _failure(answer: Any) -> str | None:
    """Why an instance was not stored, where the answer says that; None where it was."""
    failed = answer.json().get("00081198", {}).get("Value", []) if answer.content else []
    if failed:
        return _value(failed[0], "00081197") or "not said"
    return "not said" if answer.status_code == 202 else None
