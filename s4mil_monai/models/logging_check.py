"""Whether a logging configuration is data; Python's ``fileConfig`` evaluates its classes and arguments."""

from __future__ import annotations

import configparser
from collections.abc import Iterator

_FREE = frozenset({"keys", "level", "handlers", "formatter", "propagate", "qualname", "format", "datefmt"})
"""Options that are read as text."""
_VALUES = {
    "class": frozenset({"StreamHandler", "NullHandler", "logging.Formatter"}),
    "args": frozenset({"()", "(sys.stdout,)", "(sys.stderr,)"}),
    "style": frozenset({"%", "{", "$"}),
}
"""Options that are code, and what they may be."""


def find_logging_objections(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Section, option, value and objection of everything that is not on the list.

    Raises:
        configparser.Error: It is no such file.
    """
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    for section in parser.sections():
        for option, value in parser.items(section):  # those of [DEFAULT] too, as fileConfig takes them
            if option in _VALUES and value not in _VALUES[option]:
                known = ", ".join(sorted(_VALUES[option]))
                yield section, option, value, f"is not on the allow-list; known: {known}"
            elif option not in _VALUES and option not in _FREE:
                yield section, option, value, "is an option that is not on the allow-list"
