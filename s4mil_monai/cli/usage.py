"""Whether a command was called with what it takes, found out before anything runs."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from s4mil_monai.errors import S4MilError

Command = Callable[..., int]
"""Gives the exit code."""


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
        UsageError: An option is unknown, or something is missing or too much.
    """
    parameters = inspect.signature(command).parameters
    options, positional = _split(list(arguments))
    if "help" in options or "h" in options:
        return
    known = {option: key for option in options if (key := _full_name(option, parameters))}
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, parameters, n=1)
            hint = f"did you mean --{close[0]}? " if close else ""
            listed = ", ".join(f"--{key}" for key in parameters)
            raise UsageError(f"unknown option --{option}; {hint}known: {listed}")
    wanted = [key for key, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    missing = [key for key in wanted if key not in known.values()][len(positional) :]
    if missing:
        raise UsageError(f"{name} needs {missing[0].upper()}; see s4mil {name} --help")
    for key, parameter in parameters.items():
        if (
            parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default is parameter.empty
            and key not in known.values()
        ):
            raise UsageError(f"{name} needs --{key}; see s4mil {name} --help")
    if len(positional) > len(wanted):
        raise UsageError(f"{name} takes {len(wanted)} argument(s), got also {positional[len(wanted)]!r}")


def _full_name(option: str, parameters: Iterable[str]) -> str | None:
    """The parameter an option names; one letter stands for the only one that begins with it, as fire has it."""
    if len(option) > 1:
        return option if option in parameters else None
    fitting = [key for key in parameters if key.startswith(option)]
    return fitting[0] if len(fitting) == 1 else None


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Option names and positional arguments; an option's value is after ``=`` or the next that is none."""
    options, positional = [], []
    takes_value = False
    for argument in arguments:
        if argument.startswith("-") and not argument[1:2].isdigit():
            options.append(argument.lstrip("-").split("=")[0].replace("-", "_"))
            takes_value = "=" not in argument and options[-1] not in ("help", "h")
        else:
            if not takes_value:
                positional.append(argument)
            takes_value = False
    return options, positional


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
