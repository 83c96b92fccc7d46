"""Make the demonstration's slide: ``python -m s4mil_monai.demo SLIDE.tif``.

scikit-image ships a 512x512 picture of real colon tissue (immunohistochemistry, haematoxylin and DAB). Mirrored
side by side on glass it becomes a small pyramidal slide. It is real tissue but no slide of a patient, and its
stain is not the H&E that the demonstration weights saw: the score shows how the software works, nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s4mil_monai.slides.pyramid import write_pyramid

GLASS_RGB = (243, 242, 241)
MARGIN_PX = 384
MPP = 0.5


def draw_demo_slide() -> NDArray[np.uint8]:
    """(H, W, 3) picture: four by four mirrored copies of the tissue on glass."""
    from skimage.data import immunohistochemistry

    tissue = np.asarray(immunohistochemistry())[..., :3]
    row = np.concatenate((tissue, tissue[:, ::-1]) * 2, axis=1)
    block = np.concatenate((row, row[::-1]) * 2, axis=0)
    picture = np.empty((block.shape[0] + 2 * MARGIN_PX, block.shape[1] + 2 * MARGIN_PX, 3), np.uint8)
    picture[:] = GLASS_RGB
    picture[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX] = block
    return picture


def find_demo_slides() -> str:
    """The folder of the demonstration slide below the working directory; it is drawn if it is not there."""
    slide = Path("output") / "demo_slides" / "demo.tif"
    if not slide.exists():
        slide.parent.mkdir(parents=True, exist_ok=True)
        part = slide.with_name(f".{slide.name}")
        write_pyramid(draw_demo_slide(), part, mpp=MPP).replace(slide)
    return str(slide.parent)


if __name__ == "__main__":
    write_pyramid(draw_demo_slide(), Path(sys.argv[1]), mpp=MPP)
