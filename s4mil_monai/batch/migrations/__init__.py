"""Alembic's steps from one form of the ledger to the next."""
