"""Exported models that are kept: found again, mended, and done without."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from s4mil_monai.features.encoder_cache import cache_folder, exported_model


class Pool(nn.Module):
    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return patches.mean(dim=(2, 3))


class Never(nn.Module):
    """Cannot be exported."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        raise AssertionError("was exported")


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[str, bytes]:
    """Name and content of a kept model."""
    folder = tmp_path_factory.mktemp("kept")
    with export(Pool(), folder):
        (path,) = folder.iterdir()
    return path.name, path.read_bytes()


def export(network: nn.Module, folder: Path, *, fingerprint: str = "f" * 64):
    return exported_model(network.eval(), name="pool", fingerprint=fingerprint, patch_side_px=32, folder=folder)


@pytest.fixture
def folder(filled, tmp_path):
    name, content = filled
    (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_kept_model_is_not_exported_again(filled, folder):
    with export(Never(), folder) as path:
        assert path == folder / filled[0]
        onnx.checker.check_model(onnx.load(path))


def test_a_damaged_model_is_exported_again_and_mended(filled, folder):
    name, content = filled
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(flipped))
    with export(Pool(), folder) as path:
        onnx.checker.check_model(onnx.load(path))
    (kept,) = folder.iterdir()
    assert bytes(flipped) != kept.read_bytes()
    with export(Never(), folder):
        pass


def test_a_folder_that_cannot_be_written_only_means_nothing_is_kept(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with export(Pool(), tmp_path / "file" / "onnx") as path:
        onnx.checker.check_model(onnx.load(path))
        assert path.is_file()
    assert not path.exists()


def test_other_weights_are_another_model(folder):
    with export(Pool(), folder, fingerprint="e" * 64):
        pass
    assert len(list(folder.iterdir())) == 2


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "s4mil_monai"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "s4mil_monai"
