"""report.html: one file that shows what the result says."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from s4mil_monai.outputs.heatmap import HeatmapPicture
from s4mil_monai.outputs.report import PATCH_SIDE_PX, write_report
from s4mil_monai.result import DecidingPatch
from s4mil_monai.scoring import load_scorer, score_to_folder
from s4mil_monai.slides.reader import open_slide
from tests.outputs.results import make_result


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


def test_each_deciding_patch_is_shown_as_it_is_on_the_slide_at_its_place_with_its_probability(
    tissue_slide, tmp_path
):
    """The page is taken apart: pictures, rectangles and texts of patches that differ in all of them."""
    patches = [(8, (512, 256), 0.10), (15, (768, 512), 0.72), (9, (768, 256), 0.66)]
    with open_slide(tissue_slide) as slide:
        result = make_result(
            slide,
            deciding_patches=[
                DecidingPatch(index=index, top_left_px0=corner, contributions=[0.0, 0.5])
                for index, corner, _ in patches
            ],
        )
        small = np.zeros((250, 384, 3), np.uint8)  # 1536 x 1280 pixels: one is 4 wide and 5.12 high
        picture = HeatmapPicture(small, np.zeros((250, 384, 4), np.uint8), (4.0, 5.12))
        write_report(result, slide, picture, tmp_path / "report.html")
        pixels = slide.read_region(top_left_px0=(0, 0), size_px=slide.size_px0)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    marks = re.findall(r'<rect id="mark(\d)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', html)
    figures = re.findall(
        r'<figure data-mark="mark(\d)">\s*<img src="data:image/jpeg;base64,([^"]+)".*?'
        r"p\(tumour\) alone ([\d.]+)<br>x (\d+), y (\d+)<",
        html,
        re.DOTALL,
    )
    assert len(marks) == len(figures) == 3
    for rank, (mark, figure, (_, (x, y), probability)) in enumerate(
        zip(marks, figures, patches, strict=True), start=1
    ):
        place = [x / 4, y / 5.12, 256 / 4, 256 / 5.12]
        assert [float(number) for number in mark] == pytest.approx([rank, *place], abs=0.006)
        assert (figure[0], *figure[2:]) == (str(rank), f"{probability:.3f}", str(x), str(y))
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(figure[1])))).astype(int)
        patch = Image.fromarray(pixels[y : y + 256, x : x + 256])
        wanted = np.asarray(patch.resize((PATCH_SIDE_PX, PATCH_SIDE_PX), Image.Resampling.LANCZOS))
        # another place of this noise differs by 13 grey levels on average, JPEG by 3
        assert np.abs(shown - wanted).mean() < 5


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
