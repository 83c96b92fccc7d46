"""``s4mil seal``, ``s4mil verify-bundle``: a bundle that is what it was, and calls only what it may."""

from __future__ import annotations

from pathlib import Path

from s4mil_monai.cli.console import say


def seal(bundle: str) -> int:
    """Check what a bundle's configuration calls, and write the SHA-256 of its files into SHA256SUMS.

    Args:
        bundle: Folder of the trained model.
    """
    from s4mil_monai.models.manifest import MANIFEST
    from s4mil_monai.models.seal import seal_bundle

    sealed = seal_bundle(Path(bundle))
    say(f"{bundle}: sealed, {sealed.files} files in {MANIFEST}")
    return 0


def verify_bundle(bundle: str) -> int:
    """Check a bundle's files against its SHA256SUMS, then what its configuration calls; leave with 1 if refused.

    Args:
        bundle: Folder of the trained model.
    """
    from s4mil_monai.models.seal import verify_bundle as verify

    found = verify(Path(bundle))
    say(f"{bundle}: {found.files} files are as they were sealed; the configuration calls nothing unknown")
    return 0
