"""From level-0 pixels to DICOM's slide coordinate system."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class SlideFrame:
    """Where level 0 lies in the slide coordinate system, in mm."""

    origin_mm: tuple[float, float, float]
    """Centre of the top left pixel of level 0, as TotalPixelMatrixOriginSequence has it."""
    orientation: tuple[float, ...]
    """Direction cosines along a row and along a column, as ImageOrientationSlide has them."""
    spacing_mm: tuple[float, float]
    """(between rows, between columns) of level 0, as PixelSpacing has them."""

    def to_mm(self, points_px0: ArrayLike) -> NDArray[np.float64]:
        """(n, 3) positions of (n, 2) points (x, y), where (0, 0) is the corner of the scan.

        A pixel's centre lies at (x + 1/2, y + 1/2), and DICOM's origin is a centre.
        """
        steps = np.asarray(points_px0, np.float64).reshape(-1, 2) - 0.5
        along_row, along_column = np.array(self.orientation[:3]), np.array(self.orientation[3:])
        between_rows, between_columns = self.spacing_mm
        return (
            np.array(self.origin_mm)
            + steps[:, :1] * between_columns * along_row
            + steps[:, 1:] * between_rows * along_column
        )
