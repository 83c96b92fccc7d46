"""What a slide file says about itself: µm/px, magnification and the scanner, format by format.

OpenSlide answers for the formats it knows. For the others, and for those that it takes for a plain TIFF, the
texts that vendors put into TIFF tags are read here. They are searched with regular expressions of bounded
length and never parsed as XML: a slide may come from anywhere, and an XML parser can be made to expand entities
without end. What cannot be understood is taken for absent; nothing here raises.
"""

from __future__ import annotations

import html
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tifffile

from s4mil_monai.geometry import SizePx
from s4mil_monai.slides.backends import OpenSlideSlide, WsidicomSlide
from s4mil_monai.slides.dicom_header import read_header
from s4mil_monai.slides.slide import Slide

COARSEST_TIFF_TAG_MPP = 30.0
"""TIFF tags coarser than this are a printer's default (72, 96, 300 dpi), not a microscope."""

FINEST_MPP = 0.02
"""Light resolves about 0.2 µm: no scanner has pixels ten times finer, and such a value is in a mistaken unit."""

LONGEST_TEXT = 16 << 20
"""Characters of a tag that are searched; Philips puts pictures of label and glass before the pixel spacing."""

MOST_ELEMENTS = 1000
"""XML elements of one name that are looked at."""

MOST_PAGES = 64
"""Pages of a TIFF among which level 0 is sought."""

DESCRIPTION, MAKE, MODEL, X_RESOLUTION, Y_RESOLUTION, UNIT, XMP = 270, 271, 272, 282, 283, 296, 700
NDPI_VERSION, NDPI_LENS, NDPI_PROPERTIES = 65420, 65421, 65449

UM_PER_RESOLUTION_UNIT = {2: 25_400.0, 3: 10_000.0}
"""Of the TIFF tag ResolutionUnit; 1 says that there is none."""

UM_PER_UNIT = {
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("μm", "um", "micron", "microns", "micrometer", "micrometre"), 1.0),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
    **dict.fromkeys(("m", "meter", "metre"), 1e6),
    **dict.fromkeys(("inch", "in"), 25_400.0),
}
"""Of units by name, with the Greek letter for micro; the micro sign is folded into it."""

MICRO_SPELLINGS = ("µ", "\\u00b5", "\\u03bc", "âµ")
"""In lower case: the micro sign, both signs escaped as Java does, and UTF-8 taken for Latin-1."""

PLACEHOLDERS = {"", "unknown", "none", "n/a", "na", "null"}
"""What files hold where they name no scanner."""

Pair = tuple[float, float]
"""µm per level-0 pixel in x and y."""


@dataclass(frozen=True)
class TiffTags:
    """Tags of the first page and of the page that is level 0, by number."""

    first: Mapping[int, Any] = field(default_factory=dict)
    level0: Mapping[int, Any] = field(default_factory=dict)
    """Empty where no page has the size of level 0."""
    size_px0: SizePx = (0, 0)

    @property
    def text(self) -> str:
        """Descriptions and XMP of both pages."""
        pages = (self.first,) if self.first is self.level0 else (self.first, self.level0)
        return "\n".join(as_text(tags[code]) for tags in pages for code in (DESCRIPTION, XMP) if code in tags)

    @property
    def resolution(self) -> Mapping[int, Any]:
        """The page whose resolution tags count: level 0, or the first where it is not found."""
        return self.level0 or self.first


@dataclass(frozen=True)
class Finding:
    """What one part of a file says."""

    source: str
    """``vendor:NAME``, ``dicom`` or ``tiff``."""
    mpp: Pair | None = None
    """µm per level-0 pixel in x and y."""
    magnification: float | None = None
    """Nominal, of the objective or of the scan: it means different µm/px on different scanners."""
    serial: str = ""
    model: str = ""
    maker: str = ""


def read_findings(slide: Slide) -> tuple[Finding, ...]:
    """Everything the file says, the most trusted first: vendor tags, DICOM, TIFF tags with a real unit."""
    tags = _read_tiff_tags(slide.path, slide.size_px0)
    text = tags.text
    found = [_openslide_finding(slide), *(read(tags, text) for read in VENDOR_READERS)]
    found += [_wsidicom_finding(slide), _plain_tiff(tags)]
    return tuple(_plausible(finding) for finding in found if finding is not None)


def _plausible(finding: Finding) -> Finding:
    if finding.mpp is None or min(finding.mpp) >= FINEST_MPP:
        return finding
    return replace(finding, mpp=None)


# --- OpenSlide and DICOM


def _openslide_finding(slide: Slide) -> Finding | None:
    properties = _openslide_properties(slide)
    vendor = properties.get("openslide.vendor", "")
    if not vendor or vendor == "generic-tiff":  # plain TIFF tags are judged below
        return None

    def first(*endings: str) -> str:
        return next((v for end in endings for k, v in properties.items() if k.endswith(end) and _named(v)), "")

    return Finding(
        source="dicom" if vendor == "dicom" else f"vendor:{vendor}",
        mpp=as_pair(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y")),
        magnification=as_positive(properties.get("openslide.objective-power")),
        serial=first(
            "aperio.ScanScope ID",
            "dicom.DeviceSerialNumber",
            "philips.DICOM_DEVICE_SERIAL_NUMBER",
            "ventana.UnitNumber",
            "hamamatsu.NDP.S/N",
            "SCANNER_HARDWARE_ID",  # 3DHISTECH, in a section with a number
        ),
        model=first(
            "aperio.ScannerType",
            "dicom.ManufacturerModelName",
            "philips.DICOM_MANUFACTURERS_MODEL_NAME",
            "ventana.ScannerModel",
            "leica.device-model",
            "hamamatsu.Product",
            "SCANNER_HARDWARE_VERSION",
            "tiff.Model",
        ),
        maker=first("dicom.Manufacturer", "philips.DICOM_MANUFACTURER", "tiff.Make"),
    )


def _openslide_properties(slide: Slide) -> Mapping[str, str]:
    known = getattr(slide, "properties", None)
    if known is not None:
        return known
    try:
        opened = OpenSlideSlide(slide.path)
        opened.close()
        return opened.properties
    except Exception:  # noqa: BLE001  OpenSlide does not know the format: the next source may
        return {}


def _wsidicom_finding(slide: Slide) -> Finding | None:
    if slide.backend != WsidicomSlide.backend:
        return None
    serial, model, maker = _dicom_device(slide.path)
    x_mm, y_mm = _dicom_spacing_mm(slide) or (None, None)
    mpp = as_pair(x_mm, y_mm, um_per_unit=1000.0)
    return Finding("dicom", mpp, serial=serial, model=model, maker=maker)


def _dicom_spacing_mm(slide: Slide) -> Pair | None:
    known = getattr(slide, "pixel_spacing_mm", None)
    if known is not None:
        return known
    try:
        opened = WsidicomSlide(slide.path)
        opened.close()
        return opened.pixel_spacing_mm
    except Exception:  # noqa: BLE001  a damaged header says nothing
        return None


def _dicom_device(path: Path) -> tuple[str, str, str]:
    """Serial number, model and manufacturer of a DICOM file, or of the first in a folder."""
    keywords = ("DeviceSerialNumber", "ManufacturerModelName", "Manufacturer")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    header = read_header(files[0], keywords=keywords) if files else None
    if header is None:
        return "", "", ""
    serial, model, maker = (str(header.get(keyword) or "") for keyword in keywords)
    return serial, model, maker


# --- TIFF


def _read_tiff_tags(path: Path, size_px0: SizePx) -> TiffTags:
    if not path.is_file():
        return TiffTags()
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page.aspage() for page in itertools.islice(file.pages, MOST_PAGES)]
            first = _tag_values(pages[0])
            at = next((i for i, page in enumerate(pages) if _size_px(page) == size_px0), None)
            level0 = {} if at is None else first if at == 0 else _tag_values(pages[at])
            return TiffTags(first, level0, size_px0)
    except Exception:  # noqa: BLE001  no TIFF, or a damaged one, which the reader reports
        return TiffTags()


def _size_px(page: Any) -> SizePx:
    return page.imagewidth, page.imagelength


def _tag_values(page: Any) -> dict[int, Any]:
    wanted = (DESCRIPTION, MAKE, MODEL, X_RESOLUTION, Y_RESOLUTION, UNIT, XMP, NDPI_VERSION, NDPI_LENS)
    return {tag.code: tag.value for tag in page.tags.values() if tag.code in (*wanted, NDPI_PROPERTIES)}


def _resolution_um(tags: Mapping[int, Any], um_per_unit: Pair | None = None) -> Pair | None:
    """µm per pixel from the resolution tags, in their own unit unless another is given."""
    try:
        um = um_per_unit or (UM_PER_RESOLUTION_UNIT[int(tags[UNIT])],) * 2
        pairs = (tags[X_RESOLUTION], tags[Y_RESOLUTION])
        per_unit = [numerator / denominator for numerator, denominator in pairs]
        return as_pair(um[0] / per_unit[0], um[1] / per_unit[1])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _plain_tiff(tags: TiffTags) -> Finding | None:
    mpp = _resolution_um(tags.level0)
    if mpp is None or max(mpp) > COARSEST_TIFF_TAG_MPP:
        return None
    maker, model = (as_text(tags.level0.get(code, "")) for code in (MAKE, MODEL))
    return Finding("tiff", mpp, model=model, maker=maker)


# --- what vendors write into TIFF descriptions


def _aperio(tags: TiffTags, text: str) -> Finding | None:
    """``Aperio …|AppMag = 20|MPP = 0.4990|``, which others write too; some with a decimal comma."""
    entries = dict(_entry(part) for part in text[:100_000].split("|") if "=" in part)
    if not (text.startswith("Aperio") or "MPP" in entries or "AppMag" in entries):
        return None
    mpp = entries.get("MPP", "").replace(",", ".")
    return Finding(
        "vendor:aperio",
        as_pair(mpp, mpp),
        as_positive(entries.get("AppMag")),
        serial=entries.get("ScanScope ID", ""),
        model=entries.get("ScannerType", ""),
    )


def _philips(tags: TiffTags, text: str) -> Finding | None:
    """``<Attribute Name="DICOM_PIXEL_SPACING" …>"0.00025" "0.00025"</Attribute>``: mm, row before column.

    Every level has its own; the finest is level 0.
    """
    if "DICOM_PIXEL_SPACING" not in text:
        return None
    spacings = [re.findall(r"\d[\d.eE+-]*", value) for value in _philips_values(text, "DICOM_PIXEL_SPACING")]
    pairs = [as_pair(column, row, um_per_unit=1000.0) for row, column in (s for s in spacings if len(s) == 2)]

    def only(name: str) -> str:
        return next(iter(_philips_values(text, name)), "").strip('" ')

    return Finding(
        "vendor:philips",
        min((pair for pair in pairs if pair), default=None),
        serial=only("DICOM_DEVICE_SERIAL_NUMBER"),
        model=only("DICOM_MANUFACTURERS_MODEL_NAME"),
        maker=only("DICOM_MANUFACTURER"),
    )


def _philips_values(text: str, name: str) -> list[str]:
    values = re.findall(rf"""Name=["']{name}["'][^<>]{{0,300}}>([^<]{{1,300}})<""", text)
    return [html.unescape(value) for value in values]


def _ventana(tags: TiffTags, text: str) -> Finding | None:
    """``<iScan ScanRes="0.25" Magnification="40" …>`` of Ventana and Roche, in the XMP."""
    for scan in _elements(text, "iScan"):
        return Finding(
            "vendor:ventana",
            as_pair(scan.get("ScanRes"), scan.get("ScanRes")),
            as_positive(scan.get("Magnification")),
            serial=scan.get("UnitNumber", ""),
            model=scan.get("ScannerModel", ""),
        )
    return None


def _leica(tags: TiffTags, text: str) -> Finding | None:
    """``<image><pixels sizeX=…/><view sizeX=…/>``: pixels, and the nm that they cover.

    The glass as a whole is an image too; the scan is the one with the size of level 0, or the finest.
    """
    if "leica-microsystems.com/scn/" not in text:
        return None
    images: list[tuple[bool, Pair, float | None]] = []
    for image in text.split("<image", MOST_ELEMENTS)[1:]:
        pixels, view = (next(iter(_elements(image, name)), {}) for name in ("pixels", "view"))
        size = [as_positive(pixels.get(axis)) for axis in ("sizeX", "sizeY")]
        nm = [as_positive(view.get(axis)) for axis in ("sizeX", "sizeY")]
        if all(size) and all(nm):
            mpp = (nm[0] / size[0] / 1000, nm[1] / size[1] / 1000)  # type: ignore[operator]
            power = as_positive(next(iter(_contents(image, "objective")), None))
            images.append((tuple(size) != tags.size_px0, mpp, power))
    _, mpp, power = min(images, default=(True, None, None), key=lambda image: image[:2])
    device = next(iter(_elements(text, "device")), {})
    return Finding("vendor:leica", mpp, power, model=device.get("model", ""))


def _hamamatsu(tags: TiffTags, text: str) -> Finding | None:
    """NDPI: the resolution tags are the scanner's own; tag 65449 holds ``key=value`` lines on the device."""
    if NDPI_VERSION not in tags.first:
        return None
    properties = _lines(as_text(tags.first.get(NDPI_PROPERTIES, "")))
    return Finding(
        "vendor:hamamatsu",
        _resolution_um(tags.resolution),
        as_positive(tags.first.get(NDPI_LENS)) or as_positive(properties.get("Objective.Lens.Magnificant")),
        serial=properties.get("NDP.S/N", ""),
        model=as_text(tags.first.get(MODEL, "")) or properties.get("Product", ""),
        maker=as_text(tags.first.get(MAKE, "")),
    )


def _perkinelmer(tags: TiffTags, text: str) -> Finding | None:
    """QPTIFF of PerkinElmer and Akoya. Where scan and overview name two sizes, neither is taken."""
    if "<PerkinElmer-QPI-ImageDescription" not in text:
        return None
    sizes, powers = set(_contents(text, "PixelSizeMicrons")), set(_contents(text, "Magnification"))
    size = sizes.pop() if len(sizes) == 1 else None
    power = powers.pop() if len(powers) == 1 else None
    model = next(iter(_contents(text, "InstrumentType")), "")
    return Finding("vendor:perkinelmer", as_pair(size, size), as_positive(power), model=model)


def _ome(tags: TiffTags, text: str) -> Finding | None:
    """OME's ``PhysicalSizeX`` with its unit, µm where none is given."""
    described = [pixels for pixels in _elements(text, "Pixels") if "PhysicalSizeX" in pixels]
    if not described:
        return None
    size = tuple(str(side) for side in tags.size_px0)

    def nearness(pixels: dict[str, str]) -> tuple[bool, float]:
        return (pixels.get("SizeX"), pixels.get("SizeY")) == size, as_positive(pixels.get("SizeX")) or 0.0

    level0 = max(described, key=nearness)
    um = [_um_of(level0.get(f"PhysicalSize{axis}Unit", "um")) for axis in "XY"]
    sizes = [as_positive(level0.get(f"PhysicalSize{axis}")) for axis in "XY"]
    products = [value * unit if value and unit else None for value, unit in zip(sizes, um, strict=True)]
    objectives = [element.get("NominalMagnification") for element in _elements(text, "Objective")]
    device = next(iter(_elements(text, "Microscope")), {})
    return Finding(
        "vendor:ome",
        as_pair(*products),
        as_positive(objectives[0]) if len(objectives) == 1 else None,
        serial=device.get("SerialNumber", ""),
        model=device.get("Model", ""),
        maker=device.get("Manufacturer", ""),
    )


def _imagej(tags: TiffTags, text: str) -> Finding | None:
    """ImageJ's ``unit=micron``; the resolution tags are pixels per that unit, whatever their own unit says."""
    if not text.startswith("ImageJ="):
        return None
    entries = _lines(text)
    unit_x = entries.get("unit", "")
    um = [_um_of(unit) for unit in (unit_x, entries.get("yunit", unit_x))]
    known = (um[0], um[1]) if um[0] and um[1] else None
    return Finding("vendor:imagej", _resolution_um(tags.resolution, known) if known else None)


VENDOR_READERS: tuple[Callable[[TiffTags, str], Finding | None], ...] = (
    _aperio,
    _philips,
    _ventana,
    _leica,
    _hamamatsu,
    _perkinelmer,
    _ome,
    _imagej,
)
"""Each takes the tags and their text and gives None where the file is another vendor's."""


# --- values and texts


def as_positive(value: object) -> float | None:
    """A positive, finite number, or None."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 < number < math.inf else None


def as_pair(x: object, y: object, *, um_per_unit: float = 1.0) -> Pair | None:
    """Two positive, finite numbers in µm, or None."""
    pair = [as_positive(value) for value in (x, y)]
    return (pair[0] * um_per_unit, pair[1] * um_per_unit) if pair[0] and pair[1] else None


def as_text(value: object) -> str:
    """The start of a tag as text."""
    if isinstance(value, bytes):
        return value[:LONGEST_TEXT].decode("utf-8", errors="replace").strip("\0 ")
    return str(value)[:LONGEST_TEXT].strip("\0 ")


def scanner_words(findings: tuple[Finding, ...]) -> tuple[str, ...]:
    """How the file names its scanner: serial numbers, then models, then makers and vendors."""
    vendors = [f.source.removeprefix("vendor:") for f in findings if f.source.startswith("vendor:")]
    groups = ([f.serial for f in findings], [f.model for f in findings], [f.maker for f in findings], vendors)
    return tuple(dict.fromkeys(" ".join(word.split()) for group in groups for word in group if _named(word)))


def _named(value: str) -> bool:
    return value.strip().casefold() not in PLACEHOLDERS


def _um_of(unit: str) -> float | None:
    """µm of a unit, however its µ is written."""
    plain = unit.strip().lower()
    for micro in MICRO_SPELLINGS:
        plain = plain.replace(micro, "μ")
    return UM_PER_UNIT.get(plain)


def _elements(text: str, name: str) -> list[dict[str, str]]:
    """Attributes of the start tags of one name, with or without a namespace's prefix."""
    tags = re.finditer(rf"<(?:\w{{1,30}}:)?{name}(\s[^<>]{{0,20000}})>", text)
    return [_attributes(tag[1]) for tag in itertools.islice(tags, MOST_ELEMENTS)]


def _attributes(tag: str) -> dict[str, str]:
    found = re.findall(r"""\s([\w:.-]{1,100})\s?=\s?(?:"([^"]*)"|'([^']*)')""", tag)
    return {name: html.unescape(double or single) for name, double, single in found}


def _contents(text: str, name: str) -> list[str]:
    """Texts of the elements of one name."""
    return [html.unescape(value).strip() for value in re.findall(rf"<{name}>([^<>]{{1,200}})</{name}>", text)]


def _lines(text: str) -> dict[str, str]:
    return dict(_entry(line) for line in text[:100_000].splitlines() if "=" in line)


def _entry(line: str) -> tuple[str, str]:
    name, _, value = line.partition("=")
    return name.strip(), next(iter(value.strip().splitlines()), "")
