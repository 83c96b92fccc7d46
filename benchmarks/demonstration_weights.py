"""Train the demonstration weights of bundles/s4mil_slide and bundles/s4mil_multitask and measure them.

    python benchmarks/demonstration_weights.py --tiles FOLDER [--out output/demonstration] [--ship]

FOLDER holds labels.csv (path, label) and the colon tiles it names. Steps: embed each tile with EfficientNet-Lite0;
train each bundle through its own train.yaml and composed.yaml, as a user would; report on test bags, of stains not
trained on, beside pooled baselines and colour alone. --ship puts weights, fingerprints and the table into the
bundles. benchmarks/composed_colon.py measures the same with several seeds, more models and intervals.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from composed_colon import Predict, composed, fit_baselines, measure, predict_by_network, tile_auroc
from fire import Fire
from monai.bundle.config_parser import ConfigParser
from PIL import Image

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.features.encoder import Encoder, load_encoder
from s4mil_monai.features.patch_batches import torch_batches
from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.bundle import BundleSettings, NetworkSettings, WeightsSettings, ship_weights
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.models.seal import kept_sealed
from s4mil_monai.result import EncoderRecord, PatchSettings
from s4mil_monai.training.composed import load_tile_features
from s4mil_monai.training.splits import Split
from s4mil_monai.weights import load_state, read_weights

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
PATCH_CLASSES = {"s4mil_slide": None, "s4mil_multitask": 2}
CLASSES = ("no adenocarcinoma", "adenocarcinoma")
SEED = 0


def main(tiles: str, out: str = "output/demonstration", ship: bool = False) -> None:
    """Run all steps; tiles that are already embedded and weights already trained are kept."""
    keep_large_buffers()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder("efficientnet_lite0")
    if not (folder / "tiles.npz").exists():
        embed_tiles(Path(tiles), encoder, folder / "tiles.npz")
    for bundle in PATCH_CLASSES:
        if not (folder / bundle / "model.pt").exists():
            train(bundle, folder)
    table = report(folder)
    print(table)
    if ship:
        for bundle in PATCH_CLASSES:
            put_into_bundle(bundle, folder, encoder, table)


def embed_tiles(tiles: Path, encoder: Encoder, path: Path) -> None:
    """Embed each tile at its own size, 224 px, and note its colours; the encoder pools, any side will do."""
    rows = pd.read_csv(tiles / "labels.csv")
    features, colours = [], []
    for start in range(0, len(rows), 16):
        pixels = np.stack(
            [np.asarray(Image.open(tiles / p).convert("RGB")) for p in rows["path"][start : start + 16]]
        )
        batches = torch_batches(
            [pixels],
            patch_side_px=pixels.shape[1],
            mean=encoder.spec.mean,
            deviation=encoder.spec.deviation,
            batch_size=16,
        )
        features += [encoder.encode(batch).numpy() for batch in batches]
        colours.append(colours_of(pixels))
    labels = rows["label"].to_numpy(str)
    np.savez(path, features=np.concatenate(features), labels=labels, colours=np.concatenate(colours))


def colours_of(pixels: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) → (B, 6) mean and deviation of red, green and blue."""
    values = pixels.astype(np.float32)
    return np.concatenate((values.mean((1, 2)), values.std((1, 2))), axis=1)


def config_files(bundle: str) -> list[str]:
    """What the weights are trained by."""
    return [str(BUNDLES / bundle / "configs" / name) for name in ("train.yaml", "composed.yaml")]


def train(bundle: str, folder: Path) -> None:
    """Train through the bundle's own configuration."""
    command = [sys.executable, "-m", "monai.bundle", "run", "training", f"--config_file={config_files(bundle)}"]
    options = {"bundle_root": BUNDLES / bundle, "dataset_dir": folder, "output_dir": folder / bundle, "seed": SEED}
    subprocess.run(command + [f"--{key}={value}" for key, value in options.items()], check=True)


# Figures ------------------------------------------------------------------------------------------------------


def report(folder: Path) -> str:
    """A Markdown table of test results."""
    parser = ConfigParser(ConfigParser.load_config_files(config_files("s4mil_slide")))
    parser.update({"dataset_dir": str(folder), "seed": SEED})
    split: Split = parser.get_parsed_content("split")
    models = {f"{bundle} (shipped)": load_trained(bundle, folder, split) for bundle in PATCH_CLASSES}
    models |= fit_baselines(split)
    lines = ["| model | AUROC of bags | accuracy of bags | AUROC of patches |", "|---|--:|--:|--:|"]
    for name, row in measure(models, composed(split.test)).set_index("model").iterrows():
        patches = "" if np.isnan(row["patch_auroc"]) else f"{row['patch_auroc']:.3f}"
        lines.append(f"| {name} | {row['auroc']:.3f} | {row['accuracy']:.3f} | {patches} |")
    return "\n".join([*lines, "", *notes(split)])


def load_trained(bundle: str, folder: Path, split: Split) -> Predict:
    """What was trained for a bundle."""
    network = SlideLogits(S4MIL(split.in_features, patch_classes=PATCH_CLASSES[bundle])).eval()
    weights = folder / bundle / "model.pt"
    load_state(network, read_weights(weights), weights)
    return partial(predict_by_network, network)


def notes(split: Split) -> list[str]:
    """How many bags, and how far colour alone goes."""
    lengths = [bag.length for bag in split.test]
    return [
        f"{len(split.test)} test bags of {min(lengths):,} to {max(lengths):,} patches, composed of tiles of "
        f"stains not trained on; {len(split.train)} training and {len(split.validation)} validation bags; "
        f"seed {SEED}.",
        "AUROC of patches: inside positive bags, mean over bags.",
        "`mean_sklearn`, `max_sklearn`: logistic regression on the mean and the maximum of the features; "
        "`mean_colour`, `max_colour`: the same of six numbers of each tile's colour.",
        f"Single test tiles, adenocarcinoma against healthy: AUROC {tile_auroc(split, colour=True):.3f} by colour "
        f"alone, {tile_auroc(split, colour=False):.3f} by features (logistic regression).",
    ]


# Shipping -----------------------------------------------------------------------------------------------------


def put_into_bundle(bundle: str, folder: Path, encoder: Encoder, table: str) -> None:
    """Ship weights and figures."""
    width = load_tile_features(folder / "tiles.npz").features.shape[1]
    network = NetworkSettings(in_features=width, classes=len(CLASSES), patch_classes=PATCH_CLASSES[bundle])
    settings = BundleSettings(
        classes=CLASSES,
        network=network,
        encoder=EncoderRecord(name=encoder.spec.name, sha256=encoder.fingerprint, width=width),
        patches=PatchSettings(),
        weights=WeightsSettings(path="models/model.pt", sha256=""),
    )
    with kept_sealed(BUNDLES / bundle):
        ship_weights(BUNDLES / bundle, folder / bundle / "model.pt", settings)
        card = BUNDLES / bundle / "docs" / "README.md"
        before, _, rest = card.read_text(encoding="utf-8").partition("<!-- figures -->\n")
        _, _, after = rest.partition("<!-- end of figures -->")
        card.write_text(f"{before}<!-- figures -->\n{table}\n<!-- end of figures -->{after}", encoding="utf-8")


if __name__ == "__main__":
    Fire(main)
