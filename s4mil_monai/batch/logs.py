"""set_up_logs(): a line a person reads, then fields a machine reads; nothing says who the patient is."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from s4mil_monai.batch.printable import as_folder_name, printable

FIELDS = (
    *("event", "slide", "job", "error", "attempt", "seconds"),
    *("published", "failed", "quarantined", "handed_back", "waiting"),
)
"""What of ``extra`` is written, in this order; anything else is not, so that no path gets out by accident."""

TEXT_LIMIT = 1000
"""Characters of a line's text; libraries put whole graphs into their errors."""

SHORTEST_HIDDEN = 4
"""Characters of a name that is replaced by the slide's pseudonym."""

_hidden: list[tuple[str, str]] = []


def set_up_logs(level: int | str = logging.INFO) -> None:
    """Write all logs to stderr in one form: ours from ``level`` on, those of other libraries from WARNING on.

    A line is ``2026-11-25T03:00:01Z INFO scored 1a2b3c4d5e6f in 12.1 s {"event":"scored","seconds":12.1}``. Its
    first brace begins the fields, always a JSON object. Python's warnings are logged as well.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("s4mil_monai").setLevel(level)
    logging.captureWarnings(True)


def names_to_hide(name: str) -> list[str]:
    """All that could give a slide away by its file's name: the name, its folders, and what results are called."""
    parts = [part for part in Path(name).parts if part not in ("/", "..")]
    return [name, *parts, *(as_folder_name(Path(part).stem) for part in parts)]


@contextmanager
def going_by(pseudonym: str, *names: str) -> Iterator[None]:
    """Write ``pseudonym`` in every line of this process whose text has one of these names, or its stem.

    Reading and scoring log and raise with the file's name, which in a hospital may be the patient's. Names of less
    than four characters are left: they would be found in any text.

    Args:
        pseudonym: What the slide is called in logs.
        names: Of its file, and of folders above it that say who the patient is.
    """
    hidden = {part for name in names for part in (name, Path(name).stem) if len(part) >= SHORTEST_HIDDEN}
    pairs = [(part, pseudonym) for part in hidden]
    _hidden.extend(pairs)
    try:
        yield
    finally:
        for pair in pairs:
            _hidden.remove(pair)


class LineFormatter(logging.Formatter):
    """One line a record, whatever is in it."""

    def format(self, record: logging.LogRecord) -> str:
        text = _text_of(record)
        if record.exc_info and record.exc_info[1] is not None:
            text = f"{text}: {describe(record.exc_info[1])}"
        when = datetime.fromtimestamp(record.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return f"{when} {record.levelname} {_on_one_line(_without_names(text))} {_fields_of(record)}"


def describe(error: BaseException) -> str:
    """Kind, reason and place of an error, without the path that an OSError carries."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = "" if place is None else f" ({Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno})"
    return f"{type(error).__name__}: {reason}{where}" if reason else f"{type(error).__name__}{where}"


def _text_of(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # a % in a name; logging would print a traceback of many lines
        text = str(record.msg)
    ours = record.name == "s4mil_monai" or record.name.startswith("s4mil_monai.")
    return text if ours else f"{record.name}: {text}"


def _without_names(text: str) -> str:
    """The text with every hidden name replaced, longest first: a stem may be the beginning of another's."""
    for name, pseudonym in sorted(_hidden, key=lambda pair: len(pair[0]), reverse=True):
        text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", pseudonym, text)  # not within a word; _ ends one
    return text


def _on_one_line(text: str) -> str:
    """Printable text without a brace, which would begin the fields, and of bearable length."""
    text = printable(text.strip().replace("{", "(").replace("}", ")"))
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1] + "…"


def _fields_of(record: logging.LogRecord) -> str:
    fields = {name: _plain(record.__dict__[name]) for name in FIELDS if name in record.__dict__}
    return json.dumps(fields, separators=(",", ":"), allow_nan=False)


def _plain(value: object) -> str | int | float | bool | None:
    """A value as JSON has it; of anything but text and numbers only the kind."""
    if isinstance(value, str):
        return _without_names(value)[:TEXT_LIMIT]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int) else type(value).__name__
