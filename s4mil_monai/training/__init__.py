"""Bags → checkpoints."""
