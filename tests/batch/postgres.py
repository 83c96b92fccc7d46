"""A PostgreSQL server of one's own: Debian's, in a temporary folder, reached by a socket in it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg

BINARIES = Path("/usr/lib/postgresql/15/bin")


def find_reason_without() -> str | None:
    """Why there can be no server here; None where there can."""
    if not (BINARIES / "initdb").exists():
        return "Debian's postgresql-15 is not installed"
    if os.geteuid() != 0 or shutil.which("runuser") is None:
        return "the server is started as user postgres, which only root can"
    return None


class Postgres:
    """A server; made by :meth:`start`, gone after :meth:`remove`."""

    def __init__(self) -> None:
        self._folder = Path(
            tempfile.mkdtemp(prefix="s4mil-pg-", dir="/tmp")
        )  # root's own folders are closed to it
        self._databases = 0
        owner = pwd.getpwnam("postgres")
        os.chown(self._folder, owner.pw_uid, owner.pw_gid)
        self._call("initdb", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")

    def start(self) -> None:
        """Start it; it answers when this returns. It never waits for the disk."""
        options = f"-c listen_addresses='' -k {self._folder} -c max_connections=30 -c fsync=off"
        self._call("pg_ctl", "start", "-w", "-o", options, "-l", str(self._folder / "log"))

    def stop(self) -> None:
        """End it as a power failure would."""
        self._call("pg_ctl", "stop", "-m", "immediate")

    def remove(self) -> None:
        """Stop it and remove its folder."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def make_database(self) -> str:
        """URL of a new database."""
        self._databases += 1
        name = f"s4mil{self._databases}"
        with psycopg.connect(host=str(self._folder), user="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return f"postgresql+psycopg://postgres@/{name}?host={self._folder}"

    def _call(self, program: str, *arguments: str) -> None:
        command = [*_as_postgres(program), "-D", str(self._folder / "data"), *arguments]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL)


def _as_postgres(program: str) -> list[str]:
    return ["runuser", "-u", "postgres", "--", str(BINARIES / program)]
