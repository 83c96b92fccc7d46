"""The ledger's tables, as they are after the newest of ``migrations/versions``."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

SHA256 = String(64)


class FileText(TypeDecorator[str]):
    """File names, which on Linux are bytes: those that are no UTF-8, which no database takes, are spelled out.

    They come back as they were. A name that is UTF-8 and has no backslash lies in the ledger as it is.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        r"""Bytes that are no UTF-8 as ``\xfc``, and so a backslash as two."""
        return value and re.sub(r"[\\\udc80-\udcff]", _spell_out, value)

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        """The name as :func:`os.fsdecode` gives it."""
        return value and re.sub(r"\\(\\|x[0-9a-f]{2})", _read_back, value)


def _spell_out(found: re.Match[str]) -> str:
    return "\\\\" if found[0] == "\\" else f"\\x{ord(found[0]) - 0xDC00:02x}"


def _read_back(found: re.Match[str]) -> str:
    return "\\" if found[1] == "\\" else chr(0xDC00 + int(found[1][1:], 16))


class SaidText(TypeDecorator[str]):
    """What a library or a file said; what no database takes of it, zeros and broken letters, is replaced."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """The text with replacement characters."""
        return value and re.sub(r"[\x00\ud800-\udfff]", "\ufffd", value)


JOBS = Table(
    "jobs",
    METADATA,
    Column("key", SHA256, primary_key=True),  # of slide, model and settings
    Column("slide", SHA256, nullable=False),  # SHA-256 of its content
    Column("model", SHA256, nullable=False),
    Column("settings", SHA256, nullable=False),
    Column("path", FileText, nullable=False),  # where the slide was seen last
    Column("name", FileText, nullable=False),  # its file, relative to its source
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("losses", Integer, nullable=False),  # schedulers, and processes with several slides, killed with it
    Column("found_at", Float, nullable=False),  # seconds since 1970, UTC, as all times here
    Column("changed_at", Float, nullable=False),  # of the last transition
    Column("not_before", Float, nullable=False),
    Column("lease", String(64)),  # token of whoever has it
    Column("owner", Text),  # machine and process of whoever has it
    Column("leased_at", Float),
    Column("expires_at", Float),
    Column("error", String(64)),  # kind of the last failure
    Column("reason", SaidText),
    Column("folder", Text),  # of the result, relative to out
    Column("sums", SHA256),  # SHA-256 of the result's SHA256SUMS
    Column("summary", JSON),
    Column("measures", JSON),
)
_KIND = (JOBS.c.state, JOBS.c.model, JOBS.c.settings)
# to take the next is a walk along this to the first that is due, whatever the number of jobs
Index("ix_jobs_claim", *_KIND, JOBS.c.attempts, JOBS.c.losses, JOBS.c.found_at, JOBS.c.key)
Index("ix_jobs_state", *_KIND, JOBS.c.changed_at)
Index("ix_jobs_slide", JOBS.c.slide)
Index("ix_jobs_lease", JOBS.c.lease)

SIGHTINGS = Table(
    "sightings",
    METADATA,
    Column("path", FileText, primary_key=True),
    Column("snapshot", FileText, nullable=False),  # sizes and times of its files
    Column("since", Float, nullable=False),  # when it was first seen like this
    Column("slide", SHA256, index=True),  # once it has been read through
    Column("failures", Integer, nullable=False, server_default="0"),  # to read it through in this state
    Column("not_before", Float, nullable=False, server_default="0"),  # it is to be tried again
)

SOURCES = Table(
    "sources",
    METADATA,
    Column("path", FileText, primary_key=True),
    Column("device", Text, nullable=False),  # on which slides were seen in it last
)

HISTORY = Table(
    "history",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("job", SHA256, ForeignKey(JOBS.c.key), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("before", String(16)),
    Column("after", String(16), nullable=False),
    Column("owner", Text),
    Column("error", String(64)),  # kind of the failure, where it was one
    Column("note", SaidText),
)

PROVENANCE = Table(
    "provenance",
    METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("job", SHA256, ForeignKey(JOBS.c.key), nullable=False, index=True),
    Column("previous", SHA256, nullable=False),
    Column("record", Text, nullable=False),  # the exact bytes that were hashed
    Column("hash", SHA256, nullable=False),
)

CHAIN = Table(
    "chain",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),  # 1: the only row, locked to append
    Column("number", BigInteger, nullable=False),
    Column("hash", SHA256, nullable=False),
)

RUNS = Table(
    "runs",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("exit_code", Integer),
    Column("report", JSON),
)
