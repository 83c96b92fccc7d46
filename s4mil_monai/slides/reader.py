"""open_slide(): one door to cuCIM, OpenSlide, tifffile and wsidicom, with the choice recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import tifffile

from s4mil_monai.errors import MissingExtraError, UnknownNameError, UnreadableSlideError
from s4mil_monai.slides.backends import CucimSlide, OpenSlideSlide, TifffileSlide, WsidicomSlide
from s4mil_monai.slides.resolution import find_resolution
from s4mil_monai.slides.slide import Slide
from s4mil_monai.slides.soundness import drop_unsound_levels

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Callable[[Path], Slide]] = {
    backend.backend: backend for backend in (CucimSlide, OpenSlideSlide, TifffileSlide, WsidicomSlide)
}
"""Reading backends by name."""

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_slide(
    path: str | Path, *, assume_mpp: float | None = None, backends: Sequence[str] | None = None
) -> Slide:
    """Open a slide with the first backend that can read it.

    TIFF, and what is built on it such as SVS, goes to cuCIM, then OpenSlide, then tifffile; DICOM, as one
    instance or a folder with one slide, to OpenSlide, then wsidicom; anything else to OpenSlide. Why a
    backend was passed over is kept in ``passed_over`` and logged.

    Args:
        path: A file, or a folder that holds one DICOM slide.
        assume_mpp: µm per level-0 pixel; wins over what the file says.
        backends: Names to try instead, in this order.

    Raises:
        UnreadableSlideError: There is no such file, or no backend can read it.
        UnknownNameError: A backend of that name does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise UnreadableSlideError(str(path), "there is no such file")
    passed_over: list[str] = []
    for name in backends or _fitting_backends(path):
        try:
            slide = _open_with(name, path)
        except UnknownNameError:
            raise
        except MissingExtraError as error:
            passed_over.append(f"{name}: {error}")
        except Exception as error:
            passed_over.append(f"{name}: {_one_line(error)}")
        else:
            slide.passed_over = tuple(passed_over)
            slide.resolution = find_resolution(slide, assume_mpp=assume_mpp)
            _log_fallback(slide)
            return slide
    raise UnreadableSlideError(
        path.name, f"not a readable slide, or an incomplete copy of one ({'; '.join(passed_over)})"
    )


def _fitting_backends(path: Path) -> Sequence[str]:
    if path.is_dir():
        return ("openslide", "wsidicom")
    with path.open("rb") as file:
        head = file.read(132)
    if head[:4] in TIFF_MAGIC:
        # cuCIM's libtiff writes to the terminal about files like these; the others are quiet
        return ("cucim", "openslide", "tifffile") if _check_pages(path) else ("openslide", "tifffile")
    if head[128:] == b"DICM":
        return ("openslide", "wsidicom")
    return ("openslide",)


def _check_pages(path: Path) -> bool:
    """Whether tifffile finds pages; refuses what readers would give wrong colours of without an error.

    cuCIM gives black for tiles beyond the end of a file that was cut short, and takes samples of 16 bits for
    something they are not.

    Raises:
        UnreadableSlideError: Tiles lie beyond the end of the file, or samples are not of 8 bits.
    """
    size = path.stat().st_size
    try:
        with tifffile.TiffFile(path) as file:
            pages = list(file.pages)
            ends = [
                offset + count
                for page in pages
                for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
            ]
    except Exception:  # a directory tifffile cannot follow; the backends will say more
        return False
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
    return len(pages) > 0


def _open_with(name: str, path: Path) -> Slide:
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, tuple(BACKENDS))
    slide = BACKENDS[name](path)
    try:
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
