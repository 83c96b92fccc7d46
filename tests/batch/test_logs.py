"""Logs of a batch: each line is text and JSON, one line whatever happens, and without the names of patients."""

from __future__ import annotations

import json
import logging
import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4mil_monai.batch.logs import TEXT_LIMIT, LineFormatter, going_by, names_to_hide, set_up_logs
from s4mil_monai.errors import OutputError

logger = logging.getLogger("s4mil_monai.batch.tested")


@pytest.fixture(autouse=True)
def _logs_as_before():
    """Set up as in a batch run, and put back what pytest has."""
    root, ours = logging.getLogger(), logging.getLogger("s4mil_monai")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    root.handlers = []  # set_up_logs closes those it replaces, pytest's too
    yield
    logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def lines_of(capsys) -> list[tuple[str, dict]]:
    """Text and fields of each line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    return [(text, json.loads("{" + fields)) for text, _, fields in (line.partition("{") for line in lines)]


def test_a_line_has_time_level_text_and_fields(capsys):
    set_up_logs()
    facts = {"event": "scored", "slide": "1a2b3c4d5e6f", "seconds": 12.1}
    logger.info("scored %s in %.1f s", "1a2b3c4d5e6f", 12.1, extra=facts)
    [(text, fields)] = lines_of(capsys)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO scored 1a2b3c4d5e6f in 12\.1 s ", text)
    assert fields == facts


def test_the_time_is_utc_wherever_the_machine_is(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    record = logging.makeLogRecord({"msg": "x", "created": 0.0, "levelname": "INFO", "name": "s4mil_monai"})
    assert LineFormatter().format(record) == "1970-01-01T00:00:00Z INFO x {}"


@given(text=st.text(), value=st.text())
def test_every_line_splits_into_text_and_json(text, value):
    record = logging.makeLogRecord({"msg": text, "name": "s4mil_monai.batch", "slide": value})
    line = LineFormatter().format(record)
    assert line.isprintable()
    fields = json.loads("{" + line.partition("{")[2])
    assert fields == {"slide": value}


@pytest.mark.parametrize(
    "name",
    [
        "a\n2026-11-25T03:00:01Z INFO scored",
        "a\r\nb",
        "a\u2028b",
        "a\x1b[2Jb",
        "a\u202egnp.exe",
        "a\udce4b",
        'a {"event":"x"}',
    ],
)
def test_a_hostile_name_stays_on_its_line_and_invents_no_field(capsys, name):
    set_up_logs()
    logger.warning("%s is no slide", name, extra={"event": "skipped"})
    [(text, fields)] = lines_of(capsys)
    assert fields == {"event": "skipped"}
    assert text.endswith(" is no slide ")


def test_a_field_outside_the_list_is_not_written(capsys):
    set_up_logs()
    logger.info("found", extra={"path": "/slides/Mueller_Hans.svs", "patient": "Mueller", "waiting": 1})
    [(text, fields)] = lines_of(capsys)
    assert fields == {"waiting": 1}
    assert "Mueller" not in text


def test_of_a_field_that_is_neither_text_nor_number_only_the_kind_is_written(capsys, tmp_path):
    set_up_logs()
    logger.info("found", extra={"slide": tmp_path / "Mueller.svs", "seconds": float("nan"), "waiting": True})
    [(_, fields)] = lines_of(capsys)
    assert fields == {"slide": "PosixPath", "seconds": None, "waiting": True}


def test_an_exception_is_one_line_with_kind_and_place(capsys):
    set_up_logs()
    try:
        raise OutputError("results", "cannot be written\nat all")
    except OutputError:
        logger.exception("stopped")
    [(text, _)] = lines_of(capsys)
    assert re.search(
        r"ERROR stopped: OutputError: results: cannot be written\\nat all \(test_logs\.py:\d+\) $", text
    )


def test_the_path_that_an_operating_system_error_carries_is_not_written(capsys, tmp_path):
    set_up_logs()
    try:
        (tmp_path / "Mueller_Hans.svs").open()
    except OSError:
        logger.exception("stopped")
    [(text, _)] = lines_of(capsys)
    assert "Mueller" not in text
    assert "FileNotFoundError: No such file or directory" in text


def test_a_slide_goes_by_its_pseudonym_while_it_is_worked_on(capsys):
    set_up_logs()
    facts = {"error": "Müller, Hans.svs: damaged"}
    with going_by("1a2b3c4d5e6f", "Müller, Hans.svs", "Müller 1950"):
        logger.warning("Müller, Hans.svs is read by tifffile", extra=facts)
        logger.warning("out/.part_Müller, Hans_7/result.json is of Müller 1950")
    logger.warning("Müller, Hans.svs again")
    (first, fields), (second, _), (third, _) = lines_of(capsys)
    assert first.endswith(" 1a2b3c4d5e6f is read by tifffile ")
    assert fields == {"error": "1a2b3c4d5e6f: damaged"}
    assert second.endswith(" out/.part_1a2b3c4d5e6f_7/result.json is of 1a2b3c4d5e6f ")
    assert third.endswith(" Müller, Hans.svs again ")


def test_two_slides_of_one_name_at_a_time_leave_nothing_behind(capsys):
    set_up_logs()
    with going_by("aaaaaaaaaaaa", "scan.svs"):
        with going_by("bbbbbbbbbbbb", "scan.svs"):
            pass
        logger.warning("scan.svs")
    logger.warning("scan.svs")
    (first, _), (second, _) = lines_of(capsys)
    assert first.endswith(" aaaaaaaaaaaa ")
    assert second.endswith(" scan.svs ")


def test_a_short_name_is_not_hunted_through_every_text_nor_any_within_a_word(capsys):
    set_up_logs()
    with going_by("1a2b3c4d5e6f", "3.svs", "scan"):
        logger.info("3.svs: attempt 1 of 3, by the scanner")
    [(text, _)] = lines_of(capsys)
    assert text.endswith(" 1a2b3c4d5e6f: attempt 1 of 3, by the scanner ")


def test_other_libraries_speak_from_warning_on_and_say_who_they_are(capsys):
    set_up_logs("DEBUG")
    logging.getLogger("a_library").info("reading")
    logging.getLogger("a_library").warning("corrupted\ntag")
    logger.debug("ours")
    (first, _), (second, _) = lines_of(capsys)
    assert first.endswith(r" WARNING a_library: corrupted\ntag ")
    assert second.endswith(" DEBUG ours ")


def test_warnings_of_python_are_lines_too(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        set_up_logs()
        warnings.warn("an old call", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    [(text, _)] = lines_of(capsys)
    assert "WARNING py.warnings: " in text
    assert "DeprecationWarning: an old call" in text


def test_a_message_whose_values_do_not_fit_is_written_as_it_is(capsys):
    set_up_logs()
    logger.info("100 %d of tissue in %.1f s", 3.0)
    [(text, _)] = lines_of(capsys)
    assert text.endswith(" INFO 100 %d of tissue in %.1f s ")


def test_a_very_long_text_is_cut(capsys):
    set_up_logs()
    logger.info("x" * 5000)
    [(text, _)] = lines_of(capsys)
    assert len(text.split(" INFO ")[1].strip()) == TEXT_LIMIT


def test_setting_up_twice_writes_each_line_once(capsys):
    set_up_logs()
    set_up_logs()
    logger.info("once")
    assert len(lines_of(capsys)) == 1


def test_neither_folders_nor_what_results_are_called_give_a_patient_away(capsys):
    set_up_logs()
    with going_by("1a2b3c4d5e6f", *names_to_hide("Mueller Hans/Mueller, Hans 1961.svs")):
        logger.error("/slides/Mueller Hans/Mueller, Hans 1961.svs and results/Mueller__Hans_1961-1a2b are bad")
    [(text, _)] = lines_of(capsys)
    assert "ueller" not in text
