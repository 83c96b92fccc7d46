"""Coarse rasters on a slide: where they lie, how they are tiled, and their pyramids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import highdicom as hd
import numpy as np
from numpy.typing import NDArray

from s4mil_monai.outputs.dicom_source import DicomSource

TILE_PX = 256


def tile_size_of(pixels: NDArray[Any]) -> tuple[int, int]:
    """(rows, columns) of the tiles of a raster; a small one is a tile."""
    return min(TILE_PX, pixels.shape[0]), min(TILE_PX, pixels.shape[1])


def halve_while_large(
    pixels: NDArray[Any], merge: Callable[[NDArray[Any]], NDArray[Any]], *, beyond: float
) -> list[NDArray[Any]]:
    """A raster and, as long as it is larger than a tile, the same with half as many pixels a side.

    Args:
        pixels: (h, w).
        merge: Makes (h, w) of the (h, w, 4) pixels that become one.
        beyond: Value beyond the edge, where a side is odd.
    """
    levels = [pixels]
    while max(levels[-1].shape) > TILE_PX:
        last = levels[-1]
        even = np.pad(last, ((0, last.shape[0] % 2), (0, last.shape[1] % 2)), constant_values=beyond)
        height, width = even.shape
        blocks = even.reshape(height // 2, 2, width // 2, 2).swapaxes(1, 2).reshape(height // 2, width // 2, 4)
        levels.append(merge(blocks))
    return levels


def place_raster(source: DicomSource, pitch_px0: float, *, centre_px0: float) -> dict:
    """Spacing, orientation and position of a coarse raster, as highdicom takes them.

    Without a position of its own a raster takes over the slide's origin, which is the centre of a pixel of the
    slide and not of the raster: half a patch off, and nothing says so.

    Args:
        source: The slide.
        pitch_px0: Level-0 pixels from one pixel of the raster to the next.
        centre_px0: Where the centre of the first pixel lies, in x and y.
    """
    row_mm, column_mm = source.frame.spacing_mm
    return {
        "pixel_measures": hd.PixelMeasuresSequence(
            pixel_spacing=[round(row_mm * pitch_px0, 12), round(column_mm * pitch_px0, 12)], slice_thickness=0.001
        ),
        "plane_orientation": hd.PlaneOrientationSequence("SLIDE", source.frame.orientation),
        "plane_positions": [
            hd.PlanePositionSequence(
                "SLIDE",
                image_position=[round(v, 9) for v in source.frame.to_mm([(centre_px0, centre_px0)])[0].tolist()],
                pixel_matrix_position=(1, 1),
            )
        ],
    }
