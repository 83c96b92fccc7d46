"""Small real things for the tests: slides of known colour, a bundle with random weights."""

from __future__ import annotations

import json
import os
import resource
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from s4mil_monai.features.encoder import load_encoder
from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.bundle import BundleSettings, NetworkSettings, WeightsSettings, ship_weights
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.result import EncoderRecord, PatchSettings
from s4mil_monai.slides.pyramid import write_pyramid

SHARED = Path(os.environ.get("S4MIL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PINK, GLASS = (200, 100, 160), (244, 244, 244)

# holoscan, imported by monai where it is installed, warns about a smaller stack
resource.setrlimit(resource.RLIMIT_STACK, (32 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))

# The same examples every time, and none too slow for a busy machine: what failed once fails again.
settings.register_profile("s4mil", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("s4mil")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Measured runtimes and exported encoders of the tests stay out of the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real slides, tiles and reference values, which a clone does not have."""
    if not SHARED.is_dir():
        pytest.skip("../shared with real slides and reference values is not here")
    return SHARED


def tissue_picture(width: int = 1536, height: int = 1280, *, seed: int = 0) -> np.ndarray:
    """(H, W, 3): a pink textured rectangle from (256, 256) to (1280, 1024) on glass."""
    generator = np.random.default_rng(seed)
    picture = np.full((height, width, 3), GLASS, np.uint8)
    texture = generator.integers(-30, 31, (768, 1024, 1))
    picture[256:1024, 256:1280] = np.clip(np.array(PINK) + texture, 0, 255)
    return picture


@pytest.fixture(scope="session")
def tissue_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 0.5 µm/px with 4 x 3 whole patches of tissue on the 256 px grid."""
    return write_pyramid(tissue_picture(), tmp_path_factory.mktemp("slides") / "tissue.tif", mpp=0.5)


@pytest.fixture(scope="session")
def dicom_slide(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tissue slide as DICOM: a folder with one instance, all of its 1,536 x 1,280 pixels."""
    from s4mil_monai.outputs.dicom_object import write_object
    from s4mil_monai.outputs.dicom_source import find_source
    from s4mil_monai.outputs.heatmap import write_heatmap
    from s4mil_monai.slides.isolation import open_isolated
    from tests.outputs.results import make_result

    folder = tmp_path_factory.mktemp("dicom") / "slide"
    folder.mkdir()
    with open_isolated(tissue_slide) as slide:
        result = make_result(slide)
        overview = find_source(slide, result, write_heatmap(result, slide, folder.parent / "heatmap.png")).overview
    assert overview is not None
    write_object(overview, folder / "level0.dcm", written=datetime(2026, 11, 24, tzinfo=timezone.utc))
    return folder


@pytest.fixture(scope="session")
def white_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Glass and nothing else."""
    blank = np.full((1024, 1024, 3), GLASS, np.uint8)
    return write_pyramid(blank, tmp_path_factory.mktemp("slides") / "white.tif", mpp=0.5)


@pytest.fixture(scope="session")
def lite0():
    """The packaged encoder with its real weights."""
    return load_encoder("efficientnet_lite0")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, lite0) -> Path:
    """A bundle with random weights for the packaged encoder."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    (folder / "configs").mkdir(parents=True)
    metadata = {"name": "tiny", "version": "1.0", "intended_use": "tests"}
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    network = NetworkSettings(in_features=1280, classes=2, width=16, state_dim=4)
    torch.manual_seed(1)
    torch.save(SlideLogits(S4MIL(**network.model_dump())).state_dict(), folder / "trained.pt")
    settings = BundleSettings(
        classes=("normal", "tumour"),
        network=network,
        encoder=EncoderRecord(name="efficientnet_lite0", sha256=lite0.fingerprint, width=1280),
        patches=PatchSettings(),
        weights=WeightsSettings(path="models/model.pt", sha256=""),
    )
    ship_weights(folder, folder / "trained.pt", settings)
    return folder
