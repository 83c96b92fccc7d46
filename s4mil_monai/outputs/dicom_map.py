"""The probability of each patch as a DICOM parametric map: one pixel a patch, in place on the slide."""

from __future__ import annotations

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from s4mil_monai.outputs.dicom_codes import NO_UNITS, PATCH_PROBABILITY
from s4mil_monai.outputs.dicom_object import (
    ObjectKind,
    equipment_of,
    finish,
    identity_of,
)
from s4mil_monai.outputs.dicom_raster import halve_while_large, place_raster, tile_size_of
from s4mil_monai.outputs.dicom_source import DicomSource
from s4mil_monai.outputs.heatmap import shown_class
from s4mil_monai.result import SlideResult

KIND = ObjectKind("parametric_map", 903, "Patch probabilities")

NOT_READ = -1.0
"""Of pixels whose patch was not read: glass, or damaged."""


def make_parametric_maps(result: SlideResult, source: DicomSource) -> list[Dataset]:
    """The patch probabilities of the shown class as float32, with the spacing of the patches.

    One pixel a patch, then, where that is more than a tile, coarser levels of a pyramid: means of what was read.
    """
    assert result.patches is not None
    side_px0, stride_px0 = result.patches.side_px0, patch_stride_px0(result)
    levels = halve_while_large(lay_probabilities(result), _mean_of_read, beyond=NOT_READ)
    made = []
    for number, pixels in enumerate(levels):
        # the first pixel is the mean of patches that begin 0, 1, … strides from the corner
        centre_px0 = side_px0 / 2 + (2**number - 1) * stride_px0 / 2
        placed = place_raster(source, stride_px0 * 2**number, centre_px0=centre_px0)
        identity = identity_of(KIND, result, source, level=number, levels=len(levels))
        made.append(_make_level(result, source, pixels, placed, identity))
    return made


def _make_level(
    result: SlideResult, source: DicomSource, pixels: NDArray[np.float32], placed: dict, identity: dict
) -> Dataset:
    shown = result.classes[shown_class(result)]
    mapping = hd.pm.RealWorldValueMapping(
        lut_label="probability",
        lut_explanation=f"Patch probability of {shown}"[:64],
        unit=NO_UNITS,
        value_range=(0.0, 1.0),
        slope=1.0,
        intercept=0.0,
        quantity_definition=PATCH_PROBABILITY,
    )
    made = hd.pm.ParametricMap(
        [source.image],
        pixels[None],
        **identity,
        **equipment_of(result),
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[hd.VOILUTTransformation(window_center=0.5, window_width=1.0)],
        content_label="PATCH_PROB",
        content_description=f"Probability of {shown} for each patch"[:64],
        **placed,
        tile_pixel_array=True,
        tile_size=tile_size_of(pixels),
    )
    made.FloatPixelPaddingValue = made.FloatPixelPaddingRangeLimit = NOT_READ
    return finish(made, KIND, source)


def _mean_of_read(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    """(h, w, 4) → (h, w) means of what was read, ``NOT_READ`` where nothing was."""
    read = blocks != NOT_READ
    count = read.sum(-1)
    mean = np.where(read, blocks, 0).sum(-1) / np.maximum(count, 1)
    return np.where(count > 0, mean, NOT_READ).astype(np.float32)


def patch_stride_px0(result: SlideResult) -> float:
    """Level-0 pixels from one patch to the next."""
    assert result.patches is not None
    return result.patches.side_px0 * (1 - result.settings.overlap_px / result.settings.side_px)


def lay_probabilities(result: SlideResult) -> NDArray[np.float32]:
    """(rows, columns) probability of the shown class of the patch that begins there; ``NOT_READ`` elsewhere."""
    assert result.patches is not None
    columns, rows = np.rint(np.array(result.patches.top_left_px0) / patch_stride_px0(result)).astype(int).T
    pixels = np.full((rows.max() + 1, columns.max() + 1), NOT_READ, np.float32)
    pixels[rows, columns] = np.array(result.patches.probabilities)[:, shown_class(result)]
    return pixels
