"""What µm/px a slide has, who said so, and which level is read."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mil_monai.errors import TooCoarseError, UnknownResolutionError, UnreadableSlideError
from s4mil_monai.geometry import Resolution
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.slides.reader import open_slide
from s4mil_monai.slides.resolution import find_resolution, plan_reading
from s4mil_monai.slides.vendor_tags import VENDOR_READERS, TiffTags

PICTURE = np.full((600, 800, 3), 200, np.uint8)


def write_tiff(path, *, description=None, resolution=None, unit=None):
    tags = {} if resolution is None else {"resolution": resolution, "resolutionunit": unit}
    tifffile.imwrite(
        path, PICTURE, tile=(256, 256), photometric="rgb", description=description, metadata=None, **tags
    )
    return path


def write_vendor_tiff(path, *, description="", xmp="", resolution=None, unit=1, tags=()):
    """A picture with texts in the places where vendors put them, byte for byte."""
    texts = [(270, 2, 0, description.encode() + b"\0", True)] if description else []
    texts += [(700, 1, len(xmp.encode()), xmp.encode(), True)] if xmp else []
    tifffile.imwrite(
        path,
        PICTURE,
        tile=(256, 256),
        photometric="rgb",
        metadata=None,
        resolution=resolution,
        resolutionunit=unit,
        extratags=[*texts, *tags],
    )
    return path


def resolution_of(path, **options) -> Resolution | None:
    with open_slide(path, **options) as slide:
        return slide.resolution


def test_override_wins_over_the_file(tissue_slide):
    assert resolution_of(tissue_slide, assume_mpp=0.25) == Resolution(0.25, "override")


def test_tiff_tags_with_a_real_unit_count(tmp_path):
    assert resolution_of(write_tiff(tmp_path / "cm.tif", resolution=(20000, 20000), unit=3)) == Resolution(
        0.5, "tiff"
    )
    assert resolution_of(write_tiff(tmp_path / "in.tif", resolution=(50800, 50800), unit=2)) == Resolution(
        0.5, "tiff"
    )


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"resolution": (20000, 20000), "unit": 1},  # no unit
        {"resolution": (72, 72), "unit": 2},  # a printer's default
        {"resolution": (300, 300), "unit": 2},
    ],
    ids=["no tags", "no unit", "72 dpi", "300 dpi"],
)
def test_without_a_real_resolution_there_is_none(tmp_path, tags):
    assert resolution_of(write_tiff(tmp_path / "s.tif", **tags)) is None


def test_vendor_description_wins_over_tiff_tags(tmp_path):
    path = write_tiff(
        tmp_path / "s.tif", description="Scanner|AppMag = 40|MPP = 0.2527|", resolution=(20000, 20000), unit=3
    )
    assert resolution_of(path, backends=["tifffile"]) == Resolution(0.2527, "vendor:aperio")


def test_ome_description_is_read(tmp_path):
    text = '<OME><Image><Pixels PhysicalSizeX="0.25" PhysicalSizeXUnit="µm" PhysicalSizeY="0.25"/></Image></OME>'
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, PICTURE, tile=(256, 256), photometric="rgb", description=text.encode(), metadata=None)
    assert resolution_of(path, backends=["tifffile"]) == Resolution(0.25, "vendor:ome")


PHILIPS = """<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">
<Attribute Name="DICOM_MANUFACTURER" Group="0x0008" Element="0x0070" PMSVR="IString">PHILIPS</Attribute>
<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDouble">&quot;0.000226907&quot; \
&quot;0.000226891&quot;</Attribute>
<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDouble">&quot;0.000453814&quot; \
&quot;0.000453782&quot;</Attribute></DataObject>"""

SCN = """<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="c">
<image name="macro"><pixels sizeX="1616" sizeY="4668"/><view sizeX="26564529" sizeY="76734813"/></image>
<image name="scan"><device model="Leica SCN400;Leica SCN"/>
<pixels sizeX="800" sizeY="600"><dimension sizeX="800" sizeY="600" r="0" ifd="3"/></pixels>
<view sizeX="200000" sizeY="150000" offsetX="7770000"/>
<scanSettings><objectiveSettings><objective>40</objective></objectiveSettings></scanSettings></image>
</collection></scn>"""

QPTIFF = """<?xml version="1.0" encoding="utf-16"?><PerkinElmer-QPI-ImageDescription>
<InstrumentType>PhenoImagerHT</InstrumentType><ScanProfile><root><ScanResolution><Magnification>20</Magnification>
<PixelSizeMicrons>0.4988</PixelSizeMicrons></ScanResolution></root></ScanProfile></PerkinElmer-QPI-ImageDescription>"""


def ome(attributes: str) -> str:
    return f'<?xml version="1.0"?><OME xmlns="o"><Image ID="i"><Pixels ID="p" {attributes}/></Image></OME>'


def ome_in(unit: str, value: str) -> str:
    return ome(" ".join(f'PhysicalSize{axis}="{value}" PhysicalSize{axis}Unit="{unit}"' for axis in "XY"))


VENDORS = {
    "Aperio": ({"description": "Aperio Image Library v11|AppMag = 20|MPP = 0.4990|"}, 0.499, "aperio"),
    "Aperio, decimal comma": ({"description": "Aperio Image|MPP = 0,2524|"}, 0.2524, "aperio"),
    "Philips, mm": ({"description": PHILIPS}, 0.226899, "philips"),
    "Ventana, in the XMP": (
        {"xmp": '<Metadata><iScan UnitNumber="2000515" Magnification="40" ScanRes="0.250000"/></Metadata>'},
        0.25,
        "ventana",
    ),
    "Leica, nm by pixels": ({"description": SCN}, 0.25, "leica"),
    "Hamamatsu, pixels a cm": (
        {"tags": [(65420, 4, 1, 1, True)], "resolution": (21748, 21748), "unit": 3},
        0.459812,
        "hamamatsu",
    ),
    "QPTIFF": ({"description": QPTIFF}, 0.4988, "perkinelmer"),
    "ImageJ, micron": (
        {"description": "ImageJ=1.53t\nimages=1\nunit=micron\n", "resolution": (4.0, 4.0)},
        0.25,
        "imagej",
    ),
    "ImageJ, escaped µm": (
        {"description": "ImageJ=1.53t\nunit=\\u00B5m\nloop=false\n", "resolution": (4.0, 4.0)},
        0.25,
        "imagej",
    ),
    "ImageJ, mm": ({"description": "ImageJ=1.53t\nunit=mm\n", "resolution": (2000.0, 2000.0)}, 0.5, "imagej"),
    "OME, no unit is µm": ({"description": ome('PhysicalSizeX="0.25" PhysicalSizeY="0.25"')}, 0.25, "ome"),
    "OME, micro sign": ({"description": ome_in("\u00b5m", "0.25")}, 0.25, "ome"),
    "OME, Greek mu": ({"description": ome_in("\u03bcm", "0.25")}, 0.25, "ome"),
    "OME, um": ({"description": ome_in("um", "2.5E-1")}, 0.25, "ome"),
    "OME, character reference": ({"description": ome_in("&#181;m", "0.25")}, 0.25, "ome"),
    "OME, nm": ({"description": ome_in("nm", "250")}, 0.25, "ome"),
    "OME, mm": ({"description": ome_in("mm", "0.00025")}, 0.25, "ome"),
    "OME, single quotes and a prefix": (
        {"description": "<OME:OME><OME:Pixels PhysicalSizeX='0.25' PhysicalSizeY='0.25'/></OME:OME>"},
        0.25,
        "ome",
    ),
}


@pytest.mark.parametrize("written, mpp, vendor", VENDORS.values(), ids=VENDORS)
def test_each_vendor_is_read_in_its_own_unit(tmp_path, written, mpp, vendor):
    path = write_vendor_tiff(tmp_path / "s.tif", **written)
    assert resolution_of(path) == Resolution(pytest.approx(mpp, abs=1e-6), f"vendor:{vendor}")


NO_RESOLUTION = {
    "magnification alone": {"description": "Aperio Image Library v11|AppMag = 20|"},
    "zero": {"description": "Aperio Image|MPP = 0|"},
    "not a number": {"description": "Aperio Image|MPP = nan|"},
    "Philips with one value": {"description": PHILIPS.replace("&quot;0.000226907&quot;", "").split("</Attr")[0]},
    "OME in pixels": {"description": ome_in("pixel", "1")},
    "OME in metres for µm": {"description": ome_in("m", "0.25e-9")},
    "ImageJ without a unit": {"description": "ImageJ=1.53t\nunit=pixel\n", "resolution": (4.0, 4.0)},
    "QPTIFF with two sizes": {
        "description": QPTIFF.replace("</root>", "<PixelSizeMicrons>2.0</PixelSizeMicrons></root>")
    },
    "Leica without a view": {"description": SCN.replace("<view", "<look")},
}


@pytest.mark.parametrize("written", NO_RESOLUTION.values(), ids=NO_RESOLUTION)
def test_what_is_no_resolution_is_not_taken_for_one(tmp_path, written):
    assert resolution_of(write_vendor_tiff(tmp_path / "s.tif", **written)) is None


def test_error_names_the_magnification_that_is_no_resolution(tmp_path):
    path = write_vendor_tiff(tmp_path / "s.tif", description="Aperio Image Library v11|AppMag = 20|")
    with open_slide(path) as slide, pytest.raises(UnknownResolutionError, match="only a magnification of 20"):
        plan_reading(slide, mpp=0.5, patch_side_px=256)


def test_tiff_tags_of_a_label_page_say_nothing_about_the_scan(tmp_path):
    path = tmp_path / "s.tif"
    with tifffile.TiffWriter(path) as file:
        options = {"photometric": "rgb", "metadata": None}
        file.write(PICTURE[:100, :100], resolution=(20000, 20000), resolutionunit=3, **options)
        file.write(PICTURE, tile=(256, 256), resolution=(40000, 40000), resolutionunit=3, **options)
    assert resolution_of(path, backends=["tifffile"]) == Resolution(0.25, "tiff")


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;">]>'


def test_entities_are_not_expanded(tmp_path):
    text = BOMB + ome('PhysicalSizeX="&b;" PhysicalSizeY="0.25"')
    assert resolution_of(write_vendor_tiff(tmp_path / "s.tif", description=text)) is None


@pytest.mark.parametrize("reader", VENDOR_READERS, ids=lambda reader: reader.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_text_makes_a_reader_raise(reader, data):
    pieces = [
        PHILIPS,
        SCN,
        QPTIFF,
        ome_in("um", "0.25"),
        "ImageJ=1\nunit=um",
        "Aperio|MPP = 1|AppMag = x",
        "<iScan ",
    ]
    piece = st.sampled_from(pieces).flatmap(lambda p: st.integers(0, len(p)).map(lambda at: p[at:] + p[:at]))
    text = "".join(data.draw(st.lists(piece | st.text(max_size=9) | st.sampled_from(pieces), max_size=4)))
    value = (
        st.none()
        | st.integers()
        | st.text(max_size=3)
        | st.binary(max_size=3)
        | st.tuples(*[st.integers(0, 9)] * 2)
    )
    codes = st.sampled_from([270, 271, 272, 282, 283, 296, 65420, 65421, 65449])
    tags = data.draw(st.dictionaries(codes, value))
    reader(TiffTags(tags, tags, (800, 600)), text)


def notes_of(path, **options) -> tuple[str, ...]:
    with open_slide(path, **options) as slide:
        return slide.notes


@pytest.mark.parametrize(
    "magnification, mpp, noted",
    [(20, 0.5, False), (20, 0.35, False), (20, 0.74, False), (20, 0.25, True), (40, 0.5, True)],
)
def test_magnification_that_means_something_else_is_noted(tmp_path, magnification, mpp, noted):
    path = write_vendor_tiff(tmp_path / "s.tif", description=f"Aperio Image|AppMag = {magnification}|MPP = {mpp}|")
    about = {20: "0.5", 40: "0.25"}[magnification]
    tag = f"{mpp:g} µm/px by the scanner's tag (aperio)"
    note = f"{tag}, but its magnification of {magnification} means about {about}"
    assert notes_of(path) == ((note,) if noted else ())


def test_tiff_tags_that_say_something_else_are_noted(tmp_path):
    def written(name, per_cm):
        text = "Aperio Image|MPP = 0.25|"
        return write_vendor_tiff(tmp_path / name, description=text, resolution=(per_cm, per_cm), unit=3)

    note = "0.25 µm/px by the scanner's tag (aperio), but 0.5 by its TIFF tags"
    assert notes_of(written("contradicts.tif", 20000)) == (note,)
    assert notes_of(written("agrees.tif", 38000)) == ()  # 0.263: 5 %
    assert notes_of(written("printer.tif", 28)) == ()  # 72 dpi


def test_override_that_contradicts_the_file_is_noted(tmp_path):
    path = write_tiff(tmp_path / "s.tif", resolution=(20000, 20000), unit=3)
    note = "0.25 µm/px by the operator's override, but 0.5 by its TIFF tags"
    assert notes_of(path, assume_mpp=0.25) == (note,)
    assert notes_of(path, assume_mpp=0.5) == ()


def test_asking_twice_notes_once(tmp_path):
    path = write_vendor_tiff(tmp_path / "s.tif", description="Aperio Image|AppMag = 40|MPP = 0.5|")
    with open_slide(path) as slide:
        find_resolution(slide)
        assert len(slide.notes) == 1


def test_pixels_that_are_not_square_are_refused(tmp_path):
    path = write_tiff(tmp_path / "s.tif", resolution=(20000, 10000), unit=3)
    with pytest.raises(UnreadableSlideError, match=r"not square \(0.5 by 1 µm, from tiff\)"):
        open_slide(path)


@pytest.mark.parametrize("assume_mpp", [0, -1, float("nan"), float("inf")])
def test_override_that_is_no_resolution_is_refused(tissue_slide, assume_mpp):
    with pytest.raises(ValueError, match="positive"):
        open_slide(tissue_slide, assume_mpp=assume_mpp)


def test_unknown_resolution_is_refused_with_the_setting_to_fill_in(tmp_path):
    with (
        open_slide(write_tiff(tmp_path / "s.tif")) as slide,
        pytest.raises(UnknownResolutionError, match=r"--assume_mpp \(score, .*resolutions: in site\.yaml; S4MIL"),
    ):
        plan_reading(slide, mpp=0.5, patch_side_px=256)


def plan(tmp_path, *, mpp0, wanted, levels=3, shrink=2.0):
    path = write_pyramid(PICTURE, tmp_path / "s.tif", mpp=mpp0, levels=levels, shrink=shrink)
    with open_slide(path) as slide:
        return plan_reading(slide, mpp=wanted, patch_side_px=256)


def test_level_of_the_wanted_resolution_is_read_as_it_is(tmp_path):
    found = plan(tmp_path, mpp0=0.25, wanted=0.5)
    assert (found.level, found.read_side_px, found.side_px0, found.mpp) == (1, 256, 512.0, 0.5)


def test_nearest_finer_level_is_read_and_resampled(tmp_path):
    found = plan(tmp_path, mpp0=0.2, wanted=0.5)
    # 0.5 / 0.4 = 1.25 pixels of level 1 for each wanted one: 320 px
    assert (found.level, found.read_side_px, found.side_px0) == (1, 320, 640.0)
    assert found.mpp == pytest.approx(0.5)
    assert found.note is None


def test_slightly_coarser_scan_is_upsampled_with_a_note(tmp_path):
    found = plan(tmp_path, mpp0=0.586, wanted=0.5)
    assert (found.level, found.read_side_px) == (0, 218)  # 256 x 0.5 / 0.586 = 218.4
    assert found.note == "upsampled from 0.586 to 0.5 µm/px"


def test_up_to_25_percent_coarser_is_read_and_beyond_is_refused_with_both_resolutions(tmp_path):
    assert plan(tmp_path, mpp0=0.62, wanted=0.5).note is not None
    with pytest.raises(TooCoarseError, match=r"0\.63 µm/px, the model wants 0\.5 µm/px") as refused:
        plan(tmp_path, mpp0=0.63, wanted=0.5)
    assert (refused.value.found_mpp, refused.value.wanted_mpp) == (0.63, 0.5)


def test_real_slides_have_the_resolution_their_vendors_wrote(shared):
    slides = shared / "slides"
    assert resolution_of(slides / "CMU-1-Small-Region.svs") == Resolution(0.499, "vendor:aperio")
    assert resolution_of(slides / "gallery19_20x.tif") == Resolution(0.586, "tiff")
    assert resolution_of(slides / "TCGA-CR-7395-01A-01-TS1.svs") is None
    for backend in ("openslide", "wsidicom"):
        dicom = resolution_of(slides / "dicom_CMU-1-Small-Region", backends=[backend])
        assert dicom == Resolution(0.499, "dicom")
