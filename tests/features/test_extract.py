"""One slide in, one bag out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from s4mil_monai.errors import UnreadableSlideError
from s4mil_monai.features.extract import extract_features, prepare_ahead, read_ahead, read_in_turns
from s4mil_monai.result import PatchSettings
from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.grid import lay_grid
from s4mil_monai.slides.reader import open_slide
from s4mil_monai.slides.resolution import plan_reading
from s4mil_monai.slides.tissue import find_tissue


@pytest.fixture(scope="module")
def bag(tissue_slide, lite0):
    with open_slide(tissue_slide) as slide:
        return extract_features(slide, lite0, PatchSettings(), batch_size=5)


def test_every_patch_of_the_grid_has_its_features_in_scan_order(bag, tissue_slide, lite0):
    assert bag.top_left_px0.tolist() == [[x, y] for y in (256, 512, 768) for x in (256, 512, 768, 1024)]
    assert bag.features.shape == (12, 1280)
    with open_slide(tissue_slide) as slide:
        region = slide.read_region(top_left_px0=(768, 512), size_px=(256, 256))
    patch = (torch.from_numpy(region).permute(2, 0, 1).float() - 127) / 128
    wanted = lite0.encode(patch.unsqueeze(0))[0].numpy()
    np.testing.assert_allclose(bag.features[6], wanted, atol=1e-4)


def test_origin_says_what_the_features_are(bag, tissue_slide, lite0):
    origin = bag.origin
    assert origin.slide == "tissue.tif"
    assert origin.slide_sha256 == fingerprint_slide(tissue_slide)
    assert (origin.slide_mpp, origin.slide_mpp_source) == (0.5, "tiff")
    assert (origin.encoder, origin.encoder_sha256) == ("efficientnet_lite0", lite0.fingerprint)
    assert (origin.patch_side_px, origin.patch_side_px0, origin.scan_order) == (256, 256.0, "row_major")


def test_dali_and_torch_give_the_same_features(tissue_slide, lite0):
    pytest.importorskip("nvidia.dali")
    features = []
    for stage in ("torch", "dali"):
        with open_slide(tissue_slide, assume_mpp=0.58) as slide:  # upsampled, so that resizing takes part
            features.append(extract_features(slide, lite0, PatchSettings(), patch_stage=stage).features)
    np.testing.assert_allclose(*features, atol=1e-3)


def test_progress_counts_up_to_all_patches(tissue_slide, lite0):
    seen = []
    with open_slide(tissue_slide) as slide:
        extract_features(
            slide, lite0, PatchSettings(), batch_size=5, progress=lambda done, total: seen.append((done, total))
        )
    assert seen == [(5, 12), (10, 12), (12, 12)]


@pytest.mark.parametrize("read", [read_ahead, read_in_turns])
def test_damaged_patch_in_the_middle_stops_the_slide_and_no_thread_hangs(tissue_slide, monkeypatch, read):
    with open_slide(tissue_slide) as slide:
        grid = lay_grid(find_tissue(slide), plan_reading(slide, mpp=0.5, patch_side_px=256))
        real = slide._read_inside

        def damaged(x, y, *rest):
            if y == 512:
                raise RuntimeError("Huffman table corrupt")
            return real(x, y, *rest)

        monkeypatch.setattr(slide, "_read_inside", damaged)
        with pytest.raises(UnreadableSlideError, match=r"tissue\.tif: .* at \(\d+, 512\) .*Huffman table corrupt"):
            list(read(slide, grid, batch_size=2))


def test_reading_ahead_and_in_turns_give_the_same_batches(tissue_slide):
    with open_slide(tissue_slide) as slide:
        grid = lay_grid(find_tissue(slide), plan_reading(slide, mpp=0.5, patch_side_px=256))
        both = zip(read_ahead(slide, grid, batch_size=5), read_in_turns(slide, grid, batch_size=5), strict=True)
        for ahead, in_turns in both:
            np.testing.assert_array_equal(ahead, in_turns)


def test_preparing_ahead_gives_the_same_batches_in_order():
    given = [torch.full((1,), float(i)) for i in range(7)]
    assert [batch.item() for batch in prepare_ahead(iter(given))] == list(range(7))


@pytest.mark.parametrize("read", [read_ahead, read_in_turns])
def test_reader_stays_a_bounded_number_of_batches_ahead(tissue_slide, read):
    with open_slide(tissue_slide) as slide:
        grid = lay_grid(find_tissue(slide), plan_reading(slide, mpp=0.5, patch_side_px=256))
        asked = []
        real = slide.read_region
        slide.read_region = lambda **where: asked.append(where) or real(**where)  # type: ignore[method-assign]
        batches = read(slide, grid, batch_size=1)
        next(batches)
        batches.close()
    assert len(asked) <= 5  # one given, four ahead


def test_renamed_copy_has_the_same_fingerprint_and_a_changed_byte_another(tissue_slide, tmp_path):
    data = bytearray(tissue_slide.read_bytes())
    (tmp_path / "copy.tif").write_bytes(data)
    data[-1] ^= 1
    (tmp_path / "changed.tif").write_bytes(data)
    assert fingerprint_slide(tmp_path / "copy.tif") == fingerprint_slide(tissue_slide)
    assert fingerprint_slide(tmp_path / "changed.tif") != fingerprint_slide(tissue_slide)
