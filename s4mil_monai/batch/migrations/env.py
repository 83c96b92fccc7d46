"""Alembic starts here; the connection, and the transaction it is in, are the caller's."""

from __future__ import annotations

from alembic import context

from s4mil_monai.batch.schema import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
