"""Pixels → vectors: patch encoders, batches of normalised patches, feature files."""
