"""Which slides a path stands for, and what their outputs are called."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from s4mil_monai.errors import UnreadableSlideError
from s4mil_monai.slides.folder import NoSlidesError, find_slides, name_outputs
from s4mil_monai.slides.reader import open_slide


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path) -> list[str]:
    return [str(slide.relative_to(folder)) for slide in find_slides(folder)]


def test_slides_are_found_below_a_folder_and_other_files_are_not(tmp_path):
    touch(
        tmp_path, "b.svs", "a.NDPI", "list.csv", ".hidden.svs", "2026/11/c.tiff", "2026/note.txt", ".trash/d.svs"
    )
    assert found(tmp_path) == ["2026/11/c.tiff", "a.NDPI", "b.svs"]


def test_mirax_data_folder_is_part_of_its_slide(tmp_path):
    touch(tmp_path, "m.mrxs", "m/Slidedat.ini", "m/Data0000.dat")
    assert found(tmp_path) == ["m.mrxs"]


def test_folder_of_dicom_instances_is_one_slide(tmp_path):
    touch(tmp_path, "first/1.dcm", "first/2.dcm", "second/1.dcm", "other.svs")
    assert found(tmp_path) == ["first", "other.svs", "second"]
    assert find_slides(tmp_path / "first") == [tmp_path / "first"]


def test_dicom_beside_other_slides_is_a_slide_of_its_own(tmp_path):
    touch(tmp_path, "one.dcm", "two.svs")
    assert found(tmp_path) == ["one.dcm", "two.svs"]


def test_a_file_is_taken_whatever_its_name(tmp_path):
    touch(tmp_path, "slide.unknown")
    assert find_slides(tmp_path / "slide.unknown") == [tmp_path / "slide.unknown"]


def test_folder_that_links_to_itself_is_read_once(tmp_path):
    touch(tmp_path, "a.svs")
    (tmp_path / "again").symlink_to(tmp_path)
    assert found(tmp_path) == ["a.svs"]


@pytest.mark.parametrize("name", ["", "gone"])
def test_no_slides_is_an_error_that_names_the_folder(tmp_path, name):
    with pytest.raises(NoSlidesError, match=str(tmp_path / name)):
        find_slides(tmp_path / name)


def test_outputs_keep_folders_and_tell_slides_of_one_stem_apart(tmp_path):
    touch(tmp_path, "x.svs", "x.tif", "y.svs", "2026/x.svs", "d/1.dcm")
    names = name_outputs(find_slides(tmp_path), tmp_path)
    assert {str(name) for name in names.values()} == {"x.svs", "x.tif", "y", "2026/x", "d"}


@contextmanager
def without_rights() -> Iterator[None]:
    """As somebody whom file modes stop; they do not stop root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_folder_that_cannot_be_looked_into_is_a_slide_that_fails_and_not_one_that_is_missed():
    with TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        touch(folder, "a.svs", "closed/b.svs")
        folder.chmod(0o755)
        (folder / "closed").chmod(0)
        try:
            with without_rights():
                assert found(folder) == ["a.svs", "closed"]
                with pytest.raises(UnreadableSlideError, match=r"closed: .*Permission denied"):
                    open_slide(folder / "closed")
                with pytest.raises(NoSlidesError, match=r"closed: cannot be read \(Permission denied\)"):
                    find_slides(folder / "closed")
        finally:
            (folder / "closed").chmod(0o755)
