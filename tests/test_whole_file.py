"""A file has its name when all of it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from s4mil_monai.whole_file import write_whole


@pytest.mark.parametrize("content", ["µm", "µm".encode(), lambda part: part.write_text("µm", encoding="utf-8")])
def test_text_bytes_and_what_a_function_writes_replace_the_file_and_make_its_folder(tmp_path, content):
    target = tmp_path / "new" / "kept"
    write_whole(target, "old")
    write_whole(target, content)
    assert target.read_text(encoding="utf-8") == "µm"
    assert list(target.parent.iterdir()) == [target]


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "kept"
    target.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
