"""verify_results(): whether the chain of records and the results it speaks of are as they were written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from s4mil_monai.batch.ledger import Ledger
from s4mil_monai.batch.provenance import (
    FIRST,
    Link,
    Problem,
    check_end,
    check_link,
    check_outputs,
    parse_record,
)
from s4mil_monai.batch.publish import RESULTS
from s4mil_monai.errors import UnknownNameError


def verify_results(
    ledger: Ledger, out: Path, *, end: tuple[int, str] | None = None, head: str | None = None
) -> Iterator[Problem]:
    """Recompute the chain and the checksums of every file of every result.

    That takes hours, in which a batch may publish. Of what it adds the records are checked, and not the files.

    Args:
        ledger: Of the site.
        out: Folder of results.
        end: The last record whose files are checked, as :meth:`Ledger.head` gave it; by default the last there is.
        head: A hash that was written down elsewhere, such as in an old run report: the chain has to contain it.
            Without one, whoever can write the ledger could have written all of it anew.

    Raises:
        UnknownNameError: ``head`` is no SHA-256.
    """
    if head is not None and not re.fullmatch("[0-9a-f]{64}", head):
        raise UnknownNameError("hash", head, ("64 hexadecimal digits, as in run.json: provenance_head",))
    yield from _Verification(ledger, out, end or ledger.head(), head).find_problems()


class _Verification:
    """One walk along the chain; never more of it in memory than a page."""

    def __init__(self, ledger: Ledger, out: Path, end: tuple[int, str], head: str | None):
        self._ledger, self._out, self._end = ledger, out, end
        self._unseen_head = head
        self._unknown = {path.relative_to(out).as_posix() for path in (out / RESULTS).glob("*/*")}
        """Folders of results that no record has spoken of."""

    def find_problems(self) -> Iterator[Problem]:
        yield from self._walk()
        if self._unseen_head is not None:
            head = self._unseen_head[:12]
            yield Problem("chain", f"does not contain {head}…: it was cut short or written anew since")
        for folder in sorted(self._unknown):
            yield Problem(folder, "is in no record")

    def _walk(self) -> Iterator[Problem]:
        known, last = self._end, (0, FIRST)
        self._forget_those_in_work()
        for found in self._ledger.chain():
            if found.number > known[0]:
                yield from check_end(last, known)
                known = self._ledger.head()
            if found.number > known[0]:
                yield Problem(
                    f"record {found.number}", f"comes after record {known[0]}, with which the chain ends"
                )
                return
            yield from check_link(found, last)
            yield from self._check_record(found)
            last = found.number, found.hash
        yield from check_end(last, known)

    def _check_record(self, found: Link) -> Iterator[Problem]:
        if found.hash == self._unseen_head:
            self._unseen_head = None
        record = parse_record(found.record)
        if record is None:
            yield Problem(f"record {found.number}", "is not a provenance record")
            return
        self._unknown.discard(record["folder"])
        if found.number <= self._end[0]:
            yield from check_outputs(found.record, self._out)

    def _forget_those_in_work(self) -> None:
        """Results that had their name and not yet their record; if they got it since, it is still to be read."""
        self._unknown -= {job.folder for job in self._ledger.held() if job.folder is not None}
