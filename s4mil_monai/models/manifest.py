"""A bundle that is checked file by file before anything in it is used.

The manifest is what ``sha256sum`` writes: ``sha256sum --check SHA256SUMS`` checks it without this package.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from s4mil_monai.checksum import sha256_of
from s4mil_monai.errors import BundleError
from s4mil_monai.models.bundle_files import find_bundle_files
from s4mil_monai.whole_file import write_whole

MANIFEST = "SHA256SUMS"
REPAIR = "copy the bundle again, or, if you changed it, seal it again (s4mil seal)"
ENCODER_FOLDER = "encoder"
METADATA = Path("configs") / "metadata.json"


@dataclass(frozen=True)
class ModelFolder:
    """A verified folder of models."""

    bundle: Path
    encoder_weights: Path | None
    """None where the encoder's weights come with a Python package."""
    files: int
    """Named in the manifest."""
    sha256: str
    """Of the manifest, and so of all of them."""


def stage_models(bundle: Path, folder: Path, *, encoder_weights: Path | None = None) -> ModelFolder:
    """Copy a bundle, with weights of its encoder and a manifest inside, into a new folder.

    Raises:
        BundleError: ``bundle`` is none, or the folder is not empty; a file cannot be read or written.
    """
    with told_as_bundle_error(folder):
        return _stage(bundle, folder, encoder_weights)


def _stage(bundle: Path, folder: Path, encoder_weights: Path | None) -> ModelFolder:
    if not (bundle / METADATA).is_file():
        raise BundleError(str(bundle), f"is not a bundle: {METADATA.as_posix()} is missing")
    if folder.exists() and any(folder.iterdir()):
        raise BundleError(str(folder), "is not empty; models are staged into a new folder")
    staged = folder / bundle.resolve().name
    for name in _files(bundle):
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle / name, staged / name)
    if encoder_weights is not None:
        (staged / ENCODER_FOLDER).mkdir()
        shutil.copy(encoder_weights, staged / ENCODER_FOLDER / encoder_weights.name)
    write_manifest(staged)
    return verify_models(folder)


def write_manifest(folder: Path) -> None:
    """Write the SHA-256 of every file of a folder into its manifest."""
    lines = [f"{sha256_of(folder / name)}  {name}" for name in _files(folder)]
    write_whole(folder / MANIFEST, "\n".join(lines) + "\n")


def verify_models(folder: Path) -> ModelFolder:
    """Check every file of a bundle against the manifest in it; nothing is parsed before.

    Args:
        folder: The bundle, or a folder that holds it and nothing else.

    Raises:
        BundleError: There is not one bundle; its manifest is missing; a file is missing, changed or not in it, or
            cannot be read.
    """
    with told_as_bundle_error(folder):
        return _verify(_only_bundle(folder))


@contextmanager
def told_as_bundle_error(folder: Path) -> Iterator[None]:
    """Tell an OSError as one line about the bundle, with the file.

    Raises:
        BundleError: In place of the OSError.
    """
    try:
        yield
    except OSError as error:
        found = Path(error.filename) if isinstance(error.filename, str) else folder
        name = found.relative_to(folder).as_posix() if found.is_relative_to(folder) else found.as_posix()
        raise BundleError(str(folder), f"{name} cannot be used ({error.strerror or error})") from error


def _verify(bundle: Path) -> ModelFolder:
    wanted, sha256 = _read_manifest(bundle)
    found = set(_files(bundle))
    for name, recorded in wanted.items():
        if name not in found:
            raise BundleError(str(bundle), f"{name} of {MANIFEST} is missing; {REPAIR}")
        if sha256_of(bundle / name) != recorded:
            raise BundleError(str(bundle), f"{name} is not the file of {MANIFEST}; {REPAIR}")
    for name in sorted(found - set(wanted)):
        raise BundleError(
            str(bundle), f"{name} is not in {MANIFEST}; remove it, or, if it is yours, seal again (s4mil seal)"
        )
    weights = sorted((bundle / ENCODER_FOLDER).glob("*"))
    if len(weights) > 1:
        raise BundleError(str(bundle), f"holds {len(weights)} files of encoder weights, wanted at most one")
    return ModelFolder(bundle, weights[0] if weights else None, files=len(wanted), sha256=sha256)


def _only_bundle(folder: Path) -> Path:
    if not folder.is_dir():
        raise BundleError(str(folder), "there is no such folder of models")
    if (folder / METADATA).is_file():
        return folder
    below = sorted(folder.iterdir())
    if len(below) != 1 or not (below[0] / METADATA).is_file():
        names = ", ".join(path.name for path in below) or "nothing"
        raise BundleError(str(folder), f"holds {names}; wanted one bundle and nothing else")
    return below[0]


def _read_manifest(folder: Path) -> tuple[dict[str, str], str]:
    """SHA-256 by name, and that of the manifest itself."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(str(folder), f"has no {MANIFEST}; seal it (s4mil seal)")
    content = path.read_bytes()
    lines = content.decode(errors="replace").splitlines()
    entries = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines if line.strip()]
    if not entries or None in entries:
        raise BundleError(str(path), "is not what sha256sum writes")
    named = {entry[2]: entry[1] for entry in entries if entry is not None}
    outside = [name for name in named if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise BundleError(str(path), f"names a file outside the folder: {outside[0]}")
    return named, hashlib.sha256(content).hexdigest()


def _files(folder: Path) -> list[str]:
    """Paths of the bundle's files but its manifest."""
    return [name for name in find_bundle_files(folder) if name != MANIFEST]
