"""Jobs, sightings of slides, history, provenance and runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SHA256 = sa.String(64)
BIG = sa.BigInteger()


def upgrade() -> None:
    """Make them all."""
    op.create_table(
        "jobs",
        sa.Column("key", SHA256, nullable=False),
        sa.Column("slide", SHA256, nullable=False),
        sa.Column("model", SHA256, nullable=False),
        sa.Column("settings", SHA256, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("found_at", sa.Float(), nullable=False),
        sa.Column("changed_at", sa.Float(), nullable=False),
        sa.Column("not_before", sa.Float(), nullable=False),
        sa.Column("lease", sa.String(64)),
        sa.Column("owner", sa.Text()),
        sa.Column("leased_at", sa.Float()),
        sa.Column("expires_at", sa.Float()),
        sa.Column("error", sa.String(64)),
        sa.Column("reason", sa.Text()),
        sa.Column("folder", sa.Text()),
        sa.Column("sums", SHA256),
        sa.Column("summary", sa.JSON()),
        sa.Column("measures", sa.JSON()),
        sa.PrimaryKeyConstraint("key", name="pk_jobs"),
    )
    kind = ["state", "model", "settings"]
    op.create_index("ix_jobs_claim", "jobs", [*kind, "attempts", "losses", "found_at", "key"])
    op.create_index("ix_jobs_state", "jobs", [*kind, "changed_at"])
    op.create_index("ix_jobs_slide", "jobs", ["slide"])
    op.create_index("ix_jobs_lease", "jobs", ["lease"])
    op.create_table(
        "sightings",
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("snapshot", sa.Text(), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("slide", SHA256),
        sa.Column("failures", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("not_before", sa.Float(), nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("path", name="pk_sightings"),
    )
    op.create_index("ix_sightings_slide", "sightings", ["slide"])
    op.create_table(
        "sources",
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("path", name="pk_sources"),
    )
    op.create_table(
        "history",
        sa.Column("id", BIG.with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("job", SHA256, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("before", sa.String(16)),
        sa.Column("after", sa.String(16), nullable=False),
        sa.Column("owner", sa.Text()),
        sa.Column("error", sa.String(64)),
        sa.Column("note", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_history"),
        sa.ForeignKeyConstraint(["job"], ["jobs.key"], name="fk_history_job"),
    )
    op.create_index("ix_history_job", "history", ["job"])
    op.create_table(
        "provenance",
        sa.Column("number", BIG, autoincrement=False, nullable=False),
        sa.Column("job", SHA256, nullable=False),
        sa.Column("previous", SHA256, nullable=False),
        sa.Column("record", sa.Text(), nullable=False),
        sa.Column("hash", SHA256, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_provenance"),
        sa.ForeignKeyConstraint(["job"], ["jobs.key"], name="fk_provenance_job"),
    )
    op.create_index("ix_provenance_job", "provenance", ["job"])
    chain = op.create_table(
        "chain",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", BIG, nullable=False),
        sa.Column("hash", SHA256, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_chain"),
    )
    op.bulk_insert(chain, [{"id": 1, "number": 0, "hash": "0" * 64}])
    op.create_table(
        "runs",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float()),
        sa.Column("exit_code", sa.Integer()),
        sa.Column("report", sa.JSON()),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
