"""What the commands print: one line at a time, progress on a terminal only."""

from __future__ import annotations

import sys
import warnings
from typing import Any

EXIT_ERROR, EXIT_USAGE, EXIT_NO_SCORE = 1, 2, 3


def say(text: str) -> None:
    """Print what was done."""
    print(text, flush=True)


def complain(text: str) -> None:
    """Print what went wrong, as one line on the error stream."""
    print(f"s4mil: {' '.join(text.split())}", file=sys.stderr)


def quieten_holoscan() -> None:
    """Leave out Holoscan's warning about the stack: MONAI imports it, and nothing here runs in it."""
    warnings.filterwarnings("ignore", message="Current stack size", category=RuntimeWarning)


class ProgressBar:
    """Patches done with rate and time left, on a terminal only."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def show(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="patch", disable=not sys.stderr.isatty(), leave=False)
        if done < self._bar.n:  # the next slide
            self._bar.reset(total)
        self._bar.update(done - self._bar.n)

    def note(self, text: str) -> None:
        """Show a few words beside the numbers."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
