"""Multipart bodies, in pieces of any length."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4mil_monai.pacs.dimse import parse_target
from s4mil_monai.pacs.multipart import MultipartFile, NotMultipartError, boundary_of, copy_first_part


def pieces_of(body, length):
    return [body[at : at + length] for at in range(0, len(body), length)]


@given(content=st.binary(max_size=300), length=st.integers(1, 400))
def test_what_is_sent_in_any_pieces_is_what_arrives(content, length, tmp_path_factory):
    path = tmp_path_factory.mktemp("m") / "x.dcm"
    path.write_bytes(content)
    sent = MultipartFile(path)
    body = b"".join(sent)
    assert len(body) == len(sent)
    received = io.BytesIO()
    copy_first_part(pieces_of(body, length), boundary_of(sent.content_type), received)
    assert received.getvalue() == content


def test_content_that_looks_like_a_boundary_is_content():
    body = b"--b\r\nA: c\r\n\r\none\r\n-- b\r\n--\r\ntwo\r\n--b--\r\n"
    received = io.BytesIO()
    copy_first_part([body], "b", received)
    assert received.getvalue() == b"one\r\n-- b\r\n--\r\ntwo"


@pytest.mark.parametrize("body", [b"", b"--b\r\nA: c\r\n\r\ncontent without an end", b"x" * (1 << 17)])
def test_body_that_is_cut_short_is_refused(body):
    with pytest.raises(NotMultipartError, match="is cut short, or is not multipart"):
        copy_first_part(pieces_of(body, 1000), "b", io.BytesIO())


@pytest.mark.parametrize("content_type", ["application/json", "multipart/related", ""])
def test_answer_of_another_type_is_refused(content_type):
    with pytest.raises(NotMultipartError):
        boundary_of(content_type)


@pytest.mark.parametrize("text", ["pacs:104", "A@host", "A@host:0", "A@host:99999", "TOOLONGFORANAETITLE@h:1"])
def test_target_written_otherwise_is_refused(text):
    with pytest.raises(ValueError, match="AET@host:port is wanted"):
        parse_target(text, own_aet="S4MIL", timeout_s=1)
