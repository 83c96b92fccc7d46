"""Hashing: one new slide that is read through while others are scored."""

from __future__ import annotations

import errno
import threading
import time

from s4mil_monai.batch.intake import Candidate
from s4mil_monai.errors import first_line
from s4mil_monai.slides.fingerprint import fingerprint_slide


class Hashing:
    """Reads a slide in a thread, which ends with the process and holds nobody up."""

    def __init__(self, candidate: Candidate, *, limit_s: float):
        """Begin.

        Args:
            candidate: The slide.
            limit_s: After this long it is given up; its thread may wait for a share that never answers.
        """
        self.candidate = candidate
        self._outcome: str | OSError | None = None
        self._end = time.monotonic() + limit_s
        self._limit_s = limit_s
        threading.Thread(target=self._read, name="fingerprint", daemon=True).start()

    @property
    def outcome(self) -> str | OSError | None:
        """The fingerprint, or why there is none; None until it is known."""
        if self._outcome is None and time.monotonic() > self._end:
            return OSError(errno.ETIMEDOUT, f"not read through within {self._limit_s:g} s")
        return self._outcome

    def _read(self) -> None:
        try:
            self._outcome = fingerprint_slide(self.candidate.path)
        except OSError as error:
            self._outcome = error
        except Exception as error:
            self._outcome = OSError(errno.EIO, f"{type(error).__name__}: {first_line(error)}")
