"""check_configs(): a bundle's configuration calls nothing but what is on the allow-lists.

MONAI imports every ``_target_`` and evaluates every ``$``, so a configuration is a program. Here it is read as
data, before MONAI runs it. What passes can still read and write the files it names, and log files and figures to
the MLflow server it names: that is what it is for. Values given on the command line are not looked at.
"""

from __future__ import annotations

import configparser
import datetime
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from s4mil_monai.errors import BundleError, ConfigRefusedError
from s4mil_monai.models.bundle_files import find_bundle_files
from s4mil_monai.models.config_allowed import KEYS, MODES, is_target
from s4mil_monai.models.expression_check import find_objection
from s4mil_monai.models.logging_check import find_logging_objections

_YAML, _JSON, _LOGGING = (".yaml", ".yml"), (".json",), (".conf", ".ini", ".cfg")
_SEPARATOR = re.compile("::|#")
_MACRO = re.compile(r"%\w+(?:(?:::|#)\w+)*")
"""Of a place in the configuration; with a dot in it, it could name another file."""


@dataclass(frozen=True)
class _Objection:
    place: tuple[str, ...]
    found: object
    reason: str


def check_configs(bundle: Path) -> None:
    """Check every YAML, JSON and logging file of a bundle; nothing is imported, evaluated or instantiated.

    Raises:
        ConfigRefusedError: A ``_target_``, an expression or a macro is not on the allow-lists. Its file, its place
            as MONAI writes it (``train::trainer::key``) and the value are named.
        BundleError: There is no such folder; a file cannot be parsed, or is code; or ``configs`` holds one that is
            no configuration.
    """
    if not bundle.is_dir():
        raise BundleError(str(bundle), "there is no such folder")
    for name in find_bundle_files(bundle):
        suffix = Path(name).suffix.lower()
        if suffix in _YAML + _JSON + _LOGGING:
            _check_file(bundle / name, suffix)
        elif Path(name).parts[0] == "configs":
            raise BundleError(str(bundle / name), "is no YAML, JSON or logging file, which is all configs holds")


def _check_file(path: Path, suffix: str) -> None:
    try:
        text = path.read_text(encoding="utf-8")
        objection = next(_objections_to_text(text, suffix), None)
    except (yaml.YAMLError, configparser.Error, ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())
        raise BundleError(str(path), f"cannot be read as configuration ({reason})") from error
    if objection is not None:
        place = "::".join(objection.place)
        raise ConfigRefusedError(str(path), objection.reason, place=place, found=str(objection.found))


def _objections_to_text(text: str, suffix: str) -> Iterator[_Objection]:
    if suffix in _LOGGING:
        for section, option, value, reason in find_logging_objections(text):
            yield _Objection((section, option), value, reason)
        return
    # A .json file is read as MONAI reads it; as YAML the same text can mean something else.
    yield from _walk(json.loads(text) if suffix in _JSON else yaml.safe_load(text), (), set())


def _walk(value: Any, place: tuple[str, ...], seen: set[int]) -> Iterator[_Objection]:
    """``seen`` are the mappings and lists met so far: YAML's aliases can repeat and contain themselves."""
    if isinstance(value, str):
        yield from _objections_to_string(value, place)
    elif isinstance(value, (dict, list)):
        if id(value) in seen:
            return
        seen.add(id(value))
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict):
                yield from _objections_to_entry(str(key), entry, (*place, str(key)))
            yield from _walk(entry, (*place, str(key)), seen)
    elif not isinstance(value, (int, float, datetime.date, type(None))):
        yield _Objection(place, value, f"is a {type(value).__name__}, which no configuration has")


def _objections_to_entry(key: str, entry: Any, place: tuple[str, ...]) -> Iterator[_Objection]:
    """What MONAI gives a meaning by its key; ``a::_target_`` sets that of ``a``, ``+a`` adds to it."""
    name = _SEPARATOR.split(key)[-1].lstrip("+")
    if name == "_target_" and not is_target(entry):
        yield _Objection(place, entry, "is not on the allow-list")
    elif name == "_mode_" and entry not in MODES:
        yield _Objection(place, entry, f"is not a mode; known: {', '.join(sorted(MODES))}")
    elif re.fullmatch(r"_\w+_", name) and name not in KEYS:
        yield _Objection(
            place, entry, f"is under a key that is not on the allow-list; known: {', '.join(sorted(KEYS))}"
        )


def _objections_to_string(text: str, place: tuple[str, ...]) -> Iterator[_Objection]:
    if text.startswith("$"):
        reason = find_objection(text)
        if reason is not None:
            yield _Objection(place, text, reason)
    elif text.startswith("%") and not _MACRO.fullmatch(text):
        yield _Objection(place, text, "is a macro that does not name a place in the configuration")
