"""One slide in, one bag out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from s4mil_monai.errors import DecoderHungError, UnreadableSlideError
from s4mil_monai.features import patch_stream
from s4mil_monai.features.encoder import load_encoder
from s4mil_monai.features.extract import extract_features
from s4mil_monai.features.prepare import prepare_slide
from s4mil_monai.result import PatchSettings
from s4mil_monai.slides.fingerprint import fingerprint_slide
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.slides.reader import open_slide
from tests.conftest import tissue_picture


@pytest.fixture(scope="module")
def bag(tissue_slide, lite0):
    with open_slide(tissue_slide) as slide:
        return extract_features(prepare_slide(slide, PatchSettings()), lite0, batch_size=5).bag


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
            found = extract_features(prepare_slide(slide, PatchSettings()), lite0, patch_stage=stage)
            features.append(found.bag.features)
    np.testing.assert_allclose(*features, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["torch", "dali"])
def test_reading_ahead_of_a_gpu_gives_the_features_of_the_cpu(tissue_slide, bag, stage):
    with open_slide(tissue_slide) as slide:
        encoder = load_encoder("efficientnet_lite0", device="cuda")
        found = extract_features(prepare_slide(slide, PatchSettings()), encoder, patch_stage=stage, batch_size=5)
    np.testing.assert_allclose(found.bag.features, bag.features, atol=1e-2)
    assert found.bag.top_left_px0.tolist() == bag.top_left_px0.tolist()


def test_progress_counts_up_to_all_patches(tissue_slide, lite0):
    seen = []
    with open_slide(tissue_slide) as slide:
        prepared = prepare_slide(slide, PatchSettings())
        extract_features(prepared, lite0, batch_size=5, progress=lambda *counts: seen.append(counts))
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_damaged_patches_are_left_out_and_said(many_patches, lite0, monkeypatch):
    with open_slide(many_patches) as slide:
        prepared = prepare_slide(slide, PatchSettings(side_px=64))
        damage_reads(slide, monkeypatch, lambda x, y: (x, y) == (512, 512))
        found = extract_features(prepared, lite0)
    assert len(found.bag) == len(prepared.grid) - 1 == found.bag.top_left_px0.shape[0]
    assert [512, 512] in prepared.grid.top_left_px0.tolist()
    assert [512, 512] not in found.bag.top_left_px0.tolist()
    assert (found.bag.origin.damaged_patches, found.bag.origin.quality) == (1, "warn")
    (finding,) = [finding for finding in found.quality.findings if finding.code == "damaged"]
    assert finding.text.startswith(f"1 of {len(prepared.grid)} patches were left out")


def test_too_many_damaged_patches_refuse_the_slide(many_patches, lite0, monkeypatch):
    with open_slide(many_patches) as slide:
        prepared = prepare_slide(slide, PatchSettings(side_px=64))
        damage_reads(slide, monkeypatch, lambda x, y: y == 512)
        with pytest.raises(UnreadableSlideError, match=r"\d+ of 192 patches are damaged, at most 5%"):
            extract_features(prepared, lite0)


def test_a_patch_of_other_colours_than_the_overview_is_left_out(many_patches, lite0, monkeypatch):
    """As a JPEG tile that lost its bits: it decodes, to something else."""
    with open_slide(many_patches) as slide:
        prepared = prepare_slide(slide, PatchSettings(side_px=64))
        real = slide.read_inside

        def greyed(x, y, width, height, level):
            region = np.array(real(x, y, width, height, level))
            if level.number == 0 and y == 512 and x <= 512 < x + width:
                region[:, 512 - x + 32 : 512 - x + 64] = 128
            return region

        monkeypatch.setattr(slide, "read_inside", greyed)
        found = extract_features(prepared, lite0)
    assert found.bag.origin.damaged_patches == 1
    assert [512, 512] not in found.bag.top_left_px0.tolist()


def test_a_decoder_that_hung_is_not_asked_again(many_patches, lite0, monkeypatch):
    asked = []
    monkeypatch.setattr(patch_stream, "READERS", 2)  # whatever machine this is
    monkeypatch.setattr(patch_stream, "BATCHES_AHEAD", 4)
    with open_slide(many_patches) as slide:
        prepared = prepare_slide(slide, PatchSettings(side_px=64))

        def hang(x, y, *rest):
            asked.append((x, y))
            raise DecoderHungError(slide.name, "did not come back")

        monkeypatch.setattr(slide, "read_inside", hang)
        with pytest.raises(DecoderHungError):
            extract_features(prepared, lite0)
    assert len(asked) <= 4  # of 12 batches, once each


@pytest.fixture(scope="module")
def many_patches(tissue_slide, tmp_path_factory) -> Path:
    """192 patches of 64 px: the overview is read from a level that the patches are not."""
    return write_pyramid(
        tissue_picture(), tmp_path_factory.mktemp("many") / "many.tif", mpp=0.5, levels=4, shrink=2.0
    )


def damage_reads(slide, monkeypatch, is_damaged):
    """As a file does whose tiles cannot be decoded: every read of level 0 that touches a damaged patch fails."""
    real = slide.read_inside

    def damaged(x, y, width, height, level):
        corners = [(left, y) for left in range(x, x + width, 64)]
        if level.number == 0 and any(is_damaged(*corner) for corner in corners):
            raise RuntimeError("Huffman table corrupt")
        return real(x, y, width, height, level)

    monkeypatch.setattr(slide, "read_inside", damaged)


def test_renamed_copy_has_the_same_fingerprint_and_a_changed_byte_another(tissue_slide, tmp_path):
    data = bytearray(tissue_slide.read_bytes())
    (tmp_path / "copy.tif").write_bytes(data)
    data[-1] ^= 1
    (tmp_path / "changed.tif").write_bytes(data)
    assert fingerprint_slide(tmp_path / "copy.tif") == fingerprint_slide(tissue_slide)
    assert fingerprint_slide(tmp_path / "changed.tif") != fingerprint_slide(tissue_slide)
