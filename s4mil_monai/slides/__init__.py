"""Pixels in: opening slides, their resolution, tissue, and the grid of patches."""
