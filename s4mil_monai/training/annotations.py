"""What a pathologist drew on a slide, and the patch labels that follow from it.

Outlines come as ASAP's XML, as CAMELYON's JSON (``positive`` and ``negative`` lists of vertices) or as the GeoJSON
that QuPath writes; all in level-0 pixels, (x, y). A patch's share of tumour is the exact area of its square under
the union of what was drawn as tumour, less the union of what was drawn as an exclusion.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from s4mil_monai.errors import PathError
from s4mil_monai.training.objective import UNKNOWN

POSITIVE_GROUPS = ("Tumor", "Tumour", "_0", "_1", "metastases")
"""Groups that mean tumour: CAMELYON16's ``_0`` and ``_1``, CAMELYON17's ``metastases``, and plain words."""

EXCLUSION_GROUPS = ("_2", "Exclusion", "normal", "Ignore*")
"""Groups cut out of the tumour; ``Ignore*`` is QuPath's."""

SUFFIXES = (".xml", ".json", ".geojson")
LONGEST_FILE_BYTES = 64 << 20
"""The longest of CAMELYON's files has a few megabytes."""

MOST_VERTICES = 128
"""Of a piece that patches are cut with: cutting takes as long as the piece has vertices."""

SHARE_DECIMALS = 9
"""Sums over pieces are right to about 1e-12, so that a patch covered by half has exactly 0.5."""


class AnnotationError(PathError):
    """A file of annotations is missing, damaged, or says something that is not understood."""


@dataclass(frozen=True)
class Annotations:
    """Valid polygons in level-0 pixels."""

    positive: tuple[shapely.Geometry, ...]
    exclusions: tuple[shapely.Geometry, ...] = ()
    notes: tuple[str, ...] = ()
    """What was repaired or left out."""

    def region(self) -> shapely.Geometry:
        """The union of what is positive less the union of what is excluded."""
        return shapely.difference(shapely.union_all(self.positive), shapely.union_all(self.exclusions))


@dataclass(frozen=True)
class Outline:
    """One drawn shape as its file has it."""

    name: str
    group: str
    rings: tuple[NDArray[np.float64], ...]
    """(n, 2) vertices of the shell, then of its holes."""


# Patches ------------------------------------------------------------------------------------------------------


def coverage(annotations: Annotations, top_left_px0: ArrayLike, *, side_px0: float) -> NDArray[np.float64]:
    """The share of each patch that is annotated, exact but for rounding to 1e-9.

    Args:
        annotations: Polygons in level-0 pixels.
        top_left_px0: (n, 2) corners (x, y) in level-0 pixels.
        side_px0: Side of a patch in level-0 pixels, which need not be whole.

    Returns:
        (n,) shares from 0 to 1.

    Raises:
        ValueError: The corners are not (n, 2), or the side is not positive.
    """
    squares = _squares(top_left_px0, side_px0)
    pieces = np.array(_subdivide(annotations.region()), dtype=object)
    if not len(pieces) or not len(squares):
        return np.zeros(len(squares))
    shapely.prepare(pieces)
    which, by = shapely.STRtree(pieces).query(squares, predicate="intersects")
    areas = np.full(len(which), float(side_px0) ** 2)
    cut = ~shapely.covers(pieces[by], squares[which])
    areas[cut] = shapely.area(shapely.intersection(squares[which[cut]], pieces[by[cut]]))
    shares = np.bincount(which, weights=areas, minlength=len(squares)) / float(side_px0) ** 2
    return np.clip(np.round(shares, SHARE_DECIMALS), 0.0, 1.0)


def label_patches(
    annotations: Annotations, top_left_px0: ArrayLike, *, side_px0: float, min_share: float = 0.5
) -> NDArray[np.int64]:
    """Label 1 the patches that are annotated by at least ``min_share``, and 0 the others.

    Args:
        annotations: Polygons in level-0 pixels.
        top_left_px0: (n, 2) corners (x, y) in level-0 pixels.
        side_px0: Side of a patch in level-0 pixels.
        min_share: Above 0, at most 1.

    Returns:
        (n,) labels.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 0 < min_share <= 1:
        raise ValueError(f"min_share is a fraction in (0, 1], got {min_share}")
    return (coverage(annotations, top_left_px0, side_px0=side_px0) >= min_share).astype(np.int64)


def _squares(top_left_px0: ArrayLike, side_px0: float) -> NDArray[Any]:
    corners = np.asarray(top_left_px0, np.float64)
    if corners.ndim != 2 or corners.shape[1] != 2:
        raise ValueError(f"top_left_px0 is (n, 2), got {corners.shape}")
    if not side_px0 > 0 or not math.isfinite(side_px0):
        raise ValueError(f"side_px0 is above 0, got {side_px0}")
    x, y = corners.T
    return shapely.box(x, y, x + side_px0, y + side_px0)


def _subdivide(region: shapely.Geometry) -> list[shapely.Geometry]:
    """Cut a region in halves until no piece has many vertices; the pieces meet only at their edges."""
    pieces: list[shapely.Geometry] = []
    waiting = list(_polygons(region))
    while waiting:
        polygon = waiting.pop()
        left, top, right, bottom = shapely.bounds(polygon)
        # A piece of a pixel may have many vertices still; cutting it further gains nothing.
        if shapely.get_num_coordinates(polygon) <= MOST_VERTICES or max(right - left, bottom - top) <= 1:
            pieces.append(polygon)
            continue
        x, y = (left + right) / 2, (top + bottom) / 2
        halves = (
            (shapely.box(left, top, x, bottom), shapely.box(x, top, right, bottom))
            if right - left > bottom - top
            else (shapely.box(left, top, right, y), shapely.box(left, y, right, bottom))
        )
        for half in halves:
            waiting.extend(_polygons(shapely.intersection(polygon, half)))
    return pieces


def _polygons(geometry: shapely.Geometry) -> Iterator[shapely.Geometry]:
    """The polygons of a geometry; points and lines, which have no area, are left out."""
    for part in shapely.get_parts(geometry):
        if shapely.get_type_id(part) == shapely.GeometryType.POLYGON:
            if not shapely.is_empty(part):
                yield part
        elif shapely.get_dimensions(part) == 2:
            yield from _polygons(part)


# What is known of a slide's patches ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchLabelRule:
    """How the patch labels of one slide come about; called when its patches are known.

    - With a file: 1 where ``min_share`` of the patch is annotated, else 0; for a partly annotated slide, whose
      other patches may be tumour too, :data:`~s4mil_monai.training.objective.UNKNOWN` instead of 0.
    - Without: all 0 if the slide is negative, else not known.
    - A file without one positive polygon on a slide that is not negative says nothing: not known.
    """

    path: str | None
    negative: bool = False
    partly: bool = False
    min_share: float = 0.5
    positive_groups: tuple[str, ...] = POSITIVE_GROUPS
    exclusion_groups: tuple[str, ...] = EXCLUSION_GROUPS

    def __call__(self, top_left_px0: NDArray[np.int64], side_px0: float) -> NDArray[np.int64] | None:
        """(n, 2) corners in level-0 pixels → (n,) labels, or None where nothing is known.

        Raises:
            AnnotationError: The file is damaged.
        """
        nothing = np.zeros(len(top_left_px0), np.int64) if self.negative else None
        if self.path is None:
            return nothing
        drawn = read_annotations(
            self.path, positive_groups=self.positive_groups, exclusion_groups=self.exclusion_groups
        )
        if not drawn.positive:
            return nothing
        labels = label_patches(drawn, top_left_px0, side_px0=side_px0, min_share=self.min_share)
        return np.where(labels == 1, 1, UNKNOWN) if self.partly else labels


# Files --------------------------------------------------------------------------------------------------------


def read_annotations(
    path: str | Path,
    *,
    positive_groups: Sequence[str] = POSITIVE_GROUPS,
    exclusion_groups: Sequence[str] = EXCLUSION_GROUPS,
) -> Annotations:
    """Read a file of annotations: ``.xml`` of ASAP, ``.json`` of CAMELYON or ``.geojson`` of QuPath.

    Outlines that cross themselves, as hand-drawn ones do, are repaired so that all they go round counts once.

    Args:
        path: The file.
        positive_groups: Groups (ASAP) or classifications (QuPath) that are tumour, in small or capital letters.
        exclusion_groups: Those that are cut out of it.

    Raises:
        AnnotationError: It is missing, too long, damaged, or has a group that is in neither list.
    """
    path = Path(path)
    content = _read_bytes(path)
    outlines, notes = _read_xml(path, content) if path.suffix.lower() == ".xml" else _read_json(path, content)
    groups = {name.casefold(): True for name in positive_groups}
    groups |= {name.casefold(): False for name in exclusion_groups}
    drawn: dict[bool, list[shapely.Geometry]] = {True: [], False: []}
    for outline in outlines:
        positive = groups.get(outline.group.casefold())
        if positive is None:
            known = ", ".join((*positive_groups, *exclusion_groups))
            raise AnnotationError(
                str(path), f"{outline.name} is of the group {outline.group!r}, which is none of {known}"
            )
        polygon, note = _as_polygon(path, outline)
        drawn[positive].extend(_polygons(polygon))
        notes.extend([note] if note else [])
    return Annotations(tuple(drawn[True]), tuple(drawn[False]), tuple(notes))


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE_BYTES + 1)
    except OSError as error:
        raise AnnotationError(str(path), f"cannot be read ({error.strerror or error})") from error
    if len(content) > LONGEST_FILE_BYTES:
        raise AnnotationError(str(path), f"is longer than {LONGEST_FILE_BYTES >> 20} MiB")
    return content


def _as_polygon(path: Path, outline: Outline) -> tuple[shapely.Geometry, str | None]:
    """A valid geometry, and what was done to make it so."""
    for ring in outline.rings:
        if not np.isfinite(ring).all():
            raise AnnotationError(str(path), f"{outline.name} has a vertex that is no number")
    shell, *holes = outline.rings
    if len(shell) < 3:
        return shapely.Polygon(), f"{outline.name} is left out: it has {len(shell)} vertices"
    polygon = shapely.Polygon(shell, [hole for hole in holes if len(hole) >= 3])
    if polygon.is_valid:
        return polygon, None
    reason = shapely.is_valid_reason(polygon)
    # The method "linework" makes a hole of what an outline goes round twice.
    repaired = shapely.make_valid(polygon, method="structure", keep_collapsed=False)
    return repaired, f"{outline.name} is repaired: {reason}"


# ASAP ---------------------------------------------------------------------------------------------------------


class _DocumentTypeError(ValueError):
    """An XML file declares a document type, which is where entities come from."""


@dataclass
class _AsapTarget:
    """Collects annotations while XML is parsed; nothing else of it is kept."""

    outlines: list[Outline] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    attributes: dict[str, str] | None = None
    vertices: list[tuple[int, float, float]] = field(default_factory=list)

    def doctype(self, name: str, public_id: str | None, system: str | None) -> None:
        raise _DocumentTypeError("it declares a document type, which annotations have no need of")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "Annotation":
            self.attributes, self.vertices = attributes, []
        elif tag == "Coordinate" and self.attributes is not None:
            order = int(attributes.get("Order", len(self.vertices)))
            self.vertices.append((order, float(attributes["X"]), float(attributes["Y"])))

    def end(self, tag: str) -> None:
        if tag != "Annotation" or self.attributes is None:
            return
        name = self.attributes.get("Name") or f"annotation {len(self.outlines)}"
        kind = self.attributes.get("Type", "Polygon")
        if kind not in ("Polygon", "Rectangle", "Spline"):
            self.notes.append(f"{name} is left out: a {kind} has no area")
        else:
            if kind == "Spline":
                self.notes.append(f"{name} is a spline, taken as the polygon through its points")
            self.vertices.sort(key=lambda vertex: vertex[0])
            shell = np.array([vertex[1:] for vertex in self.vertices], np.float64).reshape(-1, 2)
            self.outlines.append(Outline(name, self.attributes.get("PartOfGroup", "None"), (shell,)))
        self.attributes = None

    def close(self) -> None: ...


def _read_xml(path: Path, content: bytes) -> tuple[list[Outline], list[str]]:
    target = _AsapTarget()
    parser = ElementTree.XMLParser(target=target)
    try:
        # In pieces, so that a document type is refused before what follows it is parsed.
        for start in range(0, len(content), 1 << 16):
            parser.feed(content[start : start + (1 << 16)])
        parser.close()
    except (ElementTree.ParseError, _DocumentTypeError, ValueError, KeyError, OverflowError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise AnnotationError(str(path), f"is no XML of ASAP ({reason})") from error
    if not target.outlines and b"ASAP_Annotations" not in content[:4096]:
        raise AnnotationError(str(path), "is no XML of ASAP (no annotations in it)")
    return target.outlines, target.notes


# JSON ---------------------------------------------------------------------------------------------------------


def _read_json(path: Path, content: bytes) -> tuple[list[Outline], list[str]]:
    try:
        data = json.loads(content)
        if isinstance(data, dict) and "positive" in data:
            return list(_camelyon_outlines(data)), []
        return _geojson_outlines(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise AnnotationError(str(path), f"is neither CAMELYON's JSON nor GeoJSON ({reason})") from error


def _camelyon_outlines(data: dict[str, Any]) -> Iterator[Outline]:
    for key, group in (("positive", "Tumor"), ("negative", "Exclusion")):
        for i, shape in enumerate(data.get(key, [])):
            yield Outline(f"{key} {shape.get('name', i)}", group, (_ring(shape["vertices"]),))


def _geojson_outlines(data: Any) -> tuple[list[Outline], list[str]]:
    """Polygons of a feature collection, or of a list of features as QuPath wrote before."""
    features = data if isinstance(data, list) else data.get("features", [data])
    outlines: list[Outline] = []
    notes: list[str] = []
    for i, feature in enumerate(features):
        properties = feature.get("properties") or {}
        name = str(properties.get("name") or feature.get("id") or f"feature {i}")
        geometry = feature["geometry"]
        if geometry["type"] == "Polygon":
            shapes = [geometry["coordinates"]]
        elif geometry["type"] == "MultiPolygon":
            shapes = geometry["coordinates"]
        else:
            notes.append(f"{name} is left out: a {geometry['type']} has no area")
            continue
        group = _classification(properties)
        outlines += [Outline(name, group, tuple(_ring(ring) for ring in rings)) for rings in shapes if rings]
    return outlines, notes


def _classification(properties: dict[str, Any]) -> str:
    """QuPath's class: ``{"classification": {"name": …}}``, or the name alone; of derived classes the first."""
    found = properties.get("classification")
    if isinstance(found, dict):
        found = found.get("name") or next(iter(found.get("names", [])), None)
    return str(found).split(":")[0].strip() if found else "None"


def _ring(vertices: Iterable[Iterable[float]]) -> NDArray[np.float64]:
    ring = np.array([tuple(vertex)[:2] for vertex in vertices], np.float64)
    if ring.size and ring.shape[1:] != (2,):
        raise ValueError("a vertex is not (x, y)")
    return ring.reshape(-1, 2)
