"""Seconds and memory of an epoch of training, beside the authors' way of training.

    python benchmarks/training.py [--lengths 1000,2000,4000,8000,15000] [--state_dim 32] [--epochs 3] [--rounds 2]

Both rows train through the slide model's bundle, with its optimizer and handlers, on the same bags, one bag at a
time, with the same threads and allocator setting, in processes of their own that take turns. They differ in the
network: "textbook" has the kernel as it is usually written, exp(dtA l) for every channel, mode and position at
once, (H, N/2, L) complex, and the matrix products of `F.linear`; it starts from the same parameters.

Seconds are the median over the epochs of all rounds, without validation and without the first epoch of a process.
"peak" is the process's highest resident memory above what it held once the bags were there; "loss" is that of the
last epoch, which both must reach alike for the comparison to mean anything.
"""

from __future__ import annotations

import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from aggregators import TextbookS4MIL
from fire import Fire
from monai.bundle.workflows import ConfigWorkflow
from torch import Tensor, nn

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.training.bags import LabelledBag
from s4mil_monai.training.places import find_bundle
from s4mil_monai.training.splits import Split

LENGTHS = (1_000, 2_000, 4_000, 8_000, 15_000)
"""Patches of slides at 20x: a biopsy, and resections."""

NETWORKS = ("S4MIL", "textbook S4MIL")


class TextbookNetwork(nn.Module):
    """The textbook model as the bundle trains it: (1, D, L) features to logits."""

    def __init__(self, state_dim: int):
        super().__init__()
        start = S4MIL(1024, state_dim=state_dim)  # drawn first, as the other row draws it
        self.model = TextbookS4MIL(state_dim)
        self.model.load_state_dict(start.state_dict())

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.transpose(1, 2))


def make_split(lengths: list[int]) -> Split:
    """Bags of 1,024 numbers a patch, above zero as an encoder's; a positive one has a run of shifted patches."""
    generator = np.random.default_rng(0)
    bags = [_make_bag(generator, i, length) for i, length in enumerate(lengths)]
    short = [_make_bag(generator, i, 100) for i in range(2)]  # validation is not measured
    return Split(bags, short)


def _make_bag(generator: np.random.Generator, number: int, length: int) -> LabelledBag:
    features = np.abs(generator.standard_normal((length, 1024), dtype=np.float32))
    label = number % 2
    if label:
        features[length // 2 : length // 2 + length // 10, :64] += 1
    return LabelledBag(f"bag{number}", features, label, f"bag{number}")


def main(lengths: tuple[int, ...] = LENGTHS, state_dim: int = 32, epochs: int = 3, rounds: int = 2) -> None:
    """Print the table."""
    lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    if epochs < 2:
        sys.exit("epochs are 2 or more, as the first is not counted")
    found = {name: [] for name in NETWORKS}
    for _ in range(rounds):
        for name in NETWORKS:
            found[name].append(measure(name, lengths, state_dim, epochs))
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, float32, large buffers kept, N = {state_dim}, seed 0")
    print(
        f"bags of {', '.join(f'{length:,}' for length in lengths)} patches; {rounds} rounds of {epochs} epochs\n"
    )
    print("| network | seconds an epoch | slowest, fastest | peak MB | loss | textbook : this | memory |")
    print("|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        print(_line(name, found))


def _line(name: str, found: dict[str, list[dict]]) -> str:
    seconds, textbook = (sorted(s for row in found[key] for s in row["seconds"]) for key in (name, NETWORKS[1]))
    peak, textbook_peak = (max(row["peak_mb"] for row in found[key]) for key in (name, NETWORKS[1]))
    ratios = (statistics.median(textbook) / statistics.median(seconds), textbook_peak / peak)
    shown = " | ".join("" if name == NETWORKS[1] else f"{ratio:.1f}" for ratio in ratios)
    return (
        f"| {name} | {statistics.median(seconds):.2f} | {seconds[-1]:.2f}, {seconds[0]:.2f} "
        f"| {peak:.0f} | {found[name][0]['loss']:.4f} | {shown} |"
    )


def measure(name: str, lengths: tuple[int, ...], state_dim: int, epochs: int) -> dict:
    """One training, in a process of its own."""
    command = [sys.executable, __file__, "row", name, json.dumps(lengths), str(state_dim), str(epochs)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(f"{name}: ended with code {finished.returncode}\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def row(name: str, lengths: list[int], state_dim: int, epochs: int) -> None:
    """Train and print as JSON."""
    keep_large_buffers()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        workflow = ConfigWorkflow(
            str(Path(find_bundle("s4mil_slide")) / "configs" / "train.yaml"),
            logging_file=False,
            workflow_type="train",
            **_overrides(name, lengths, state_dim, epochs, folder),
        )
        workflow.initialize()
        _ = workflow.parser.get_parsed_content("network"), workflow.parser.get_parsed_content("split")
        before = _peak_mb()
        workflow.run()
        history = pd.read_csv(Path(folder) / "history.csv")
    result = {
        "seconds": history["seconds"].tolist()[1:],
        "loss": history["train_loss"].iloc[-1],
        "peak_mb": _peak_mb() - before,
    }
    print(json.dumps(result))


def _overrides(name: str, lengths: list[int], state_dim: int, epochs: int, folder: str) -> dict:
    network = (
        {"network_def": {"_target_": "training.TextbookNetwork", "state_dim": state_dim}}
        if name == "textbook S4MIL"
        else {"network_def::model::state_dim": state_dim}
    )
    return {
        "output_dir": folder,
        "quiet": True,
        "bags": None,
        "dataset_dir": "",
        "split": {"_target_": "training.make_split", "lengths": list(lengths)},
        "train::trainer::max_epochs": epochs,
        **network,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    Fire({"main": main, "row": row}) if sys.argv[1:2] == ["row"] else Fire(main)
