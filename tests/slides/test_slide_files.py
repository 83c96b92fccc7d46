"""Which files a slide has, and that all of them, and no others, are in its fingerprint."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.slide_files import files_of, take_snapshot

VMS = """[Virtual Microscope Specimen]
NoJpegColumns=2
NoJpegRows=1
ImageFile={stem}.jpg
ImageFile(1,0) = {stem}(1,0).jpg
MapFile={stem}_map2.jpg
OptimisationFile={stem}.opt
MacroImage={stem}_macro.jpg
PhysicalWidth=1000
"""
"""As OpenSlide documents it."""

PARTS = ("{stem}.jpg", "{stem}(1,0).jpg", "{stem}_map2.jpg", "{stem}.opt", "{stem}_macro.jpg")


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"pixels of {name}")


def put_vms(folder: Path, stem: str, suffix: str = ".vms") -> Path:
    put(folder, *(part.format(stem=stem) for part in PARTS))
    (folder / f"{stem}{suffix}").write_text(VMS.format(stem=stem))
    return folder / f"{stem}{suffix}"


def names(path: Path) -> list[str]:
    return sorted(file.relative_to(path.parent).as_posix() for file in files_of(path))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("stem", ["S", "S[1]", "S*", "S?", "S24.1", "Müller 1 - 2010-01-12 13.24.05"])
def test_data_of_an_mrxs_file_are_in_the_folder_called_as_it_is(tmp_path, stem):
    put(tmp_path, f"{stem}.mrxs", f"{stem}/Slidedat.ini", f"{stem}/deeper/Data0000.dat")
    put(tmp_path, "S1/Data0000.dat", "S10/Data0000.dat", f"{stem}0/Data0000.dat")  # of others
    slide = tmp_path / f"{stem}.mrxs"
    assert names(slide) == sorted([f"{stem}.mrxs", f"{stem}/Slidedat.ini", f"{stem}/deeper/Data0000.dat"])
    before = fingerprint_slide(slide)
    put(tmp_path, f"{stem}/Data0001.dat")
    assert fingerprint_slide(slide) != before


@pytest.mark.parametrize("suffix", [".vms", ".vmu", ".VMS"])
@pytest.mark.parametrize("stem", ["1", "S[1]", "Müller 1 - 2010-01-12 13.24.05"])
def test_a_vms_file_has_the_files_it_names_and_none_of_its_neighbours(tmp_path, stem, suffix):
    slide = put_vms(tmp_path, stem, suffix)
    put_vms(tmp_path, f"{stem}0")
    put(tmp_path, f"{stem}0-1.jpg", f"{stem}-1.jpg", f"{stem}.txt", "S1.jpg")
    assert names(slide) == sorted([slide.name, *(part.format(stem=stem) for part in PARTS)])


@pytest.mark.parametrize("content", [b"", b"\xff\x00=\x00\n=", b"=.\n=..\n=/\n", b"ImageFile=gone.jpg"])
def test_a_vms_file_that_names_nothing_that_is_there_is_alone(tmp_path, content):
    (tmp_path / "1.vms").write_bytes(content)
    put(tmp_path, "1.jpg")
    assert names(tmp_path / "1.vms") == ["1.vms"]


def test_scanner_that_goes_on_writing_changes_what_the_slide_looks_like(tmp_path):
    slide = put_vms(tmp_path, "1")
    (tmp_path / "1(1,0).jpg").unlink()
    before = take_snapshot(slide)
    put(tmp_path, "1(1,0).jpg")
    assert take_snapshot(slide) != before


def test_fingerprints_of_ordinary_slides_are_those_of_earlier_versions(tmp_path):
    """By hand: of a file its SHA-256, of several that of their sorted ones. Results and ledgers have them."""
    put(tmp_path, "a.svs", "a.txt", "m.mrxs", "m/Slidedat.ini", "m/Data0000.dat", "d/1.dcm", "d/2.dcm")
    vms = put_vms(tmp_path, "v")
    assert fingerprint_slide(tmp_path / "a.svs") == sha256("pixels of a.svs")
    for path, texts in (
        (tmp_path / "m.mrxs", [f"pixels of {name}" for name in ("m.mrxs", "m/Slidedat.ini", "m/Data0000.dat")]),
        (tmp_path / "d", ["pixels of d/1.dcm", "pixels of d/2.dcm"]),
        (vms, [VMS.format(stem="v"), *(f"pixels of {part.format(stem='v')}" for part in PARTS)]),
    ):
        assert fingerprint_slide(path) == sha256("\n".join(sorted(map(sha256, texts))))


def test_slide_that_is_gone_cannot_be_looked_at(tmp_path):
    for name in ("a.svs", "a.vms", "a.mrxs"):
        with pytest.raises(FileNotFoundError):
            take_snapshot(tmp_path / name)


def test_pipe_for_a_vms_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.vms")
    with pytest.raises(OSError, match="is a pipe or a device"):
        take_snapshot(tmp_path / "a.vms")
