"""Results back by C-STORE, for a PACS without DICOMweb storage."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s4mil_monai.extras import require
from s4mil_monai.pacs.errors import PacsError


@dataclass(frozen=True)
class StoreTarget:
    """Where C-STORE sends to."""

    called_aet: str
    host: str
    port: int
    own_aet: str = "S4MIL"
    timeout_s: float = 30.0

    def __str__(self) -> str:
        return f"{self.called_aet}@{self.host}:{self.port}"


def parse_target(text: str, *, own_aet: str, timeout_s: float) -> StoreTarget:
    """A target written as ``AET@host:port``.

    >>> str(parse_target("ORTHANC@pacs:4242", own_aet="S4MIL", timeout_s=5))
    'ORTHANC@pacs:4242'

    Raises:
        ValueError: It is written otherwise.
    """
    found = re.fullmatch(r"([!-?A-~]{1,16})@([\w.-]+):(\d{1,5})", text)
    if found is None or not 0 < int(found[3]) < 65536:
        raise ValueError(f"AET@host:port is wanted, got {text!r}")
    return StoreTarget(found[1], found[2], int(found[3]), own_aet, timeout_s)


def send_files(files: Sequence[Path], target: StoreTarget) -> None:
    """Send DICOM files in one association, in pieces, compressed as they are.

    Raises:
        PacsError: The peer cannot be reached, rejects us, or does not store one of the files.
        MissingExtraError: pynetdicom is not installed.
    """
    association = _associate(files, target)
    try:
        for file in files:
            _send(association, file, target)
    finally:
        if association.is_established:
            association.release()


def _associate(files: Sequence[Path], target: StoreTarget) -> Any:
    pynetdicom = require("pynetdicom", extra="pacs")
    pynetdicom._config.STORE_SEND_CHUNKED_DATASET = True  # else a file is read whole, several times
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # what it finds wrong comes back as our errors
    entity = pynetdicom.AE(ae_title=target.own_aet)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = target.timeout_s
    entity.connection_timeout = target.timeout_s
    for sop_class, syntax in sorted({_context_of(file) for file in files}):
        entity.add_requested_context(sop_class, syntax)
    _knock(target)
    association = entity.associate(target.host, target.port, ae_title=target.called_aet)
    if association.is_established:
        return association
    if association.is_rejected:
        raise PacsError(str(target), f"rejects us; is {target.own_aet} among its modalities?")
    raise PacsError(str(target), "broke off; is it a DICOM peer?")


def _knock(target: StoreTarget) -> None:
    """See whether anything listens: pynetdicom only says that there is no association."""
    try:
        socket.create_connection((target.host, target.port), timeout=target.timeout_s).close()
    except OSError as error:
        reason = error.strerror or "no answer"
        raise PacsError(
            str(target), f"cannot be reached ({reason}); is it running, are host and port right?"
        ) from error


def _context_of(file: Path) -> tuple[str, str]:
    meta = require("pydicom.filereader", extra="pacs").read_file_meta_info(file)
    return str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)


def _send(association: Any, file: Path, target: StoreTarget) -> None:
    try:
        status = association.send_c_store(file)
    except (ValueError, RuntimeError) as error:  # no context was accepted, or the peer is gone
        raise PacsError(str(target), f"does not take {file.name} ({str(error).splitlines()[0]})") from error
    if not status:
        raise PacsError(str(target), f"broke off, or did not answer within {target.timeout_s:g} s")
    if status.Status not in (0x0000, 0xB000, 0xB006, 0xB007):  # success, and stored with a warning
        raise PacsError(str(target), f"does not store {file.name} (status {status.Status:#06x})")
