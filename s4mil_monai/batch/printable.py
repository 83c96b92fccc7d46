"""printable(): a file name as it may stand in a log, a report, or on a terminal."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    r"""The text with line ends, terminal codes, marks that turn its direction and broken bytes spelled out.

    >>> printable("Müller\n\x1b[2J\u202egpj.svs")
    'Müller\\n\\x1b[2J\\u202egpj.svs'
    """
    return "".join(letter if letter.isprintable() else _spelled_out(letter) for letter in text)


def _spelled_out(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def as_folder_name(text: str) -> str:
    """A folder name that any file system takes.

    >>> as_folder_name("Mueller, Hans 1961")
    'Mueller__Hans_1961'
    """
    return re.sub(r"[^\w.+-]", "_", text)[:80] or "slide"
