"""Find the command, check how it was called, run it, leave with its exit code."""

from __future__ import annotations

import gc
import inspect
import logging
import sys
from collections.abc import Sequence
from typing import Any

from s4mil_monai import __version__
from s4mil_monai.cli.ablate import ablate
from s4mil_monai.cli.batch import (
    batch_export,
    batch_metrics,
    batch_quarantine,
    batch_reference,
    batch_retry,
    batch_run,
    batch_status,
    verify,
)
from s4mil_monai.cli.bundle import bundle
from s4mil_monai.cli.calibrate import calibrate
from s4mil_monai.cli.checkpoint import import_checkpoint
from s4mil_monai.cli.console import EXIT_ERROR, EXIT_USAGE, complain, quieten_holoscan, say
from s4mil_monai.cli.embed import embed
from s4mil_monai.cli.experiment import experiment
from s4mil_monai.cli.export import export
from s4mil_monai.cli.feature_files import import_features, verify_features
from s4mil_monai.cli.help_text import HELP, describe_command, describe_commands
from s4mil_monai.cli.inspect import inspect_slide
from s4mil_monai.cli.pacs import pacs
from s4mil_monai.cli.register import register
from s4mil_monai.cli.score import score
from s4mil_monai.cli.seal import seal, verify_bundle
from s4mil_monai.cli.usage import Command, UsageError, check_usage, find_command, kind_of
from s4mil_monai.errors import S4MilError, SettingsError, UnknownNameError


def version() -> int:
    """Print the version."""
    say(__version__)
    return 0


COMMANDS: dict[str, Command] = {
    "score": score,
    "inspect": inspect_slide,
    "embed": embed,
    "features verify": verify_features,
    "features import": import_features,
    "batch run": batch_run,
    "batch status": batch_status,
    "batch retry": batch_retry,
    "batch quarantine": batch_quarantine,
    "batch export": batch_export,
    "batch metrics": batch_metrics,
    "batch reference": batch_reference,
    "verify": verify,
    "pacs": pacs,
    "ablate": ablate,
    "experiment": experiment,
    "bundle": bundle,
    "calibrate": calibrate,
    "export": export,
    "seal": seal,
    "verify-bundle": verify_bundle,
    "register": register,
    "import-checkpoint": import_checkpoint,
    "version": version,
}
"""Commands by name; their keyword arguments are the options."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    quieten_holoscan()
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it finds wrong comes back as our errors
    try:
        code = _run(arguments)
    except (UsageError, SettingsError, UnknownNameError) as error:  # starting again mends none of them
        complain(str(error))
        code = EXIT_USAGE
    except S4MilError as error:
        complain(str(error))
        code = EXIT_ERROR
    except KeyboardInterrupt:
        complain("interrupted; what was begun was not written")
        code = 130
    gc.freeze()  # else Python walks all of torch once more before it leaves: half a second
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        arguments = ["version"]
    if not arguments or arguments[0] in HELP:
        say(describe_commands(COMMANDS))
        return 0 if arguments else EXIT_USAGE
    if arguments[0].startswith("-"):
        raise UsageError(f"unknown option {arguments[0]}; see s4mil --help")
    if arguments[1:2] and arguments[1] in HELP and _is_group(arguments[0]):
        say(describe_commands(COMMANDS, of=f"{arguments[0]} "))
        return 0
    name, rest = find_command(COMMANDS, arguments)
    if any(argument in HELP for argument in rest):
        say(describe_command(name, COMMANDS[name]))
        return 0
    check_usage(name, COMMANDS[name], rest)
    from fire import Fire

    from s4mil_monai.allocator import keep_large_buffers

    keep_large_buffers()
    codes: list[int] = []
    Fire(_keeping_code(COMMANDS[name], codes), command=rest, name=f"s4mil {name}")
    return codes[-1] if codes else 0


def _is_group(word: str) -> bool:
    return word not in COMMANDS and any(name.startswith(f"{word} ") for name in COMMANDS)


def _keeping_code(command: Command, codes: list[int]) -> Any:
    """The command as fire calls it; its exit code is added to ``codes``."""
    from fire.decorators import SetParseFns

    def run(*args: Any, **kwargs: Any) -> None:
        codes.append(command(*args, **kwargs))

    run.__signature__ = inspect.signature(command, eval_str=True)
    run.__doc__ = command.__doc__
    # fire guesses types: without this --slide=2024_001 arrives as the integer 2024001
    as_told = {"str": str, "int": int}
    kinds = {key: kind_of(parameter) for key, parameter in inspect.signature(command).parameters.items()}
    return SetParseFns(**{key: as_told[kind] for key, kind in kinds.items() if kind in as_told})(run)
