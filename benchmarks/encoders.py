"""Patches a second of every encoder in every runtime, and what half precision does to slide scores.

    python benchmarks/encoders.py [SLIDE ...] [--rounds 7] [--batch 16] [--bundle bundles/s4mil_slide]

Two rows of each encoder are the plain float32 network, no batch norm folded, channels first: "eager, as
installed" and "eager, buffers kept", which differ in the setting of :mod:`s4mil_monai.allocator`; the other rows
run with it, as the command line does. Each row is a process of its own that waits while the others run; they take
turns in every round, so that a machine whose speed drifts treats them alike. Medians; a ratio is the median over
rounds of the ratio within a round. Cosines are to the plain network, over the patches of a batch.

ResNet50 has random weights here (Kaiming, seeded, batch norm statistics of real tissue): speed does not depend on
them, cosines of half precision do. EfficientNet-Lite0 has its real ones, and so has the second table: slides
scored by a bundle in float32 and in half precision.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from fire import Fire
from skimage.data import immunohistochemistry
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.features.encoder import ENCODERS, PublishedEncoder, load_encoder
from s4mil_monai.features.encoder_runtime import find_processor
from s4mil_monai.weights import load_state, read_weights

SIDE_PX = 256


@dataclass(frozen=True)
class Row:
    """One way to run an encoder."""

    encoder: str
    weights: Path | None
    runtime: str
    precision: str = "float32"
    keeps_buffers: bool = True

    @property
    def label(self) -> str:
        if self.runtime == "eager":
            return "eager, buffers kept" if self.keeps_buffers else "eager, as installed"
        return self.runtime


@dataclass
class Worker:
    """The process of a row."""

    row: Row
    pipe: Connection
    process: BaseProcess
    features: Tensor
    start_s: float
    seconds: list[float]


def main(
    *slides: str,
    encoders: str | tuple[str, ...] = ("resnet50_block3", "efficientnet_lite0"),
    rounds: int = 7,
    batch: int = 16,
    bundle: str = "bundles/s4mil_slide",
) -> None:
    """Print both tables; the second for the slides given."""
    print(f"{find_processor().name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| encoder | runtime | precision | batch | patches/s | : as installed | : buffers kept |", end="")
    print(" least cosine | mean cosine | start, s |\n|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in (encoders,) if isinstance(encoders, str) else encoders:
            weights = write_random_resnet50(Path(folder)) if name == "resnet50_block3" else None
            measure(name, weights, rounds=rounds, batch=batch)
    if slides:
        compare_scores(Path(bundle), slides)


def measure(name: str, weights: Path | None, *, rounds: int, batch: int) -> None:
    """Print the rows of one encoder."""
    workers = take_turns(lay_rows(name, weights), rounds=rounds, batch=batch)
    for worker in workers:
        print(line(worker, workers[0], workers[1], batch))


def take_turns(rows: list[Row], *, rounds: int, batch: int) -> list[Worker]:
    """Time every row once a round; the processes are ended."""
    workers = [start(row, batch) for row in rows]
    for _ in range(rounds):
        for worker in workers:
            worker.pipe.send("go")
            worker.seconds.append(worker.pipe.recv())
    for worker in workers:
        worker.pipe.send("stop")
        worker.process.join()
    return workers


def lay_rows(name: str, weights: Path | None) -> list[Row]:
    """The two plain rows first."""
    half = ["bfloat16"] if find_processor().has_bfloat16 else []
    return [
        Row(name, weights, "eager", keeps_buffers=False),
        Row(name, weights, "eager"),
        *(Row(name, weights, runtime) for runtime in ("torch", "compiled", "onnxruntime")),
        *(Row(name, weights, runtime, precision) for precision in half for runtime in ("torch", "compiled")),
    ]


def start(row: Row, batch: int) -> Worker:
    """Start the process of a row and wait until it is warm."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, row, batch), daemon=True)
    process.start()
    theirs.close()
    features, start_s = pipe.recv()
    return Worker(row, pipe, process, torch.from_numpy(features), start_s, [])


def serve(pipe: Connection, row: Row, batch: int) -> None:
    """Give features and seconds to start, then seconds of a batch each time one is asked for."""
    if row.keeps_buffers:
        keep_large_buffers()
    spec = ENCODERS[row.encoder]
    patches = tissue_patches(spec, batch)
    started = time.perf_counter()
    encode = plain(spec, row.weights) if row.runtime == "eager" else fast(row)
    features = encode(patches)
    pipe.send((features.numpy(), time.perf_counter() - started))
    encode(patches)
    while pipe.recv() == "go":
        started = time.perf_counter()
        encode(patches)
        pipe.send(time.perf_counter() - started)


def plain(spec: PublishedEncoder, weights: Path | None):
    """The network as anybody would run it."""
    path = weights or spec.find_weights()
    network = spec.build().eval()
    state = {key: value for key, value in read_weights(path).items() if not key.startswith(spec.unused)}
    load_state(network, state, path)
    return torch.inference_mode()(network.forward)


def fast(row: Row):
    """The encoder in a runtime of the package."""
    encoder = load_encoder(row.encoder, weights=row.weights, runtime=row.runtime, precision=row.precision)
    if encoder.runtime != row.runtime:
        print(f"{row.runtime} cannot be had here: this row is {encoder.runtime}", file=sys.stderr)
    return encoder.encode


def line(worker: Worker, installed: Worker, kept: Worker, batch: int) -> str:
    """One row of the table."""
    cosine = F.cosine_similarity(worker.features.double(), installed.features.double())
    cells = [
        worker.row.encoder,
        worker.row.label,
        worker.row.precision,
        f"{batch}",
        f"{batch / statistics.median(worker.seconds):.1f}",
        f"{ratio(installed, worker):.2f}",
        f"{ratio(kept, worker):.2f}",
        f"{cosine.min():.6f}",
        f"{cosine.mean():.6f}",
        f"{worker.start_s:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def ratio(slow: Worker, fast: Worker) -> float:
    """How many times faster, as the median over rounds."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def tissue_patches(spec: PublishedEncoder, count: int) -> Tensor:
    """(count, 3, 256, 256) normalised pieces of a picture of real tissue."""
    picture = torch.from_numpy(immunohistochemistry().copy()).permute(2, 0, 1).float() / 255
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 512 - SIDE_PX + 1, (count, 2), generator=generator).tolist()
    patches = torch.stack([picture[:, y : y + SIDE_PX, x : x + SIDE_PX] for y, x in corners])
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.deviation))
    return (patches - mean) / deviation


def write_random_resnet50(folder: Path) -> Path:
    """Random weights for the third block's ResNet50, with batch norm statistics of real tissue."""
    spec = ENCODERS["resnet50_block3"]
    torch.manual_seed(0)
    network = spec.build()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average of what it sees
    with torch.no_grad():
        network.train()(tissue_patches(spec, 16))
    path = folder / "random_resnet50.pt"
    torch.save(network.state_dict(), path)
    return path


def compare_scores(bundle: Path, slides: tuple[str, ...]) -> None:
    """Print what bfloat16 changes in the scores of slides."""
    from s4mil_monai.scoring import load_scorer, score_slide

    keep_large_buffers()
    exact = load_scorer(bundle)
    half = replace(exact, encoder=load_encoder(exact.encoder.spec.name, precision="bfloat16"))
    classes = exact.bundle.settings.classes
    print(f"\n{bundle.name}, {exact.encoder.spec.name}, probability of {classes[-1]}\n")
    print("| slide | patches | float32 | bfloat16 | difference | largest difference of a patch |")
    print("|---|---|---|---|---|---|")
    for slide in slides:
        a, b = (score_slide(slide, scorer) for scorer in (exact, half))
        if a.patches is None or b.patches is None or a.probabilities is None or b.probabilities is None:
            print(f"| {Path(slide).name} | 0 | {a.status} | {b.status} | | |")
            continue
        patches = torch.tensor(a.patches.probabilities) - torch.tensor(b.patches.probabilities)
        p, q = a.probabilities[-1], b.probabilities[-1]
        print(
            f"| {Path(slide).name} | {len(patches)} | {p:.5f} | {q:.5f} | {abs(p - q):.1e} |"
            f" {patches.abs().max():.1e} |"
        )


if __name__ == "__main__":
    Fire(main)
