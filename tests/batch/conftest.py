"""A site with a sealed bundle of random weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from s4mil_monai.models.seal import seal_bundle
from tests.batch.fork_server import ForkServer
from tests.batch.light_site import LightSite
from tests.batch.postgres import Postgres, find_reason_without
from tests.batch.small_site import SmallSite


@pytest.fixture(scope="session")
def sealed_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as a hospital gets it."""
    sealed = shutil.copytree(bundle, tmp_path_factory.mktemp("sealed") / "tiny")
    (sealed / "trained.pt").unlink()
    seal_bundle(sealed)
    return sealed


@pytest.fixture
def site(tmp_path: Path, sealed_bundle: Path) -> SmallSite:
    """A site whose share is empty, with settings for the impatient."""
    found = SmallSite(tmp_path, sealed_bundle)
    found.configure()
    return found


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server."""
    reason = find_reason_without()
    if reason is not None:
        pytest.skip(reason)
    server = Postgres()
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts schedulers whose processes score nothing, within hundredths of a second."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def light_site(sealed_bundle: Path, fork_server: ForkServer) -> Iterator[LightSite]:
    """A site whose processes score nothing; everything else is as in use.

    It lies in memory where it can: what is killed loses nothing there either, and nobody waits for a disk.
    """
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        found = LightSite(Path(folder), sealed_bundle, fork_server)
        found.configure()
        yield found
