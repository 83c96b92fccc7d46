"""One contract over every reading backend."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s4mil_monai.errors import UnknownNameError, UnreadableSlideError
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.slides.reader import open_slide
from tests.conftest import tissue_picture

BACKENDS = ["cucim", "openslide", "tifffile"]
SIZE = (700, 500)


def position_picture() -> np.ndarray:
    """(500, 700, 3) where red and green tell x and y; blue keeps it from being black."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    return np.stack((x * 255 // SIZE[0], y * 255 // SIZE[1], np.full_like(x, 90)), -1).astype(np.uint8)


@pytest.fixture(scope="module")
def exact_slide(tmp_path_factory) -> Path:
    """Lossless, two levels with a downsample that is no power of two."""
    path = tmp_path_factory.mktemp("reader") / "exact.tif"
    return write_pyramid(position_picture(), path, mpp=0.5, levels=2, compression="deflate", shrink=2.3)


@pytest.fixture(params=BACKENDS)
def slide(request, exact_slide):
    if request.param == "cucim":
        pytest.importorskip("cucim")
    with open_slide(exact_slide, backends=[request.param]) as opened:
        yield opened


def test_backend_is_recorded(slide):
    assert slide.backend in BACKENDS
    assert slide.passed_over == ()


def test_levels_have_their_sizes_and_downsamples(slide):
    assert [level.size_px for level in slide.levels] == [(700, 500), (304, 217)]
    assert slide.levels[1].downsample == pytest.approx((700 / 304 + 500 / 217) / 2)


def test_region_inside_has_exactly_the_pixels_of_the_picture(slide):
    region = slide.read_region(top_left_px0=(123, 45), size_px=(200, 100))
    np.testing.assert_array_equal(region, position_picture()[45:145, 123:323])


@pytest.mark.parametrize("corner", [(600, 400), (-50, -30), (650, -10)])
def test_patch_over_an_edge_is_full_size_and_white_outside(slide, corner):
    region = slide.read_region(top_left_px0=corner, size_px=(256, 256))
    wanted = np.full((256, 256, 3), 255, np.uint8)
    x, y = corner
    picture = position_picture()
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + 256, 700), min(y + 256, 500)
    wanted[y0 - y : y1 - y, x0 - x : x1 - x] = picture[y0:y1, x0:x1]
    np.testing.assert_array_equal(region, wanted)


def test_patch_wholly_outside_is_white(slide):
    assert (slide.read_region(top_left_px0=(5000, 5000), size_px=(64, 32)) == 255).all()
    assert slide.read_region(top_left_px0=(5000, 5000), size_px=(64, 32)).shape == (32, 64, 3)


def test_coarse_level_is_addressed_in_level_0_pixels(slide):
    region = slide.read_region(top_left_px0=(350, 250), size_px=(1, 1), level=1)
    # red tells x and green y, 255 at the far edges; one level-1 pixel is 2.3 level-0 pixels
    assert abs(int(region[0, 0, 0]) - 350 * 255 / 700) <= 2
    assert abs(int(region[0, 0, 1]) - 250 * 255 / 500) <= 2


def test_threads_read_the_same_as_one_thread(slide):
    corners = [(x, y) for x in range(0, 700, 90) for y in range(0, 500, 90)]

    def read(corner):
        return slide.read_region(top_left_px0=corner, size_px=(64, 64))

    with ThreadPoolExecutor(4) as pool:
        for ours, alone in zip(pool.map(read, corners), map(read, corners), strict=True):
            np.testing.assert_array_equal(ours, alone)


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.integers(-400, 900), st.integers(-400, 900), st.integers(1, 300), st.integers(1, 300))
def test_every_rectangle_is_full_size_and_right(slide, x, y, width, height):
    region = slide.read_region(top_left_px0=(x, y), size_px=(width, height))
    canvas = np.full((1700, 1900, 3), 255, np.uint8)
    canvas[400:900, 400:1100] = position_picture()
    np.testing.assert_array_equal(region, canvas[y + 400 : y + 400 + height, x + 400 : x + 400 + width])


@pytest.mark.parametrize("compression", ["jpeg", "deflate", "lzw", None])
def test_backends_agree_on_every_compression(tmp_path, compression):
    path = write_pyramid(position_picture(), tmp_path / "slide.tif", mpp=0.5, levels=1, compression=compression)
    regions = []
    for backend in ("openslide", "tifffile"):
        with open_slide(path, backends=[backend]) as slide:
            regions.append(slide.read_region(top_left_px0=(300, 300), size_px=(128, 128)).astype(int))
    assert np.abs(regions[0] - regions[1]).max() <= 3  # JPEG decoders may round differently


def test_compression_that_only_tifffile_reads_falls_back_and_says_why(tmp_path):
    path = write_pyramid(position_picture(), tmp_path / "s.tif", mpp=0.5, levels=1, compression="png")
    with open_slide(path) as slide:
        assert slide.backend == "tifffile"
        assert slide.passed_over[-1].startswith("openslide: ")
        region = slide.read_region(top_left_px0=(10, 20), size_px=(50, 40))
    np.testing.assert_array_equal(region, position_picture()[20:60, 10:60])


@pytest.mark.parametrize("backends", [None, ["tifffile"]])
def test_tiff_in_strips_reads_exactly(tmp_path, backends):
    path = tmp_path / "strips.tif"
    tifffile.imwrite(path, position_picture(), photometric="rgb", rowsperstrip=16, compression="deflate")
    with open_slide(path, backends=backends) as slide:
        region = slide.read_region(top_left_px0=(10, 20), size_px=(50, 40))
    np.testing.assert_array_equal(region, position_picture()[20:60, 10:60])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UnreadableSlideError, match=r"nowhere\.svs: there is no such file"):
        open_slide(tmp_path / "nowhere.svs")


def test_text_file_is_not_a_slide(tmp_path):
    path = tmp_path / "notes.svs"
    path.write_text("not a slide at all\n" * 50)
    with pytest.raises(UnreadableSlideError, match=r"notes\.svs: not a readable slide"):
        open_slide(path)


def test_slide_cut_in_half_is_refused_and_nothing_is_written_to_the_terminal(tmp_path, exact_slide, capfd):
    path = tmp_path / "half.tif"
    data = exact_slide.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableSlideError, match=r"half\.tif: the file ends after .* the copy is incomplete"):
        open_slide(path)
    assert capfd.readouterr().err == ""


def test_samples_of_16_bits_are_refused_and_not_taken_for_8(tmp_path, capfd):
    path = tmp_path / "deep.tif"
    tifffile.imwrite(path, position_picture().astype(np.uint16) * 200, tile=(256, 256), photometric="rgb")
    with pytest.raises(UnreadableSlideError, match=r"deep\.tif: its samples have 16 bits"):
        open_slide(path)
    assert capfd.readouterr().err == ""


def test_unknown_backend_lists_the_known_ones(exact_slide):
    with pytest.raises(UnknownNameError, match="known: cucim, openslide, tifffile, wsidicom"):
        open_slide(exact_slide, backends=["vips"])


@pytest.mark.parametrize("backend", ["openslide", "wsidicom"])
def test_dicom_reads_as_the_svs_it_was_made_from(shared, backend):
    if backend == "wsidicom":
        pytest.importorskip("wsidicom")
    with (
        open_slide(shared / "slides/dicom_CMU-1-Small-Region", backends=[backend]) as dicom,
        open_slide(shared / "slides/CMU-1-Small-Region.svs") as svs,
    ):
        assert dicom.size_px0 == svs.size_px0
        assert dicom.resolution is not None
        assert (dicom.resolution.mpp, dicom.resolution.source) == (0.499, "dicom")
        for corner in [(0, 0), (801, 601), (2100, 2900)]:
            pair = [s.read_region(top_left_px0=corner, size_px=(256, 256)) for s in (dicom, svs)]
            np.testing.assert_array_equal(*pair)


def test_levels_of_other_colours_are_dropped_with_a_note(shared):
    with open_slide(shared / "slides/dicom_CMU-1-Small-Region") as slide:
        assert len(slide.levels) == 1
        assert "level 1 is not used: its colours differ" in slide.notes[0]


def test_dicom_folder_with_two_slides_is_refused(shared, tmp_path):
    for source in [
        *(shared / "slides/dicom_CMU-1-Small-Region").iterdir(),
        shared / "slides/camelyon_node_low_magnification.dcm",
    ]:
        (tmp_path / source.name).symlink_to(source)
    with pytest.raises(UnreadableSlideError, match="2 DICOM slides, wanted one"):
        open_slide(tmp_path, backends=["openslide"])


def test_levels_that_ome_tiff_keeps_below_the_finest_are_found(tmp_path):
    picture = tissue_picture()
    with tifffile.TiffWriter(tmp_path / "pyramid.ome.tif", ome=True) as file:
        options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg2000"}
        file.write(picture, subifds=1, **options)
        file.write(picture[::2, ::2], subfiletype=1, **options)
    with open_slide(tmp_path / "pyramid.ome.tif", backends=["tifffile"]) as slide:
        assert [level.size_px for level in slide.levels] == [(1536, 1280), (768, 640)]
        coarse = slide.read_region(top_left_px0=(512, 512), size_px=(64, 64), level=1)
    np.testing.assert_allclose(coarse.astype(int), picture[512:640:2, 512:640:2], atol=40)


def test_ome_tiff_with_coarser_levels_is_read_by_the_reader_that_sees_them(tmp_path):
    """cuCIM and OpenSlide see level 0 alone: no damage could be told by the coarser levels."""
    picture = tissue_picture()
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg"}
    for name, subifds in (("pyramid", 1), ("flat", 0)):
        with tifffile.TiffWriter(tmp_path / f"{name}.ome.tif", ome=True) as file:
            file.write(picture, subifds=subifds, **options)
            if subifds:
                coarser = picture.reshape(640, 2, 768, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
                file.write(coarser, subfiletype=1, **options)
    with open_slide(tmp_path / "pyramid.ome.tif") as slide:
        assert (slide.backend, len(slide.levels), slide.notes) == ("tifffile", 2, ())
    with open_slide(tmp_path / "flat.ome.tif") as slide:
        assert (slide.backend, len(slide.levels)) == ("cucim", 1)


@pytest.mark.parametrize(
    ("name", "start", "says"),
    [
        ("jpeg.svs", b"\xff\xd8\xff\xe0 and more", "it is a JPEG picture and no slide"),
        ("document.tif", b"%PDF-1.7", "it is a PDF document and no slide"),
        ("empty.ndpi", b"", "the file is empty"),
        ("index.mrxs", b"\xff\xd8\xff\xe0 and more", "not a readable slide"),  # Mirax: a JPEG beside its folder
    ],
)
def test_file_with_the_name_of_a_slide_is_refused_as_what_it_is(tmp_path, name, start, says):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(UnreadableSlideError, match=f"{name}: {says}"):
        open_slide(tmp_path / name)
