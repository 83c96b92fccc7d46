"""Results of real slides with probabilities made up, so that every object has something to say."""

from __future__ import annotations

from s4mil_monai.result import (
    DecidingPatch,
    EncoderRecord,
    ModelRecord,
    PatchScores,
    PatchSettings,
    QualityRecord,
    SlideRecord,
    SlideResult,
)
from s4mil_monai.slides.slide import Slide

SIDE_PX0 = 256.0


def make_result(
    slide: Slide,
    *,
    sha256: str = "ab" * 32,
    side_px0: float = SIDE_PX0,
    stride_px0: float | None = None,
    **changes,
) -> SlideResult:
    """Patches over the whole slide, probable in its right half but for a hole, three of them deciding."""
    stride = stride_px0 or side_px0
    width, height = slide.size_px0
    columns, rows = int(width // stride), int(height // stride)
    corners, probabilities = [], []
    for row in range(rows):
        for column in range(columns):
            corners.append((round(column * stride), round(row * stride)))
            probable = column >= columns // 2 and (row, column) != (1, columns - 2)
            probabilities.append(0.6 + 0.3 * row / rows if probable else 0.1)
    fields = {
        "status": "scored",
        "slide": SlideRecord(
            name=slide.name,
            sha256=sha256,
            size_px0=slide.size_px0,
            mpp=slide.mpp,
            mpp_source="tiff",
            backend=slide.backend,
        ),
        "quality": QualityRecord(verdict="pass"),
        "model": ModelRecord(bundle="tiny", version="1.0", sha256="cd" * 32, intended_use="tests"),
        "encoder": EncoderRecord(name="efficientnet_lite0", sha256="ef" * 32, width=1280),
        "settings": PatchSettings(overlap_px=round(256 * (1 - stride / side_px0))),
        "classes": ("normal", "tumour"),
        "predicted": "tumour",
        "probabilities": [0.2, 0.8],
        "calibrated": [0.3, 0.7],
        "decision": "positive",
        "threshold": 0.5,
        "logits": [0.0, 1.386],
        "bias": [0.0, 0.1],
        "deciding_patches": [
            DecidingPatch(index=index, top_left_px0=corners[index], contributions=[0.0, 0.5])
            for index in (0, len(corners) // 2, len(corners) - 1)
        ],
        "patches": PatchScores(
            side_px0=side_px0, mpp=0.5, top_left_px0=corners, probabilities=[[1 - p, p] for p in probabilities]
        ),
        "software": {},
        "seconds": {},
    }
    return SlideResult(**{**fields, **changes})
