"""What ``--help`` prints, from a command's signature and docstring: one screen, without heavy libraries."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping

from s4mil_monai.cli.usage import Command, kind_of

HELP = ("--help", "-h")

VALUES = {"str": "TEXT", "int": "NUMBER", "float": "NUMBER"}
"""What stands for the value of an option, by its kind."""

WIDEST = 120
"""Characters of a line, on however wide a terminal."""


def describe_commands(commands: Mapping[str, Command], *, of: str = "") -> str:
    """The commands with what each does.

    Args:
        commands: By name.
        of: First word of those wanted, such as ``batch``.
    """
    shown = {name: command for name, command in commands.items() if name.startswith(of)}
    rows = [(name, inspect.getdoc(command) or "") for name, command in shown.items()]
    said = " ".join(["s4mil", *of.split(), "COMMAND"])
    lines = _as_table([(name, text.splitlines()[0]) for name, text in rows])
    return "\n".join([f"{said} …; {said} --help says what each takes", "", *lines])


def describe_command(name: str, command: Command) -> str:
    """What a command does, and what it takes."""
    text, _, listed = (inspect.getdoc(command) or "").partition("\nArgs:\n")
    sentences = _read_args(listed)
    positional, options = [], []
    usage = ["s4mil", name]
    for key, parameter in inspect.signature(command).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            usage.append(key.upper())
            positional.append((key.upper(), sentences.get(key, "")))
            continue
        called = " ".join([f"--{key}", *filter(None, [VALUES.get(kind_of(parameter))])])
        if parameter.default is parameter.empty:
            usage.append(called)
        options.append((called, f"{sentences.get(key, '')}{_tell_default(parameter)}"))
    usage += ["[OPTIONS]"] if options else []
    paragraphs = [textwrap.fill(" ".join(part.split()), _width()) for part in text.strip().split("\n\n")]
    table = "\n".join(_as_table([*positional, *options]))
    return "\n\n".join(part for part in (" ".join(usage), *paragraphs, table) if part)


def _read_args(listed: str) -> dict[str, str]:
    """The sentences of a docstring's ``Args:`` by parameter; a line that is indented further goes on."""
    found: dict[str, str] = {}
    key = ""
    for line in textwrap.dedent(listed).splitlines():
        if line[:1].strip():
            key, _, line = line.partition(": ")
        found[key] = f"{found.get(key, '')} {line.strip()}".strip()
    return found


def _tell_default(parameter: inspect.Parameter) -> str:
    told = parameter.default not in (parameter.empty, None, False, "")
    return f" [default: {parameter.default}]" if told else ""


def _as_table(rows: list[tuple[str, str]]) -> Iterator[str]:
    """Names with their sentences beside them, aligned."""
    indent = 4 + max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        first = f"  {name}".ljust(indent)
        yield textwrap.fill(text, _width(), initial_indent=first, subsequent_indent=" " * indent) or first.rstrip()


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)
