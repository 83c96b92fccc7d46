"""read_header(): a DICOM file without its pixels, read quietly.

What pydicom warns about it quotes, and that may be a name.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s4mil_monai.extras import require

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""SOP class VL Whole Slide Microscopy Image Storage."""


def is_uid(text: str) -> bool:
    """Whether this is a UID, such as a file may be named by; real ones break the rules on length and zeros.

    >>> is_uid("1.2.840.10008"), is_uid("../../etc/passwd"), is_uid("..")
    (True, False, False)
    """
    return re.fullmatch(r"[0-9.]{1,80}", text) is not None and text.strip(".") != ""


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Values that break the standard's rules are taken as they are, without a word."""
    pydicom = require("pydicom", extra="dicom")
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with pydicom.config.disable_value_validation(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pydicom")
            yield
    finally:
        logger.setLevel(level)


def read_header(file: Path, *, keywords: Sequence[str] | None = None) -> Any:
    """All elements before the pixels, or SOPClassUID and those wanted; None where it is no DICOM file, or damaged.

    Raises:
        MissingExtraError: pydicom is not installed.
    """
    pydicom = require("pydicom", extra="dicom")
    wanted = None if keywords is None else ["SOPClassUID", *keywords]
    damaged = (
        pydicom.errors.InvalidDicomError,
        OSError,
        ValueError,
        TypeError,
        EOFError,
        NotImplementedError,
        AttributeError,
    )
    with quiet_pydicom():
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted)
            for keyword in wanted or ():
                header.get(keyword)  # a value is converted, and complained about, when it is first asked for
            return header if header.get("SOPClassUID") else None
        except damaged:
            return None
