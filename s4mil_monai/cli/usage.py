"""Whether a command was called with what it takes, found out before anything runs."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from s4mil_monai.errors import S4MilError

Command = Callable[..., int]
"""Gives the exit code."""


LARGEST = 2**31 - 1
"""Whole number that an option takes."""


class UsageError(S4MilError):
    """The command was called with something it does not take."""


def find_command(commands: Mapping[str, Command], arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Name of the command that arguments begin with, which may be two words, and the arguments after it.

    Raises:
        UsageError: There is none of that name.
    """
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in commands:
            return name, list(arguments[words:])
    below = [name for name in commands if name.startswith(f"{arguments[0]} ")]
    known = ", ".join(below or commands)
    wanted = " ".join(arguments[: 2 if below else 1])
    raise UsageError(f"unknown command {wanted!r}; known: {known}")


def check_usage(name: str, command: Command, arguments: Sequence[str]) -> None:
    """Refuse wrong use before anything runs; fire would run first and complain after, over many lines.

    Raises:
        UsageError: An option is unknown or has a value of another kind, or something is missing or too much.
    """
    parameters = inspect.signature(command).parameters
    options, positional = _split(arguments)
    for option, value in options:
        _check_value(_find_parameter(option, parameters), value)
    named = {_full_name(option, parameters) for option, _ in options}
    wanted = [key for key, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    missing = [key for key in wanted if key not in named][len(positional) :]
    if missing:
        raise UsageError(f"{name} needs {missing[0].upper()}; see s4mil {name} --help")
    for key, parameter in parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and key not in named:
            raise UsageError(f"{name} needs --{key}; see s4mil {name} --help")
    if len(positional) > len(wanted):
        raise UsageError(f"{name} takes {len(wanted)} argument(s), got also {positional[len(wanted)]!r}")


def kind_of(parameter: inspect.Parameter) -> str:
    """What a parameter is: ``str``, ``int``, ``float`` or ``bool``; that it may be None does not count."""
    return str(parameter.annotation).removesuffix(" | None")


def _find_parameter(option: str, parameters: Mapping[str, inspect.Parameter]) -> inspect.Parameter:
    key = _full_name(option, parameters)
    if key is not None:
        return parameters[key]
    close = difflib.get_close_matches(option, parameters, n=1)
    hint = f"did you mean --{close[0]}? " if close else ""
    listed = ", ".join(f"--{key}" for key in parameters)
    raise UsageError(f"unknown option --{option}; {hint}known: {listed}")


def _full_name(option: str, parameters: Iterable[str]) -> str | None:
    """The parameter an option names; one letter stands for the only one that begins with it, as fire has it."""
    if len(option) > 1:
        return option if option in parameters else None
    fitting = [key for key in parameters if key.startswith(option)]
    return fitting[0] if len(fitting) == 1 else None


def _check_value(parameter: inspect.Parameter, value: str | None) -> None:
    """Refuse a value that fire would pass on as something else than the parameter is."""
    name, kind = parameter.name, kind_of(parameter)
    if kind == "bool":
        if value not in (None, "True", "False"):
            raise UsageError(f"--{name} takes no value, got {value!r}")
    elif not value:
        raise UsageError(f"--{name} needs a value")
    elif kind == "int":
        require_whole(name, value)


def _split(arguments: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Options with their values, and positional arguments; a value is after ``=``, or next and no option."""
    options: list[tuple[str, str | None]] = []
    positional: list[str] = []
    takes_value = False
    for argument in arguments:
        if _is_option(argument):
            name, equals, value = argument.lstrip("-").partition("=")
            options.append((name.replace("-", "_"), value if equals else None))
            takes_value = not equals
        elif takes_value:
            options[-1] = (options[-1][0], argument)
            takes_value = False
        else:
            positional.append(argument)
    return options, positional


def _is_option(argument: str) -> bool:
    """As fire has it: a number below zero is none."""
    return argument == "-" or re.match("--|-[a-zA-Z]", argument) is not None


def require_whole(name: str, value: str) -> None:
    """Refuse a text that is no whole number, or one that no count of anything reaches."""
    try:
        found = int(value)
    except ValueError as error:
        raise UsageError(f"--{name} is a whole number, got {value!r}") from error
    if abs(found) > LARGEST:
        raise UsageError(f"--{name} is a whole number up to {LARGEST}, got {value}")


def require_positive(name: str, value: float | None) -> None:
    """Refuse what is no positive number; None is no value."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UsageError(f"--{name} is a positive number, got {value!r}")


def require_slide(slide: str) -> None:
    """Refuse a missing slide before models are loaded."""
    if not Path(slide).exists():
        raise UsageError(f"{slide}: there is no such slide")


def require_share(name: str, value: float) -> None:
    """Refuse what is no share between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UsageError(f"--{name} is a share between 0 and 1, got {value!r}")
