"""Optional libraries: imported where they are used, missed with the name of the extra that brings them."""

from __future__ import annotations

import importlib
from typing import Any

from s4mil_monai.errors import MissingExtraError


def require(module: str, *, extra: str) -> Any:
    """Import an optional library.

    Raises:
        MissingExtraError: It is not installed; the text says ``pip install 's4mil-monai[extra]'``.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise  # the library is there, something it needs is not: its own message says more
        raise MissingExtraError(module=module, extra=extra) from error
