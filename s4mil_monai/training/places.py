"""Where a bundle lies, for its own configuration."""

from __future__ import annotations

from pathlib import Path

from s4mil_monai.errors import BundleError


def find_bundle(name: str) -> str:
    """The folder of a bundle: here, or ``bundles/<name>`` here, or that of the source checkout.

    MONAI does not tell a configuration where its own file lies.

    Raises:
        BundleError: It is in none of these places.
    """
    here = Path.cwd()
    checkout = Path(__file__).resolve().parents[2]
    for folder in (here, here / "bundles" / name, checkout / "bundles" / name):
        if folder.name == name and (folder / "configs").is_dir():
            return str(folder)
    raise BundleError(name, "is not a bundle here; start from its folder, or give --bundle_root FOLDER")
