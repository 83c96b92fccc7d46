"""The identity of a slide: its content, whatever it is called."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint_slide(path: Path) -> str:
    """SHA-256 of a slide's file; for a folder, of the sorted SHA-256 of its files."""
    if path.is_dir():
        parts = sorted(fingerprint_slide(file) for file in path.iterdir() if file.is_file())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
