"""open_slide(): one door to cuCIM, OpenSlide, tifffile and wsidicom, with the choice recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tifffile

from s4mil_monai.errors import UnknownNameError, UnreadableSlideError
from s4mil_monai.slides.backends import CucimSlide, OpenSlideSlide, TifffileSlide, WsidicomSlide
from s4mil_monai.slides.limits import DEFAULT_LIMITS, check_levels, check_segments
from s4mil_monai.slides.overrides import Overrides
from s4mil_monai.slides.resolution import find_resolution
from s4mil_monai.slides.slide import Slide
from s4mil_monai.slides.soundness import drop_unsound_levels

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Callable[[Path], Slide]] = {
    backend.backend: backend for backend in (CucimSlide, OpenSlideSlide, TifffileSlide, WsidicomSlide)
}
"""Reading backends by name."""

OTHER_KINDS = {
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"%PDF": "a PDF document",
    b"PK\3\4": "a zip archive",
}
"""What gets a slide's name by mistake, by its first bytes."""

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_slide(
    path: str | Path,
    *,
    assume_mpp: float | None = None,
    overrides: Overrides | None = None,
    backends: Sequence[str] | None = None,
) -> Slide:
    """Open a slide in this process with the first backend that can read it.

    TIFF, and what is built on it such as SVS, goes to cuCIM, then OpenSlide, then tifffile (which comes first
    for the pyramid of an OME-TIFF, of which the others see one level); DICOM, as one
    instance or a folder with one slide, to OpenSlide, then wsidicom; anything else to OpenSlide. Why a
    backend was passed over is kept in ``passed_over`` and logged. For files that may be damaged or hostile
    there is :func:`s4mil_monai.slides.isolation.open_isolated`.

    Args:
        path: A file, or a folder that holds one DICOM slide.
        assume_mpp: µm per level-0 pixel; wins over what the file says.
        overrides: Of the site, per file or scanner; they too win over what the file says.
        backends: Names to try instead, in this order.

    Raises:
        UnreadableSlideError: There is no such file, no backend can read it, or it asks for too much.
        UnknownNameError: A backend of that name does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise UnreadableSlideError(str(path), "there is no such file")

    slide = choose_backend(path, backends or fitting_backends(path), lambda name: open_with(name, path))
    try:
        slide.resolution = find_resolution(slide, assume_mpp=assume_mpp, overrides=overrides)
    except Exception:
        slide.close()
        raise
    return slide


def choose_backend(path: Path, names: Sequence[str], open_named: Callable[[str], Slide]) -> Slide:
    """The slide as the first of the named backends opens it, with the reasons of those that could not.

    Raises:
        UnreadableSlideError: None of them can.
        UnknownNameError: A backend of that name does not exist.
    """
    for name in names:
        if name not in BACKENDS:
            raise UnknownNameError("backend", name, tuple(BACKENDS))
    passed_over: list[str] = []
    for name in names:
        try:
            slide = open_named(name)
        except Exception as error:
            passed_over.append(f"{name}: {_one_line(error)}")
        else:
            slide.passed_over = tuple(passed_over)
            _log_fallback(slide)
            return slide
    raise UnreadableSlideError(
        path.name, f"not a readable slide, or an incomplete copy of one ({'; '.join(passed_over)})"
    )


def fitting_backends(path: Path) -> Sequence[str]:
    """Names of the backends to try, by the file's first bytes and not by its name.

    Raises:
        UnreadableSlideError: The file is empty, cut short, no slide whatever its name, or of a kind that readers
            give wrong pixels of.
    """
    if path.is_dir():
        return ("openslide", "wsidicom")
    with path.open("rb") as file:
        head = file.read(132)
    _refuse_other_kinds(path, head)
    if head[:4] in TIFF_MAGIC:
        return _backends_of_tiff(_check_pages(path))
    if head[128:] == b"DICM":
        return ("openslide", "wsidicom")
    return ("openslide",)


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    if not head:
        raise UnreadableSlideError(path.name, "the file is empty; copy it again")
    if path.suffix.lower() == ".mrxs":
        return  # its first file is a small JPEG
    for magic, kind in OTHER_KINDS.items():
        if head.startswith(magic):
            raise UnreadableSlideError(path.name, f"it is {kind} and no slide, whatever its name says")


def _backends_of_tiff(pages: list[Any]) -> Sequence[str]:
    if not pages:
        return ("openslide", "tifffile")  # cuCIM's libtiff writes to the terminal about files like these
    if pages[0].subifds:  # levels hang below the first page, as in OME-TIFF; cuCIM and OpenSlide do not look there
        return ("tifffile", "cucim", "openslide")
    return ("cucim", "openslide", "tifffile")


def _check_pages(path: Path) -> list[Any]:
    """The pages that tifffile finds; refuses what readers would give wrong colours of without an error.

    cuCIM gives black for tiles beyond the end of a file that was cut short, and takes samples of 16 bits for
    something they are not.

    Raises:
        UnreadableSlideError: Tiles lie beyond the end of the file, samples are not of 8 bits, or there is more of
            something than any scanner writes.
    """
    size = path.stat().st_size
    try:
        with tifffile.TiffFile(path) as file:
            pages = list(islice(file.pages, DEFAULT_LIMITS.max_pages + 1))
            ends = [_end_of_pixels(path.name, page) for page in pages]
    except UnreadableSlideError:
        raise
    except Exception:  # a directory tifffile cannot follow; the backends will say more
        return []
    if len(pages) > DEFAULT_LIMITS.max_pages:
        raise UnreadableSlideError(path.name, f"it claims more than {DEFAULT_LIMITS.max_pages} pages")
    if pages and pages[0].bitspersample != 8:
        raise UnreadableSlideError(
            path.name,
            f"its samples have {pages[0].bitspersample} bits; brightfield slides have 8, export it as 8-bit RGB",
        )
    if ends and max(ends) > size:
        raise UnreadableSlideError(
            path.name,
            f"the file ends after {size:,} bytes, its pixels after {max(ends):,}; the copy is incomplete",
        )
    return pages


def _end_of_pixels(name: str, page: Any) -> int:
    """Where in the file the last tile or strip of a TIFF page ends."""
    width = page.tilewidth if page.is_tiled else page.imagewidth
    height = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
    check_segments(name, (width, height), len(page.dataoffsets))
    ends = (offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True))
    return max(ends, default=0)


def open_with(name: str, path: Path) -> Slide:
    """Open a slide with one backend, less the levels that cannot be believed; raises what its library raises."""
    slide = BACKENDS[name](path)
    try:
        check_levels(path.name, slide.levels)
        drop_unsound_levels(slide)
    except Exception:
        slide.close()
        raise
    return slide


def _log_fallback(slide: Slide) -> None:
    if slide.passed_over:
        logger.info("%s is read by %s (%s)", slide.name, slide.backend, "; ".join(slide.passed_over))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
