"""The operator's table of µm/px."""

from __future__ import annotations

import pytest

from s4mil_monai.errors import TableError
from s4mil_monai.geometry import Resolution
from s4mil_monai.slides.overrides import Override, Overrides, identify_scanner, read_overrides
from s4mil_monai.slides.reader import open_slide
from s4mil_monai.slides.resolution import find_resolution
from s4mil_monai.slides.slide import Slide
from tests.slides.test_resolution import PHILIPS, QPTIFF, SCN, write_vendor_tiff

APERIO = "Aperio Image Library v11|AppMag = 20|ScanScope ID = SS1302|ScannerType = ScanScope AT2|MPP = 0.5|"


def table(tmp_path, text: str | bytes):
    path = tmp_path / "overrides.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows(*texts: str) -> Overrides:
    """Rows as ``slide,scanner,mpp``."""
    cells = [text.split(",") for text in texts]
    return Overrides(tuple(Override(float(mpp), slide, scanner) for slide, scanner, mpp in cells))


@pytest.fixture(scope="module")
def aperio_slide(tmp_path_factory):
    path = write_vendor_tiff(tmp_path_factory.mktemp("slides") / "2024_007.tif", description=APERIO)
    with open_slide(path) as slide:
        yield slide


def test_table_is_read_as_a_spreadsheet_writes_it(tmp_path):
    text = "\ufeffslide,scanner,mpp,reason\r\na.svs,,0.25,rescanned\r\n\r\n,ScanScope  AT2, 0.5 ,\r\n,,,\r\n"
    assert read_overrides(table(tmp_path, text)).rows == (
        Override(0.25, slide="a.svs", reason="rescanned"),
        Override(0.5, scanner="ScanScope  AT2"),
    )


REFUSED = {
    "no such column": ("slide,scanner,mpp,mmp\na,,1,1\n", "line 1: unknown column 'mmp'"),
    "column missing": ("slide,mpp\na,1\n", "line 1: no column 'scanner'"),
    "column twice": ("slide,scanner,mpp,mpp\na,,1,1\n", "line 1: column 'mpp' twice"),
    "semicolons": ("slide;scanner;mpp\na;;1\n", "line 1: unknown column 'slide;scanner;mpp'"),
    "nothing": ("", "line 1: is empty"),
    "no rows": ("slide,scanner,mpp\n\n", "holds no rows"),
    "neither": ("slide,scanner,mpp\na,,1\n,,0.5\n", "line 3: neither of slide and scanner"),
    "both": ("slide,scanner,mpp\na,b,1\n", "line 2: both of slide and scanner"),
    "zero": ("slide,scanner,mpp\na,,0\n", "line 2: mpp is µm per pixel, from 0.02 to 50, got '0'"),
    "negative": ("slide,scanner,mpp\na,,-1\n", "line 2: mpp"),
    "not finite": ("slide,scanner,mpp\na,,inf\n", "line 2: mpp"),
    "not a number": ("slide,scanner,mpp\na,,nan\n", "line 2: mpp"),
    "decimal comma": ('slide,scanner,mpp\na,,"0,25"\n', "line 2: mpp .* got '0,25'"),
    "nm": ("slide,scanner,mpp\na,,250\n", "line 2: mpp"),
    "mm": ("slide,scanner,mpp\na,,0.00025\n", "line 2: mpp"),
    "cell too many": ("slide,scanner,mpp\na,,0,25\n", "line 2: 4 cells, the header has 3"),
    "cell too few": ("slide,scanner,mpp\na\n", "line 2: mpp .* got ''"),
    "slide twice": ("slide,scanner,mpp\na,,1\n\na,,2\n", "line 4: a is in line 2 already"),
    "scanner twice": ("slide,scanner,mpp\n,AT2,1\n,at2,1\n", "line 3: at2 is in line 2 already"),
    "folder": ("slide,scanner,mpp\n/data/a.svs,,1\n", "line 2: slide is a file name without its folder"),
    "open quote": ('slide,scanner,mpp\n"a,,1\n', "line 2: is not CSV"),
    "Latin-1": ("slide,scanner,mpp\nµ,,1\n".encode("latin-1"), "is not UTF-8"),
    "not text": (b"slide,scanner,mpp\n\0,,1\n\xff", "not"),
}


@pytest.mark.parametrize("text, said", REFUSED.values(), ids=REFUSED)
def test_table_that_cannot_be_meant_is_refused_with_its_line(tmp_path, text, said):
    with pytest.raises(TableError, match=rf"overrides\.csv: .*{said}"):
        read_overrides(table(tmp_path, text))


def test_table_that_is_not_there_or_is_a_folder_is_refused(tmp_path):
    with pytest.raises(TableError, match="No such file"):
        read_overrides(tmp_path / "none.csv")
    with pytest.raises(TableError, match="cannot be read"):
        read_overrides(tmp_path)


@pytest.mark.parametrize(
    "overrides, found",
    [
        (["2024_007.tif,,0.25"], (0.25, "override:slide")),
        (["2024_*.tif,,0.25"], (0.25, "override:slide")),
        (["2024_*,,0.3", "2024_007.tif,,0.25"], (0.25, "override:slide")),  # the exact name wins
        (["2024_*,,0.3", "*,,0.25"], (0.3, "override:slide")),  # the first of the patterns
        ([",aperio,0.3", "2024_*,,0.25"], (0.25, "override:slide")),
        ([",APERIO,0.3"], (0.3, "override:scanner")),
        ([",aperio,0.3", ",scanscope at2,0.25"], (0.25, "override:scanner")),
        ([",scanscope at2,0.3", ",ss1302,0.25"], (0.25, "override:scanner")),
        (["2023_*,,0.25", ",hamamatsu,0.3", ",SS13,0.4"], None),
        (["2024_007,,0.25"], None),
    ],
)
def test_the_more_specific_row_wins(aperio_slide, overrides, found):
    assert rows(*overrides).find(aperio_slide) == found


def test_a_name_with_brackets_is_itself(tmp_path):
    path = write_vendor_tiff(tmp_path / "a[1].tif")
    with open_slide(path) as slide:
        assert rows("a[1].tif,,0.25").find(slide) == (0.25, "override:slide")


def test_order_is_assumed_then_slide_then_scanner_then_file(aperio_slide):
    overrides = rows("2024_*,,0.3", ",aperio,0.4")
    assert find_resolution(aperio_slide, assume_mpp=0.2, overrides=overrides) == Resolution(0.2, "override")
    assert find_resolution(aperio_slide, overrides=overrides) == Resolution(0.3, "override:slide")
    assert find_resolution(aperio_slide, overrides=rows(",aperio,0.4")) == Resolution(0.4, "override:scanner")
    assert find_resolution(aperio_slide, overrides=rows("x,,0.4")) == Resolution(0.5, "vendor:aperio")


NDPI_TEXT = b"Product=C13210\r\nNDP.S/N=000003\r\nObjective.Lens.Magnificant=20.0\r\n\0"
SCANNERS = {
    "Aperio": ({"description": APERIO}, ("SS1302", "ScanScope AT2", "aperio")),
    "Philips": (
        {"description": PHILIPS},
        ("PHILIPS", "philips"),
    ),
    "Ventana": (
        {"xmp": '<iScan UnitNumber="2000515" ScannerModel="VENTANA DP 200" ScanRes="0.25"/>'},
        ("2000515", "VENTANA DP 200", "ventana"),
    ),
    "Leica": ({"description": SCN}, ("Leica SCN400;Leica SCN", "leica")),
    "Hamamatsu": (
        {"tags": [(65420, 4, 1, 1, True), (65449, 2, len(NDPI_TEXT), NDPI_TEXT, True)]},
        ("000003", "C13210", "hamamatsu"),
    ),
    "PerkinElmer": ({"description": QPTIFF}, ("PhenoImagerHT", "perkinelmer")),
    "OME": (
        {
            "description": '<OME><Instrument><Microscope Manufacturer="Zeiss" Model="Axioscan" SerialNumber="4"/>'
            '</Instrument><Pixels PhysicalSizeX="1" PhysicalSizeY="1"/></OME>'
        },
        ("4", "Axioscan", "Zeiss", "ome"),
    ),
    "TIFF Make and Model": (
        {
            "tags": [(271, 2, 7, b"Huron\0\0", True), (272, 2, 4, b"LE8\0", True)],
            "resolution": (20000, 20000),
            "unit": 3,
        },
        ("LE8", "Huron"),
    ),
    "placeholders": ({"description": "Aperio Image|ScanScope ID = Unknown|MPP = 0.5|"}, ("aperio",)),
    "nobody": ({}, ()),
}


@pytest.mark.parametrize("written, words", SCANNERS.values(), ids=SCANNERS)
def test_scanner_is_named_by_serial_number_model_and_maker(tmp_path, written, words):
    with open_slide(write_vendor_tiff(tmp_path / "s.tif", **written), backends=["tifffile"]) as slide:
        assert identify_scanner(slide) == words


class Proxy(Slide):
    """A slide that is read elsewhere: only path, backend and levels are known here."""

    backend = "openslide"

    def read_inside(self, x, y, width, height, level):
        raise AssertionError("its pixels are not asked for")

    def close(self):
        pass


@pytest.mark.parametrize("backend", ["openslide", "wsidicom"])
def test_slide_that_is_read_in_another_process_is_known_too(shared, backend):
    path = shared / "slides" / "dicom_CMU-1-Small-Region"
    with open_slide(path, backends=[backend]) as slide:
        proxy = Proxy(path, slide.levels)
    proxy.backend = backend  # type: ignore[misc]
    assert find_resolution(proxy) == Resolution(0.499, "dicom")


def test_real_slides_name_their_scanner(shared):
    with open_slide(shared / "slides" / "CMU-1-Small-Region.svs") as slide:
        assert identify_scanner(slide) == ("CPAPERIOCS", "aperio")
