"""The identity of a slide: its content, whatever it is called."""

from __future__ import annotations

import hashlib
from pathlib import Path

from s4mil_monai.checksum import sha256_of
from s4mil_monai.slides.slide_files import files_of


def fingerprint_slide(path: Path) -> str:
    """SHA-256 of a slide's file; for one of several files, and for a folder, of their sorted SHA-256."""
    files = files_of(path)
    if files == [path]:
        return sha256_of(path)
    parts = sorted(sha256_of(file) for file in files)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
