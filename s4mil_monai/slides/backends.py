"""cuCIM, OpenSlide, tifffile and wsidicom behind the contract of :class:`Slide`.

Each opens a file or raises whatever its library raises; :mod:`s4mil_monai.slides.reader` decides who is
asked and turns failures into errors that name the slide.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray

from s4mil_monai.extras import require
from s4mil_monai.geometry import Level, SizePx
from s4mil_monai.slides.slide import WHITE, Slide


class CucimSlide(Slide):
    """Tiled TIFF and Aperio SVS through cuCIM, the fastest of the four."""

    backend = "cucim"

    def __init__(self, path: Path):
        self._image = require("cucim", extra="cuda").CuImage(str(path))
        found = self._image.resolutions
        if found["level_count"] < 1:
            raise ValueError("no level")
        sizes = [(int(width), int(height)) for width, height in found["level_dimensions"]]
        super().__init__(path, _levels(sizes))

    def read_inside(self, x: int, y: int, width: int, height: int, level: Level) -> NDArray[np.uint8]:
        # cuCIM divides by the downsample and truncates: the smallest level-0 position that gives x is ceil.
        location = (math.ceil(x * level.downsample), math.ceil(y * level.downsample))
        region = self._image.read_region(location=location, size=(width, height), level=level.number)
        return _as_rgb(np.asarray(region), width, height)

    def close(self) -> None:
        self._image.close()


class OpenSlideSlide(Slide):
    """All formats OpenSlide knows, DICOM among them."""

    backend = "openslide"

    def __init__(self, path: Path):
        self._instance = str(_dicom_instance(path))
        self._slide = openslide.OpenSlide(self._instance)
        self.properties = dict(self._slide.properties)
        super().__init__(path, _levels(list(self._slide.level_dimensions)))

    def read_inside(self, x: int, y: int, width: int, height: int, level: Level) -> NDArray[np.uint8]:
        location = (round(x * level.downsample), round(y * level.downsample))
        try:
            rgba = self._slide.read_region(location, level.number, (width, height))
        except openslide.OpenSlideError:
            # After its first error a handle fails for ever; a new one can still read what is sound.
            self._slide = openslide.OpenSlide(self._instance)
            raise
        return _over_white(np.asarray(rgba))

    def close(self) -> None:
        self._slide.close()


class TifffileSlide(Slide):
    """TIFF through tifffile, segment by segment, so that no level is ever whole in memory."""

    backend = "tifffile"

    def __init__(self, path: Path):
        self._file = tifffile.TiffFile(path)
        self._pages = _pyramid_pages(self._file)
        if not self._pages:
            raise ValueError("no 8-bit RGB or grey image in the file")
        self._descriptor = os.open(path, os.O_RDONLY)
        super().__init__(path, _levels([(page.imagewidth, page.imagelength) for page in self._pages]))

    def read_inside(self, x: int, y: int, width: int, height: int, level: Level) -> NDArray[np.uint8]:
        page = self._pages[level.number]
        region = np.full((height, width, 3), WHITE, np.uint8)
        for index in _segments_over(page, x, y, width, height):
            self._paste_segment(page, index, region, x, y)
        return region

    def _paste_segment(self, page: Any, index: int, region: NDArray[np.uint8], x: int, y: int) -> None:
        size, offset = page.databytecounts[index], page.dataoffsets[index]
        if size == 0:
            return  # a sparse scan leaves tiles of bare glass out
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise ValueError(f"segment {index} ends after {len(data)} of {size} bytes")
        decoded, (_, _, top, left, _), shape = page.decode(data, index, jpegtables=page.jpegtables)
        if decoded is None:
            return
        tile = _as_rgb(decoded[0, : shape[1], : shape[2]], shape[2], shape[1])
        height, width = region.shape[:2]
        x0, x1 = max(left, x), min(left + shape[2], x + width)
        y0, y1 = max(top, y), min(top + shape[1], y + height)
        region[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]

    def close(self) -> None:
        self._file.close()
        os.close(self._descriptor)


class WsidicomSlide(Slide):
    """DICOM WSI through wsidicom."""

    backend = "wsidicom"

    def __init__(self, path: Path):
        wsidicom = require("wsidicom", extra="dicom")
        self._slide = wsidicom.WsiDicom.open(path)
        levels = list(self._slide.levels)
        self._indices = [level.level for level in levels]
        self.pixel_spacing_mm = (levels[0].pixel_spacing.width, levels[0].pixel_spacing.height)
        super().__init__(path, _levels([(level.size.width, level.size.height) for level in levels]))

    def read_inside(self, x: int, y: int, width: int, height: int, level: Level) -> NDArray[np.uint8]:
        image = self._slide.read_region((x, y), self._indices[level.number], (width, height))
        return _as_rgb(np.asarray(image), width, height)

    def close(self) -> None:
        self._slide.close()


def _levels(sizes: list[SizePx]) -> list[Level]:
    """Levels from their sizes; the downsample is the mean of both axes, as OpenSlide has it."""
    width0, height0 = sizes[0]
    return [Level((w, h), (width0 / w + height0 / h) / 2, i) for i, (w, h) in enumerate(sizes)]


def _as_rgb(pixels: NDArray[Any], width: int, height: int) -> NDArray[np.uint8]:
    """Give (height, width, 3) uint8 from grey, RGB or RGBA, refusing anything else."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[:2] != (height, width) or pixels.dtype != np.uint8:
        raise ValueError(f"decoded {pixels.shape} {pixels.dtype}, wanted ({height}, {width}, 3) uint8")
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels[..., :3])


def _over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Paint RGBA over white: OpenSlide leaves what was never scanned transparent black."""
    rgb = rgba[..., :3].copy()
    rgb[rgba[..., 3] == 0] = WHITE
    return rgb


def _pyramid_pages(file: Any) -> list[Any]:
    """Pages of the pyramid, finest first: 8-bit, tiled alike, and of one shape; tifffile knows only some."""
    pages = [page.aspage() for page in file.pages]
    # OME-TIFF keeps the coarser levels in directories of their own below the finest one
    pages += [level.aspage() for page in pages if page.subifds for level in page.pages or ()]
    pages = [page for page in pages if page.dtype == np.uint8 and page.samplesperpixel in (1, 3, 4)]
    if not pages:
        return []
    first = max(pages, key=lambda page: page.imagewidth * page.imagelength)
    aspect = first.imagewidth / first.imagelength

    def is_level(page: Any) -> bool:
        # a level is off by at most a pixel from the shape of the first; labels and thumbnails are not tiled
        bound = 1.5 / min(page.imagewidth, page.imagelength)
        same_shape = abs(page.imagewidth / page.imagelength / aspect - 1) <= bound
        return page is first or (first.is_tiled and page.is_tiled and same_shape)

    levels = {page.imagewidth: page for page in reversed(pages) if is_level(page)}
    return [levels[width] for width in sorted(levels, reverse=True)]


def _segments_over(page: Any, x: int, y: int, width: int, height: int) -> list[int]:
    """Indices of the tiles or strips of a TIFF page that a rectangle touches."""
    tile_width = page.tilewidth if page.is_tiled else page.imagewidth
    tile_height = page.tilelength if page.is_tiled else page.rowsperstrip
    across = math.ceil(page.imagewidth / tile_width)
    rows = range(y // tile_height, (y + height - 1) // tile_height + 1)
    columns = range(x // tile_width, (x + width - 1) // tile_width + 1)
    return [row * across + column for row in rows for column in columns]


def _dicom_instance(path: Path) -> Path:
    """The file OpenSlide wants: itself, or one instance of the only slide in a DICOM folder."""
    if not path.is_dir():
        return path
    series: dict[str, Path] = {}
    for instance in sorted(path.iterdir()):
        if instance.is_file() and openslide.OpenSlide.detect_format(str(instance)) == "dicom":
            with openslide.OpenSlide(str(instance)) as slide:
                series.setdefault(slide.properties.get("dicom.SeriesInstanceUID", ""), instance)
    if len(series) != 1:
        raise ValueError(f"the folder holds {len(series)} DICOM slides, wanted one")
    return next(iter(series.values()))
