"""Measures of slides that never were, drawn from a stated law."""

from __future__ import annotations

import numpy as np

from s4mil_monai.measures import MEASURES, SlideMeasures

MODEL = "ab" * 32
CENTRE, DEVIATION = 0.5, 0.05


def draw_slides(
    count: int, generator: np.random.Generator, *, moved: dict[str, float] | None = None
) -> list[SlideMeasures]:
    """Normal measures, each on its own; ``moved`` shifts some by so many standard deviations."""
    values = generator.normal(CENTRE, DEVIATION, (count, len(MEASURES))).clip(0, 1)
    values[:, MEASURES.index("patches")] += 100
    for name, deviations in (moved or {}).items():
        values[:, MEASURES.index(name)] += deviations * DEVIATION
    return [SlideMeasures(**dict(zip(MEASURES, row, strict=True))) for row in values.tolist()]
