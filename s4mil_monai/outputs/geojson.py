"""Regions and deciding patches for QuPath: GeoJSON in level-0 pixels, without a geographic CRS."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapely import Polygon, STRtree, box, union_all
from shapely.geometry import MultiPolygon, mapping

from s4mil_monai.outputs.heatmap import shown_class
from s4mil_monai.result import SlideResult

REGION_THRESHOLD = 0.5
"""Patches at least this probable are joined into regions."""

DECIDING_SHOWN = 10
"""Deciding patches written as objects of their own."""

REGION_RGB = (200, 55, 60)
DECIDING_RGB = (20, 110, 200)


def write_geojson(result: SlideResult, path: Path) -> None:
    """Write regions of probable patches and the patches that decided the score."""
    collection = {"type": "FeatureCollection", "features": [*_regions(result), *_deciding(result)]}
    path.write_text(json.dumps(collection, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Region:
    """A connected group of probable patches."""

    polygon: Polygon
    """In level-0 pixels."""
    patches: int
    largest: float
    """Of the probabilities of the shown class."""


def find_regions(result: SlideResult) -> list[Region]:
    """One region for each connected group of probable patches."""
    if result.patches is None:
        return []
    shown = shown_class(result)
    pairs = zip(result.patches.top_left_px0, result.patches.probabilities, strict=True)
    probable = [(_square(corner, result), row[shown]) for corner, row in pairs if row[shown] >= REGION_THRESHOLD]
    if not probable:
        return []
    joined = union_all([square for square, _ in probable])
    polygons: list[Any] = list(joined.geoms) if isinstance(joined, MultiPolygon) else [joined]
    largest, count = [0.0] * len(polygons), [0] * len(polygons)
    owners, members = STRtree([square.centroid for square, _ in probable]).query(polygons, predicate="contains")
    for owner, member in zip(owners, members, strict=True):
        count[owner] += 1
        largest[owner] = max(largest[owner], probable[member][1])
    return [Region(*found) for found in zip(polygons, count, largest, strict=True)]


def _regions(result: SlideResult) -> list[dict[str, Any]]:
    name = result.classes[shown_class(result)]
    return [
        _feature(
            region.polygon, name, REGION_RGB, {"patches": region.patches, f"largest p({name})": region.largest}
        )
        for region in find_regions(result)
    ]


def _deciding(result: SlideResult) -> list[dict[str, Any]]:
    if result.predicted is None:
        return []
    best = result.classes.index(result.predicted)
    return [
        _feature(
            _square(patch.top_left_px0, result),
            "Deciding patch",
            DECIDING_RGB,
            {"rank": rank, f"share of logit({result.predicted})": patch.contributions[best]},
        )
        for rank, patch in enumerate(result.deciding_patches[:DECIDING_SHOWN], start=1)
    ]


def _square(corner: tuple[int, int], result: SlideResult) -> Polygon:
    """A patch in whole level-0 pixels; rounded up, so that neighbours touch where the side is not whole."""
    assert result.patches is not None
    x, y = corner
    side = math.ceil(result.patches.side_px0)
    return box(x, y, x + side, y + side)


def _feature(polygon: Any, name: str, rgb: tuple[int, int, int], measurements: dict[str, float]) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": mapping(polygon),
        "properties": {
            "objectType": "annotation",
            "classification": {"name": name, "color": list(rgb)},
            "measurements": measurements,
        },
    }
