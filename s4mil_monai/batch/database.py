"""Database: where the ledger lies. Transactions that wait for a database that is locked or restarts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from s4mil_monai.errors import LedgerError, MissingExtraError, first_line

MIGRATIONS = Path(__file__).with_name("migrations")
MIGRATION_LOCK = 0x54D11
"""Any number: of PostgreSQL's advisory locks, the one of whoever migrates."""

Result = TypeVar("Result")


class Database:
    """A SQLite file (WAL) or a PostgreSQL database, migrated to what this version knows."""

    def __init__(self, url: str, *, clock: Callable[[], float] | None = None, patience_s: float = 300):
        """Connect, and migrate if need be.

        Args:
            url: SQLAlchemy's; a SQLite file is made where there is none.
            clock: Seconds since 1970; by default this machine's for SQLite, the server's for PostgreSQL, so that
                machines whose clocks differ agree on leases.
            patience_s: How long a database that does not answer is waited for.

        Raises:
            LedgerError: It cannot be reached, is damaged, read-only, or of a later version.
            MissingExtraError: The driver is not installed.
        """
        self._clock = clock
        self.patience_s = min(patience_s, 5)  # until it has answered once
        try:
            self._url = sa.make_url(url)
            self.name = self._url.render_as_string(hide_password=True)
            self._engine = sa.create_engine(
                self._url, pool_pre_ping=True, connect_args=self._connect_args(patience_s)
            )
        except (ArgumentError, NoSuchModuleError) as error:
            raise LedgerError(
                "ledger", f"{first_line(error)}; wanted sqlite:///… or postgresql+psycopg://…"
            ) from error
        except ModuleNotFoundError as error:
            raise MissingExtraError(str(error.name), "postgres") from error
        if self.is_sqlite:
            _set_up_sqlite(self._engine)
        self._inode: int | None = None
        try:
            self.transact(self._migrate)
            self._inode = self._find_inode()
        except LedgerError:
            self.close()
            raise
        self.patience_s = patience_s

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file."""
        return self._url.get_backend_name() == "sqlite"

    def transact(self, work: Callable[[sa.Connection], Result]) -> Result:
        """Do ``work`` in one transaction; do it again if the database was locked or went away meanwhile.

        Args:
            work: May be done twice, even after a commit of which no answer came: it has to find that out.

        Raises:
            LedgerError: No patience is left, or waiting does not help.
        """
        end = time.monotonic() + self.patience_s
        pause_s = 0.05
        while True:
            try:
                self._check_file()
                with self._engine.begin() as connection:
                    return work(connection)
            except SQLAlchemyError as error:
                if not self._passes(error) or time.monotonic() + pause_s > end:
                    raise LedgerError(self.name, f"{_say(error)}{self._hint(error)}") from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5)

    def now(self, connection: sa.Connection) -> float:
        """Seconds since 1970."""
        if self._clock is not None:
            return self._clock()
        if self.is_sqlite:
            return time.time()
        return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()

    def _connect_args(self, patience_s: float) -> dict[str, Any]:
        return {"timeout": min(patience_s, 5)} if self.is_sqlite else {"connect_timeout": 5}

    def _migrate(self, connection: sa.Connection) -> None:
        if not self.is_sqlite:  # SQLite has one writer anyway
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        settings = Config()
        settings.set_main_option("script_location", str(MIGRATIONS))
        settings.attributes["connection"] = connection
        found = _version_of(connection)
        script = ScriptDirectory.from_config(settings)
        if found is not None and found not in {step.revision for step in script.walk_revisions()}:
            raise LedgerError(
                self.name, f"is of version {found}, newer than this software knows; update the software"
            )
        if found != script.get_current_head():
            command.upgrade(settings, "head")

    def _find_inode(self) -> int | None:
        if not self.is_sqlite or not self._url.database:
            return None
        try:
            return Path(self._url.database).stat().st_ino
        except OSError as error:
            raise LedgerError(self.name, f"is gone ({error.strerror}); restore it from a copy") from error

    def _check_file(self) -> None:
        """A removed file could be written to for hours, for nothing."""
        if self._inode is not None and self._find_inode() != self._inode:
            raise LedgerError(self.name, "was replaced while it was in use; start again")

    def _passes(self, error: SQLAlchemyError) -> bool:
        """Whether it may go by itself."""
        if self.is_sqlite:
            return "locked" in str(error) or "busy" in str(error)
        return isinstance(error, DBAPIError) and (
            error.connection_invalidated or type(error).__name__ in ("OperationalError", "InterfaceError")
        )

    def _hint(self, error: SQLAlchemyError) -> str:
        if self._passes(error):
            return "; is the database running, and nobody else holding it?"
        return "; look at its file system" if self.is_sqlite else ""


def _set_up_sqlite(engine: sa.Engine) -> None:
    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy begins, not the driver
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # a reader that becomes a writer in the middle fails where another has written meanwhile
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _version_of(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _say(error: SQLAlchemyError) -> str:
    original = getattr(error, "orig", None)
    return first_line(original if original is not None else error)
