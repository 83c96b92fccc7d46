"""The report of a run: what it says first, what a hostile name does to it, what machines read back."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from pydantic import ValidationError

from s4mil_monai.batch.run_report import (
    ReportedSlide,
    RunReport,
    SlideFailure,
    relative_link,
    render_run,
    write_run_report,
)
from s4mil_monai.errors import OutputError

STARTED = datetime(2026, 11, 25, 4, 0, 1, tzinfo=timezone(timedelta(hours=1)))
PSEUDONYM = "1a2b3c4d5e6f"
HOSTILE = (
    "<script>alert(1)</script>.svs",
    '"><img src=x onerror=alert(1)>.svs',
    "{{ 7 * 7 }}.svs",
    "Präparat ß.tif",
    "caf\udce9.svs",
    "a\nb.svs",
    "b\u202egnp.svs",
    "x" * 250,
    "javascript:alert(1)",
    "50% #2?.svs",
)


def published(name, **facts):
    return ReportedSlide(
        **{"pseudonym": PSEUDONYM, "name": name, "outcome": "published", "status": "scored", **facts}
    )


def failed(name, outcome="failed", **facts):
    failure = SlideFailure(
        kind="UnreadableSlideError",
        reason=f"{name}: no reader can open it",
        attempt=1,
        attempts=3,
        next="tried again after 03:20 UTC",
    )
    return ReportedSlide(pseudonym=None, name=name, outcome=outcome, failure=failure, **facts)


def run_of(*slides, **facts):
    ended = STARTED + timedelta(minutes=41)
    return RunReport(run="r1", started=STARTED, ended=ended, version="0.9.0", slides=slides, **facts)


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, the text between them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, wanted):
        return [attributes for tag, attributes in self.tags if tag == wanted]


def test_what_failed_comes_first_then_what_needs_eyes_then_the_rest():
    report = run_of(
        published("negative.svs", decision="negative"),
        ReportedSlide(pseudonym=None, name="growing.svs", outcome="still_changing"),
        published("refer.svs", decision="refer"),
        published("blank.svs", status="no_tissue"),
        failed("tried.svs"),
        published("damaged.svs", status="degraded"),
        published("blurred.svs", status="rejected", decision="rejected"),
        published("less.svs", decision="positive", calibrated=0.8),
        published("more.svs", decision="positive", calibrated=0.9),
        ReportedSlide(pseudonym=PSEUDONYM, name="given_back.svs", outcome="handed_back"),
        failed("aside.svs", outcome="quarantined"),
    )
    html = render_run(report)
    assert [attributes["id"] for attributes in Page(html).all("section")] == ["failed", "look", "rest", "later"]
    assert re.findall(r"<h3><bdi>(.+?)\.svs", html) == [
        *("aside", "tried"),
        *("more", "less", "refer", "blurred", "blank", "damaged"),
        "negative",
        *("given_back", "growing"),
    ]


def test_a_failure_says_why_which_attempt_and_what_comes_next():
    text = " ".join(" ".join(Page(render_run(run_of(failed("a.svs")))).texts).split())
    assert "UnreadableSlideError : a.svs: no reader can open it" in text
    assert "Attempt 1 of 3 · tried again after 03:20 UTC" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text_and_its_links_lead_to_its_folder(name, tmp_path):
    folder, run = tmp_path / "results" / name.replace("/", "_"), tmp_path / "runs" / "r1"
    links = {
        "report": relative_link(folder / "report.html", run),
        "picture": relative_link(folder / "heatmap.png", run),
    }
    plain = Page(render_run(run_of(published("plain", **links))))
    page = Page(render_run(run_of(published(name, notes=(name,), **links), failed(name))))
    assert len(page.all("script")) == 0
    assert len(page.all("img")) == len(plain.all("img")) == 1
    assert all(set(attributes) == {"loading", "src", "alt"} for attributes in page.all("img"))
    [link] = page.all("a")
    assert unquote(link["href"], errors="surrogateescape") == f"../../results/{folder.name}/report.html"
    assert not any(letter in "".join(page.texts) for letter in "\u202e\udce9")


def test_the_page_needs_no_network_and_says_what_it_is_not():
    html = render_run(
        run_of(published("a.svs", picture="../a/heatmap.png", report="../a/report.html"), failed("b.svs"))
    )
    page = Page(html)
    targets = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert targets == ["../a/heatmap.png", "../a/report.html"]
    assert "url(" not in html
    assert "@import" not in html
    assert page.all("script") == page.all("link") == []
    assert "Research use; not cleared for diagnosis." in html


@pytest.mark.parametrize(
    "link", ["https://x/a.png", "//x/a.png", "/etc/passwd", "javascript:alert(1)", "data:text/html,x", "a b", ""]
)
def test_a_link_to_another_host_or_place_is_refused(link):
    with pytest.raises(ValidationError, match="report"):
        published("a.svs", report=link)


def test_thumbnails_load_late_and_have_a_description():
    [image] = Page(render_run(run_of(published("a.svs", picture="a/heatmap.png")))).all("img")
    assert image == {"loading": "lazy", "src": "a/heatmap.png", "alt": f"Heatmap of {PSEUDONYM}"}


def test_a_run_without_slides_says_so():
    assert "No slide was due." in render_run(run_of())


def test_machines_read_counts_and_times_in_utc_and_get_the_same_report_back(tmp_path):
    report = run_of(published("a.svs"), published("b.svs"), failed("caf\udce9.svs"), waiting=2, quarantined=5)
    write_run_report(report, tmp_path / "runs" / "r1")
    text = (tmp_path / "runs" / "r1" / "run.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["format"] == "s4mil.run/1"
    assert content["counts"] == {"failed": 1, "published": 2}
    assert content["started"] == "2026-11-25T03:00:01Z"
    assert RunReport.model_validate_json(text) == report
    assert sorted(path.name for path in (tmp_path / "runs" / "r1").iterdir()) == ["run.html", "run.json"]


def test_an_unknown_field_and_a_time_without_zone_are_refused():
    with pytest.raises(ValidationError, match="extra"):
        published("a.svs", patient="Mueller")
    with pytest.raises(ValidationError, match="timezone"):
        RunReport(run="r1", started=datetime(2026, 11, 25), ended=STARTED, version="0.9.0")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        write_run_report(run_of(), tmp_path / "runs")
