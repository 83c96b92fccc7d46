"""A sealed bundle: its manifest is true, and its configuration calls nothing but what is on the allow-lists.

That finds damage, mixed-up files and configurations that would run code. It is no signature: whoever can write to
the folder can seal it again, and an engine in ``models`` is native code. Where that matters, compare the SHA-256
of SHA256SUMS itself with what the sender tells you by another way, and let nobody write to the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s4mil_monai.errors import BundleError
from s4mil_monai.models.config_check import check_configs
from s4mil_monai.models.manifest import (
    MANIFEST,
    METADATA,
    ModelFolder,
    told_as_bundle_error,
    verify_models,
    write_manifest,
)

logger = logging.getLogger(__name__)


def seal_bundle(bundle: Path) -> ModelFolder:
    """Check a bundle's configuration and write its manifest.

    Raises:
        BundleError: The folder is no bundle, holds code, or its configuration is refused; a file cannot be read,
            or the manifest cannot be written. Nothing is written then.
    """
    with told_as_bundle_error(bundle):
        if not (bundle / METADATA).is_file():
            raise BundleError(str(bundle), f"is not a bundle: {METADATA.as_posix()} is missing")
        check_configs(bundle)
        write_manifest(bundle)
        return verify_models(bundle)


def verify_bundle(folder: Path) -> ModelFolder:
    """Check every file of a bundle against its manifest, then its configuration. Nothing is parsed before.

    Args:
        folder: The bundle, or a folder that holds it and nothing else.

    Raises:
        BundleError: A file is missing, changed, not in the manifest, or code; or the configuration is refused.
    """
    found = verify_models(folder)
    check_configs(found.bundle)
    return found


@contextmanager
def kept_sealed(bundle: Path) -> Iterator[None]:
    """Change files of a bundle; if its manifest was true before, it is true after.

    A bundle without manifest gets none. A manifest that was false stays false, with a warning: sealing would vouch
    for a change nobody here made.

    Raises:
        OSError: The manifest cannot be written.
    """
    if not (bundle / MANIFEST).is_file():
        yield
        return
    before = _find_flaw(bundle)
    yield
    if before is None:
        write_manifest(bundle)
    else:
        logger.warning("%s; it is not sealed again", before)


def _find_flaw(bundle: Path) -> BundleError | None:
    try:
        verify_models(bundle)
    except BundleError as error:
        return error
    return None
