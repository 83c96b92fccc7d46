"""Train the demonstration weights of bundles/s4mil_slide and measure them on tiles not trained on.

    python benchmarks/demonstration_weights.py --tiles FOLDER [--out output/demonstration] [--ship]

FOLDER holds labels.csv (path, label) and the colon tiles it names. Steps: embed each tile with
EfficientNet-Lite0; compose bags (tiles are split first); train through the bundle, as a user would; report
AUROC on the test bags beside mean and max pooling and beside colour alone. --ship puts the weights into the
bundle and the table into its model card.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fire import Fire
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.features.encoder import Encoder, load_encoder
from s4mil_monai.features.patch_batches import torch_batches
from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.bundle import BundleSettings, NetworkSettings, WeightsSettings, ship_weights
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.result import EncoderRecord, PatchSettings
from s4mil_monai.training.bags import LabelledBag
from s4mil_monai.training.composed import TileFeatures, compose_split, load_tile_features, split_tiles
from s4mil_monai.training.splits import Split
from s4mil_monai.weights import load_state, read_weights

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "s4mil_slide"
CLASSES = ("no adenocarcinoma", "adenocarcinoma")
SEED = 0


def main(tiles: str, out: str = "output/demonstration", ship: bool = False, max_epochs: int = 60) -> None:
    """Run all steps; tiles that are already embedded and weights already trained are kept."""
    keep_large_buffers()
    torch.manual_seed(SEED)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder("efficientnet_lite0")
    if not (folder / "tiles.npz").exists():
        embed_tiles(Path(tiles), encoder, folder / "tiles.npz")
    if not (folder / "model.pt").exists():
        train(folder, max_epochs)
    split = compose_split(folder / "tiles.npz", seed=SEED)
    table = report(folder, split, Path(tiles))
    print(table)
    if ship:
        put_into_bundle(folder, encoder, table)


def embed_tiles(tiles: Path, encoder: Encoder, path: Path) -> None:
    """Embed each tile at its own size, 224 px; the encoder pools, so the side does not matter."""
    rows = pd.read_csv(tiles / "labels.csv")
    features = []
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
    np.savez(path, features=np.concatenate(features), labels=rows["label"].to_numpy(str))


def train(folder: Path, max_epochs: int) -> None:
    """Train through the bundle's own configuration."""
    configs = [str(BUNDLE / "configs" / name) for name in ("train.yaml", "composed.yaml")]
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(configs)]
    options = {"dataset_dir": folder, "output_dir": folder, "seed": SEED, "train::trainer::max_epochs": max_epochs}
    subprocess.run(command + [f"--{key}={value}" for key, value in options.items()], check=True)


def report(folder: Path, split: Split, tiles: Path) -> str:
    """A Markdown table of test results."""
    network = SlideLogits(S4MIL(split.in_features, classes=2)).eval()
    weights = folder / "model.pt"
    load_state(network, read_weights(weights), weights)
    with torch.inference_mode():
        outputs = [network.model(torch.from_numpy(bag.features).unsqueeze(0)) for bag in split.test]
    scores = np.array([output.logits.softmax(1)[0, 1].item() for output in outputs])
    rows = [
        ("S4MIL, N = 32 (shipped)", *_bag_figures(split.test, scores)),
        ("mean pooling, logistic regression", *_bag_figures(split.test, _pooled(split, np.mean))),
        ("max pooling, logistic regression", *_bag_figures(split.test, _pooled(split, np.max))),
    ]
    patches = [
        roc_auc_score(bag.patch_labels, output.patch_logits[0].softmax(1)[:, 1].numpy())
        for bag, output in zip(split.test, outputs, strict=True)
        if bag.label == 1
    ]
    lines = ["| model | AUROC of bags | accuracy of bags |", "|---|---|---|"]
    lines += [f"| {name} | {auroc:.3f} | {accuracy:.3f} |" for name, auroc, accuracy in rows]
    lengths = [len(bag.features) for bag in split.test]
    lines += [
        "",
        f"{len(split.test)} test bags of {min(lengths)} to {max(lengths)} patches, composed of tiles not "
        f"trained on; {len(split.train)} training and {len(split.validation)} validation bags; seed {SEED}.",
        f"AUROC of single patches inside positive bags, mean over bags: {np.mean(patches):.3f}.",
        "Single tiles, adenocarcinoma against healthy, by mean and deviation of each colour alone "
        f"(logistic regression): AUROC {_colour_alone(tiles):.3f}.",
    ]
    return "\n".join(lines)


def _bag_figures(bags: Sequence[LabelledBag], scores: np.ndarray) -> tuple[float, float]:
    labels = [bag.label for bag in bags]
    return float(roc_auc_score(labels, scores)), float(accuracy_score(labels, scores > 0.5))


def _pooled(split: Split, pool) -> np.ndarray:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    model.fit([pool(bag.features, axis=0) for bag in split.train], [bag.label for bag in split.train])
    return model.predict_proba([pool(bag.features, axis=0) for bag in split.test])[:, 1]


def _colour_alone(tiles: Path) -> float:
    """AUROC on test tiles from six numbers a tile, trained on the training tiles."""
    rows = pd.read_csv(tiles / "labels.csv")
    pixels = (np.asarray(Image.open(tiles / path).convert("RGB"), np.float32) for path in rows["path"])
    colours = np.stack([np.concatenate((p.mean((0, 1)), p.std((0, 1)))) for p in pixels])
    parts = split_tiles(TileFeatures(colours, rows["label"].to_numpy(str)), shares=(0.5, 0.2, 0.3), seed=SEED)
    train, test = ((part.features, part.labels) for part in (parts[0], parts[2]))
    model = make_pipeline(StandardScaler(), LogisticRegression())
    keep = [np.isin(labels, ("AC", "H")) for _, labels in (train, test)]
    model.fit(train[0][keep[0]], train[1][keep[0]] == "AC")
    return float(roc_auc_score(test[1][keep[1]] == "AC", model.predict_proba(test[0][keep[1]])[:, 1]))


def put_into_bundle(folder: Path, encoder: Encoder, table: str) -> None:
    """Ship weights and figures."""
    width = load_tile_features(folder / "tiles.npz").features.shape[1]
    settings = BundleSettings(
        classes=CLASSES,
        network=NetworkSettings(in_features=width, classes=len(CLASSES)),
        encoder=EncoderRecord(name=encoder.spec.name, sha256=encoder.fingerprint, width=width),
        patches=PatchSettings(),
        weights=WeightsSettings(path="models/model.pt", sha256=""),
    )
    ship_weights(BUNDLE, folder / "model.pt", settings)
    card = BUNDLE / "docs" / "README.md"
    before, _, rest = card.read_text(encoding="utf-8").partition("<!-- figures -->\n")
    _, _, after = rest.partition("<!-- end of figures -->")
    card.write_text(f"{before}<!-- figures -->\n{table}\n<!-- end of figures -->{after}", encoding="utf-8")


if __name__ == "__main__":
    Fire(main)
