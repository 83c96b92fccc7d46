"""Multipart bodies of DICOMweb, read and written piece by piece: an instance may be larger than memory.

dicomweb-client, which searches here, holds an instance whole on both ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from s4mil_monai.errors import S4MilError

LONGEST_HEADER = 64 << 10
"""Bytes of the headers of one part."""

PIECE = 1 << 20
BOUNDARY = "s4mil-part-7d1c5b3e"


class NotMultipartError(S4MilError):
    """A body is cut short, or is no multipart body."""

    def __str__(self) -> str:
        return "the answer is cut short, or is not multipart"


def boundary_of(content_type: str) -> str:
    """The boundary that a Content-Type header names.

    >>> boundary_of('multipart/related; type="application/dicom"; boundary=abc')
    'abc'

    Raises:
        NotMultipartError: It names none.
    """
    found = re.search(r'boundary="?([^";]+)"?', content_type)
    if not content_type.lower().startswith("multipart/") or found is None:
        raise NotMultipartError
    return found[1].strip()


def copy_first_part(pieces: Iterable[bytes], boundary: str, target: BinaryIO) -> None:
    """Write the content of the first part of a body.

    Args:
        pieces: The body, in pieces of any length.
        boundary: Between parts.
        target: Receives the content as it comes.

    Raises:
        NotMultipartError: The body ends before the part does.
    """
    stream = iter(pieces)
    buffered = _after_header(stream, boundary)
    end = b"\r\n--" + boundary.encode()
    while (at := buffered.find(end)) < 0:
        # the end may have begun in what is kept
        ready = max(0, len(buffered) - len(end))
        target.write(buffered[:ready])
        piece = next(stream, None)
        if piece is None:
            raise NotMultipartError
        buffered = buffered[ready:] + piece
    target.write(buffered[:at])


def _after_header(stream: Iterator[bytes], boundary: str) -> bytes:
    """What has been read of the first part's content."""
    begin, blank = b"--" + boundary.encode(), b"\r\n\r\n"
    buffered = b""
    for piece in stream:
        buffered += piece
        start = buffered.find(begin)
        header_end = buffered.find(blank, start) if start >= 0 else -1
        if header_end >= 0:
            return buffered[header_end + len(blank) :]
        if len(buffered) > LONGEST_HEADER:
            break
    raise NotMultipartError


class MultipartFile:
    """A DICOM file as a multipart body of one part; its length is known, its content is read as it is sent."""

    content_type = f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'

    def __init__(self, path: Path):
        self._head = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        self._tail = f"\r\n--{BOUNDARY}--\r\n".encode()
        self._path = path
        self._length = len(self._head) + path.stat().st_size + len(self._tail)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        with self._path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece
        yield self._tail
