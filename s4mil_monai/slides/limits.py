"""What a slide file may ask of the machine before it is refused: files are damaged, and may be hostile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s4mil_monai.errors import UnreadableSlideError
from s4mil_monai.geometry import Level, SizePx


@dataclass(frozen=True)
class ReadLimits:
    """Bounds on pixels, levels, tiles, bytes and seconds. The defaults hold for every scanner we know of."""

    max_side_px: int = 1_000_000
    """Of level 0; the longest scans of today have 300,000."""
    max_pixels: int = 200_000_000_000
    """Of level 0; a whole 5 x 7.5 cm slide at 0.25 µm/px has 60 thousand million."""
    max_levels: int = 32
    """A pyramid halves its sides: 20 levels lead from a million pixels to one."""
    max_pages: int = 512
    """Directories of a TIFF, all focal planes and label pictures included."""
    max_segment_pixels: int = 64_000_000
    """Of one tile or strip, which is decoded whole: a scan saved as one picture needs as much memory as it has."""
    max_segments: int = 20_000_000
    """Tiles or strips of one directory."""
    max_read_bytes: int = 64 << 20
    """Of one read, as RGB."""
    max_memory_bytes: int = 6 << 30
    """Address space of a process that reads; a decoder that wants more fails instead of the machine."""
    starting_s: float = 180.0
    """Until a process that reads must have imported its libraries; a busy machine or a cold disk takes long."""
    opening_s: float = 60.0
    """Until a library must have opened a slide and decoded its first pixels."""
    reading_s: float = 30.0
    """Until a library must have decoded one region."""


DEFAULT_LIMITS = ReadLimits()


def check_levels(name: str, levels: Sequence[Level], limits: ReadLimits = DEFAULT_LIMITS) -> None:
    """Refuse a pyramid that no scanner makes.

    Raises:
        UnreadableSlideError: It says which limit, and what was found.
    """
    width, height = levels[0].size_px
    if len(levels) > limits.max_levels:
        raise UnreadableSlideError(name, f"it claims {len(levels)} levels, at most {limits.max_levels} are read")
    if min(min(level.size_px) for level in levels) < 1:
        raise UnreadableSlideError(name, "one of its levels has no pixels")
    if max(width, height) > limits.max_side_px or width * height > limits.max_pixels:
        raise UnreadableSlideError(
            name,
            f"it claims {width:,} x {height:,} pixels; at most {limits.max_side_px:,} a side and "
            f"{limits.max_pixels:,} in all are read",
        )


def check_segments(name: str, segment_px: SizePx, count: int, limits: ReadLimits = DEFAULT_LIMITS) -> None:
    """Refuse tiles or strips of a TIFF that are too large or too many to be decoded one by one.

    Raises:
        UnreadableSlideError: It says which limit, and what to do.
    """
    width, height = segment_px
    if width * height > limits.max_segment_pixels:
        raise UnreadableSlideError(
            name,
            f"it is stored in pieces of {width:,} x {height:,} pixels, at most {limits.max_segment_pixels:,} "
            "are decoded at once; convert it to a tiled pyramid (vips tiffsave --tile --pyramid)",
        )
    if count > limits.max_segments:
        raise UnreadableSlideError(name, f"it claims {count:,} tiles, at most {limits.max_segments:,} are read")
