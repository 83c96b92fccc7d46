"""Reading processes that crash, hang or want too much memory, made to do so for real."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from s4mil_monai.errors import UnknownNameError, UnknownResolutionError, UnreadableSlideError
from s4mil_monai.slides.isolation import Reader, ReaderGone, ReaderHung, ReaderPool, open_isolated
from s4mil_monai.slides.limits import DEFAULT_LIMITS
from s4mil_monai.slides.patches import read_patches
from s4mil_monai.slides.reader import open_slide
from tests.conftest import tissue_picture


@pytest.fixture(scope="module")
def pool() -> Iterator[ReaderPool]:
    pool = ReaderPool(2)
    yield pool
    pool.close()


def signal_all(pool: ReaderPool, number: int) -> None:
    for reader in pool._readers:
        if reader._process is not None:
            os.kill(reader._process.pid, number)


def test_pixels_levels_and_resolution_are_those_of_reading_here(tissue_slide, pool):
    corners = [(x, y) for y in (0, 256, 1100) for x in (0, 256, 512, 1400)]
    with open_isolated(tissue_slide, pool=pool) as isolated, open_slide(tissue_slide) as here:
        assert isolated.levels == here.levels
        assert isolated.resolution == here.resolution
        assert isolated.backend == here.backend
        np.testing.assert_array_equal(
            read_patches(isolated, corners, side_px=256, level=0),
            read_patches(here, corners, side_px=256, level=0),
        )


def test_a_reader_that_crashes_costs_one_read_and_is_replaced(tissue_slide):
    pool = ReaderPool(1)
    try:
        with open_isolated(tissue_slide, pool=pool) as slide:
            before = slide.read_region(top_left_px0=(300, 300), size_px=(64, 64))
            signal_all(pool, signal.SIGSEGV)
            with pytest.raises(UnreadableSlideError, match=r"tissue\.tif: cucim cannot decode .*crashed: SIGSEGV"):
                slide.read_region(top_left_px0=(300, 300), size_px=(64, 64))
            after = slide.read_region(top_left_px0=(300, 300), size_px=(64, 64))
            np.testing.assert_array_equal(before, after)
    finally:
        pool.close()


def test_a_reader_that_hangs_is_ended_at_its_limit(tissue_slide):
    pool = ReaderPool(1, replace(DEFAULT_LIMITS, reading_s=0.2))
    try:
        with open_isolated(tissue_slide, pool=pool) as slide:
            signal_all(pool, signal.SIGSTOP)
            with pytest.raises(UnreadableSlideError, match=r"did not come back within 0.2 s"):
                slide.read_region(top_left_px0=(300, 300), size_px=(64, 64))
            pool.limits = DEFAULT_LIMITS
            assert slide.read_region(top_left_px0=(300, 300), size_px=(64, 64)).shape == (64, 64, 3)
    finally:
        pool.close()


def test_opening_that_hangs_is_ended_at_its_limit(tissue_slide):
    pool = ReaderPool(1, replace(DEFAULT_LIMITS, opening_s=0.2))
    try:
        pool.ask({"do": "backends", "path": str(tissue_slide)}, limit_s=60)
        signal_all(pool, signal.SIGSTOP)
        with pytest.raises(UnreadableSlideError, match=r"header cannot be read \(did not come back within 0.2"):
            open_isolated(tissue_slide, pool=pool)
    finally:
        pool.close()


def test_a_named_pipe_instead_of_a_slide_is_refused_at_once(tmp_path, pool):
    os.mkfifo(tmp_path / "pipe.svs")
    with pytest.raises(UnreadableSlideError, match=r"pipe\.svs: neither a file nor a folder"):
        open_isolated(tmp_path / "pipe.svs", pool=pool)


def test_a_reader_that_does_not_start_is_told_from_one_that_hangs():
    reader = Reader(replace(DEFAULT_LIMITS, starting_s=0.001))  # no Python starts so fast
    try:
        with pytest.raises(ReaderHung, match=r"did not start within 0\.001 s"):
            reader.ask({"do": "forget"}, limit_s=60)
    finally:
        reader.end()


def test_a_tile_that_wants_too_much_memory_fails_alone(tmp_path):
    """A bomb: 177 MB of zeros in 170 kB, in a tile within the limits, in a process that may have less."""
    path = tmp_path / "bomb.tif"
    zeros = np.zeros((7680, 7680, 3), np.uint8)
    tifffile.imwrite(path, zeros, tile=(7680, 7680), compression="zlib", photometric="rgb")
    reader = Reader(replace(DEFAULT_LIMITS, max_memory_bytes=300 << 20))
    request = {
        "path": str(path),
        "backend": "tifffile",
        "level": [[7680, 7680], 1.0, 0],
        "region": [0, 0, 4000, 4000],
    }
    try:
        assert "memory" in outcome(reader, {"do": "read", **request})
    finally:
        reader.end()


def outcome(reader: Reader, request: dict) -> str:
    """What a reader says, or how it died."""
    try:
        return reader.ask(request, limit_s=120)["failed"].lower()
    except ReaderGone as gone:
        return f"out of memory: {gone}"


def test_a_slide_that_is_closed_lets_go_of_its_file(tissue_slide, pool):
    with open_isolated(tissue_slide, pool=pool) as slide:
        slide.read_region(top_left_px0=(0, 0), size_px=(64, 64))
        assert holders(pool, tissue_slide)
    assert not holders(pool, tissue_slide)


def test_a_slide_that_is_refused_lets_go_of_its_file(tmp_path, pool):
    path = tmp_path / "oblong.tif"
    tags = {"resolution": (20_000, 10_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, tissue_picture(), tile=(256, 256), photometric="rgb", **tags)
    with pytest.raises(UnreadableSlideError, match="pixels are not square"):
        open_isolated(path, pool=pool)
    assert not holders(pool, path)


def holders(pool: ReaderPool, path: Path) -> list[int]:
    pids = [reader._process.pid for reader in pool._readers if reader._process is not None]
    return [
        pid for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists() and link.samefile(path)
    ]


def test_readers_end_with_the_pool(tissue_slide):
    pool = ReaderPool(2)
    pool.warm_up()
    pids = [reader._process.pid for reader in pool._readers if reader._process is not None]
    assert len(pids) == 2
    pool.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_errors_of_the_other_process_are_those_of_reading_here(tmp_path, tissue_slide, pool):
    (tmp_path / "text.svs").write_text("not a slide")
    with pytest.raises(UnreadableSlideError, match=r"text\.svs: not a readable slide") as error:
        open_isolated(tmp_path / "text.svs", pool=pool)
    with pytest.raises(UnreadableSlideError) as here:
        open_slide(tmp_path / "text.svs")
    assert str(error.value) == str(here.value)
    with pytest.raises(UnreadableSlideError, match="there is no such file"):
        open_isolated(tmp_path / "none.svs", pool=pool)
    with pytest.raises(UnknownNameError, match="known: cucim"):
        open_isolated(tissue_slide, backends=["vips"], pool=pool)


def test_unknown_resolution_is_refused_when_it_is_asked_for(tmp_path, pool):
    tifffile.imwrite(tmp_path / "plain.tif", tissue_picture(), tile=(256, 256), photometric="rgb")
    with (
        open_isolated(tmp_path / "plain.tif", pool=pool) as slide,
        pytest.raises(UnknownResolutionError, match="assume_mpp"),
    ):
        _ = slide.mpp
    with open_isolated(tmp_path / "plain.tif", assume_mpp=0.25, pool=pool) as slide:
        assert slide.mpp == 0.25
        assert slide.resolution is not None
        assert slide.resolution.source == "override"


def test_a_read_larger_than_the_shared_memory_is_refused(tissue_slide):
    pool = ReaderPool(1, replace(DEFAULT_LIMITS, max_read_bytes=256 * 256 * 3))
    try:
        with open_isolated(tissue_slide, pool=pool) as slide:
            assert slide.read_region(top_left_px0=(0, 0), size_px=(256, 256)).shape == (256, 256, 3)
            with pytest.raises(UnreadableSlideError, match="at most 196,608"):
                slide.read_region(top_left_px0=(0, 0), size_px=(257, 256))
    finally:
        pool.close()
