"""report.html: one file that shows what the result says."""

from __future__ import annotations

import re

import pytest

from s4mil_monai.scoring import load_scorer, score_to_folder


@pytest.fixture(scope="module")
def scored(tissue_slide, bundle, tmp_path_factory):
    result, folder = score_to_folder(tissue_slide, load_scorer(bundle), tmp_path_factory.mktemp("report"))
    return result, (folder / "report.html").read_text(encoding="utf-8")


def test_report_needs_no_network(scored):
    _, html = scored
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]+", "", html)


def test_report_shows_score_resolution_shares_and_limits(scored):
    result, html = scored
    assert "Research use only. Not cleared for diagnosis." in html
    assert f"{max(result.probabilities):.3f}" in html
    assert "0.5 µm/px, from tiff" in html
    assert f"share {result.deciding_patches[0].contributions[result.classes.index(result.predicted)]:+.4f}" in html
    assert html.count("<figure") == min(12, len(result.deciding_patches))


def test_name_of_a_slide_cannot_smuggle_markup_into_the_report(tissue_slide, bundle, tmp_path):
    evil = tmp_path / "<img src=x onerror=alert(1)>.tif"
    evil.write_bytes(tissue_slide.read_bytes())
    _, folder = score_to_folder(evil, load_scorer(bundle), tmp_path / "out")
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in html
    assert "&lt;img src=x" in html


def test_report_without_a_score_says_why(white_slide, bundle, tmp_path):
    _, folder = score_to_folder(white_slide, load_scorer(bundle), tmp_path)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "No score" in html
    assert "no tissue found" in html
    assert "<script>" not in html
