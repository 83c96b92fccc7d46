"""What goes wrong between us and a PACS."""

from __future__ import annotations

from s4mil_monai.errors import PathError


class PacsError(PathError):
    """A PACS cannot be reached, refuses, or answers something else; the next run tries again."""
