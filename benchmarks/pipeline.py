"""From slide to features: reading, the whole way, the encoder alone, memory; against what public libraries give.

    python benchmarks/pipeline.py goals SLIDE SMALLER_SLIDE [--runs 1] [--rounds 5]
    python benchmarks/pipeline.py speed SLIDE [--encoder resnet50_block3] [--runtime auto] [--runs 3]
    python benchmarks/pipeline.py preparing
    python benchmarks/pipeline.py memory SLIDE [SLIDE ...]

`goals` measures all of it in one run and prints each goal beside what was measured: reading, the encoder (rows of
benchmarks/encoders.py, the fastest runtime of each precision), the whole way, memory.

Every figure comes from a process of its own, all in turn, medians over the runs. "CLAM-style" is the usual loop,
in this file, with public libraries only: OpenSlide in the workers of a DataLoader, eager PyTorch in float32, HDF5.
It is given the corners of the patches and does not look for tissue. "As installed" leaves glibc's allocator as it
is, "same allocator" gives it the setting this package uses. The slide is read as 0.5 µm/px: both read the same
256 px squares. ResNet50's weights are random (seed 0) where none are given: they do not change the time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import openslide
import torch
from encoders import Worker, lay_rows, ratio, take_turns, write_random_resnet50
from fire import Fire
from torch.utils.data import DataLoader, Dataset

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.embedding import EmbeddingRun, embed_slides
from s4mil_monai.embedding_engine import build_network
from s4mil_monai.features.encoder import Encoder, find_encoder, load_encoder
from s4mil_monai.features.patch_stage import choose_patch_batches
from s4mil_monai.features.patch_stream import read_ahead, stream_patches
from s4mil_monai.features.prepare import prepare_slide
from s4mil_monai.result import PatchSettings
from s4mil_monai.slides.grid import PatchGrid, lay_grid
from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.patches import read_patches
from s4mil_monai.slides.resolution import plan_reading
from s4mil_monai.slides.tissue import find_tissue

MPP = 0.5
BATCH = 16
SETTINGS = PatchSettings(mpp=MPP)
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((2 << 30) - 1)}
"""glibc's setting by environment, the same as :mod:`s4mil_monai.allocator` makes."""


def find_grid(slide: str) -> PatchGrid:
    """The patches of a slide read as 0.5 µm/px."""
    with open_isolated(slide, assume_mpp=MPP) as opened:
        return lay_grid(find_tissue(opened), plan_reading(opened, mpp=MPP, patch_side_px=256))


def load(encoder: str, weights: str, runtime: str = "torch") -> Encoder:
    """The encoder with its weights."""
    return load_encoder(encoder, weights=weights or None, runtime=runtime)


# What is measured, each in a process of its own


def openslide_reading(slide: str, **_: str) -> float:
    """OpenSlide, one thread, a patch at a time."""
    corners = find_grid(slide).top_left_px0.tolist()
    with openslide.OpenSlide(slide) as opened:
        started = time.perf_counter()
        for x, y in corners:
            np.asarray(opened.read_region((x, y), 0, (256, 256)).convert("RGB"))
        return time.perf_counter() - started


def our_reading(slide: str, **_: str) -> float:
    """This package's reading processes, in batches."""
    keep_large_buffers()
    with open_isolated(slide, assume_mpp=MPP) as opened:
        prepared = prepare_slide(opened, SETTINGS)
        corners = [(x, y) for x, y in prepared.grid.top_left_px0[:BATCH].tolist()]
        read_patches(opened, corners, side_px=256, level=0)
        started = time.perf_counter()
        for _batch in read_ahead(prepared, batch_size=BATCH):
            pass
        return time.perf_counter() - started


class CoordinateDataset(Dataset):
    """Patches of one slide by their corners, as most public pipelines have it."""

    def __init__(self, slide: str, corners: list[list[int]], encoder: str):
        self._slide, self._corners = slide, corners
        self._opened: openslide.OpenSlide | None = None
        spec = find_encoder(encoder)
        self._mean, self._deviation = (
            torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.deviation)
        )

    def __len__(self) -> int:
        return len(self._corners)

    def __getitem__(self, index: int) -> torch.Tensor:
        opened = self._opened = self._opened or openslide.OpenSlide(self._slide)
        x, y = self._corners[index]
        patch = np.array(opened.read_region((x, y), 0, (256, 256)).convert("RGB"))
        pixels = torch.from_numpy(patch).permute(2, 0, 1).float() / 255
        return (pixels - self._mean) / self._deviation


@torch.inference_mode()
def clam_style(slide: str, encoder: str, weights: str, **_: str) -> float:
    """The usual loop."""
    corners = find_grid(slide).top_left_px0.tolist()
    network = build_network(encoder).eval()
    state = torch.load(weights, weights_only=True) if weights else None
    if state is not None:
        network.load_state_dict(state)
    started = time.perf_counter()
    loader = DataLoader(CoordinateDataset(slide, corners, encoder), batch_size=BATCH, num_workers=2)
    with tempfile.TemporaryDirectory() as folder, h5py.File(Path(folder) / "slide.h5", "w") as file:
        features = np.concatenate([network(batch).numpy() for batch in loader])
        file.create_dataset("features", data=features)
        file.create_dataset("coords", data=np.array(corners))
    return time.perf_counter() - started


def ours(slide: str, encoder: str, weights: str, runtime: str, **_: str) -> float:
    """This package, from the path of the slide to its feature file."""
    keep_large_buffers()
    run = EmbeddingRun(load(encoder, weights, runtime), SETTINGS, assume_mpp=MPP)
    run.encoder.encode(torch.zeros(BATCH, 3, 256, 256))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        (done,) = embed_slides({Path(slide): Path(folder) / "slide.h5"}, run)
        seconds = time.perf_counter() - started
    print(json.dumps(done.seconds), file=sys.stderr)
    return seconds


def encoder_alone(slide: str, encoder: str, weights: str, runtime: str, **_: str) -> float:
    """The same encoder on the same patches, read beforehand."""
    keep_large_buffers()
    ready = load(encoder, weights, runtime)
    with open_isolated(slide, assume_mpp=MPP) as opened:
        stream = stream_patches(
            prepare_slide(opened, SETTINGS), ready.spec, device=ready.device, patch_stage="torch", batch_size=BATCH
        )
        batches = [batch.patches for batch in stream]
    ready.encode(batches[0])
    started = time.perf_counter()
    for batch in batches:
        ready.encode(batch)
    return time.perf_counter() - started


MEASURED: dict[str, tuple[Callable[..., float], dict[str, str]]] = {
    "reading, OpenSlide, one thread": (openslide_reading, {}),
    "reading, s4mil": (our_reading, {}),
    "CLAM-style, as installed": (clam_style, {}),
    "CLAM-style, same allocator": (clam_style, KEPT),
    "encoder alone": (encoder_alone, {}),
    "s4mil": (ours, {}),
}
"""By the name in the table: what runs, and with which environment."""


# The table


def speed(
    slide: str, encoder: str = "resnet50_block3", weights: str = "", runtime: str = "auto", runs: int = 3
) -> None:
    """Print all figures and their ratios."""
    print_table(measure_speed(slide, encoder, weights, runtime, runs))


@dataclass(frozen=True)
class Goal:
    """One ratio of the table."""

    text: str
    goal: str
    over: str
    under: str


SPEED_GOALS = (
    Goal(
        "reading, against OpenSlide in one thread",
        "at least 2.5x",
        "reading, OpenSlide, one thread",
        "reading, s4mil",
    ),
    Goal("slide to features, against CLAM-style as installed", "at least 4x", "CLAM-style, as installed", "s4mil"),
    Goal("the same, with the same allocator setting", "at least 1.8x", "CLAM-style, same allocator", "s4mil"),
    Goal("slide to features, against the encoder alone", "at most 1.1x", "s4mil", "encoder alone"),
)

ENCODER_GOALS = {"float32": ("at least 4.4x", "at least 1.8x"), "bfloat16": ("at least 7x", "at least 2.5x")}
"""By precision: against eager PyTorch as installed, and with buffers kept."""

MEMORY_GOAL_MB = 500

Rows = list[tuple[str, str, str]]
"""What, goal, measured."""


def goals(
    slide: str, *others: str, encoder: str = "resnet50_block3", weights: str = "", runs: int = 1, rounds: int = 5
) -> None:
    """Print every goal beside what was measured, in one run; memory of ``slide`` and the others."""
    rows = measure_speed(slide, encoder, weights, "auto", runs)
    rows[1:1] = measure_encoder(encoder, weights, rounds)
    rows += measure_memory(*others, slide)
    print_table(rows)


def print_table(rows: Rows) -> None:
    """Print goals and measured values side by side."""
    print("\n| | goal | measured |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def measure_speed(slide: str, encoder: str, weights: str, runtime: str, runs: int) -> Rows:
    """Print all seconds; give the ratios."""
    patches = len(find_grid(slide))
    with tempfile.TemporaryDirectory() as folder:
        if not weights and encoder == "resnet50_block3":
            weights = str(write_random_resnet50(Path(folder)))
        arguments = {"slide": slide, "encoder": encoder, "weights": weights, "runtime": runtime}
        seconds: dict[str, list[float]] = {name: [] for name in MEASURED}
        for _ in range(runs):
            for name, (_function, environment) in MEASURED.items():
                seconds[name].append(_measure(name, arguments, environment))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{Path(slide).name}, {patches} patches, {encoder}, runtime {runtime}, {runs} runs\n")
    print("| | s, median | patches/s | runs |\n|---|---|---|---|")
    for name, values in seconds.items():
        listed = " ".join(f"{value:.2f}" for value in values)
        print(f"| {name} | {median[name]:.2f} | {patches / median[name]:.1f} | {listed} |")
    return [(goal.text, goal.goal, f"{median[goal.over] / median[goal.under]:.2f}x") for goal in SPEED_GOALS]


def measure_encoder(encoder: str, weights: str, rounds: int) -> Rows:
    """The encoder's ratios: the fastest runtime of each precision against both ways of eager PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(weights) if weights else None
        if path is None and encoder == "resnet50_block3":
            path = write_random_resnet50(Path(folder))
        workers = take_turns(lay_rows(encoder, path), rounds=rounds, batch=BATCH)
    installed, kept, *ours = workers
    return [row for precision in ENCODER_GOALS for row in _compare_encoder(precision, installed, kept, ours)]


def _compare_encoder(precision: str, installed: Worker, kept: Worker, ours: list[Worker]) -> Rows:
    """The two rows of a precision; where the processor has no bfloat16, they say so."""
    against_installed, against_kept = ENCODER_GOALS[precision]
    # bfloat16 allowed: what is faster in float32 still counts
    allowed = [worker for worker in ours if worker.row.precision in ("float32", precision)]
    best = min(allowed, key=lambda worker: statistics.median(worker.seconds))
    name = f"encoder, {precision} allowed, in {best.row.runtime} {best.row.precision}: against eager"
    return [
        (f"{name} as installed", against_installed, f"{ratio(installed, best):.2f}x"),
        (f"{name} with buffers kept", against_kept, f"{ratio(kept, best):.2f}x"),
    ]


def preparing(patches: int = 4096, runs: int = 3) -> None:
    """Print how long the forms of the patch stage take, their start included."""
    print("| regions | patches | torch, s | DALI, s |\n|---|---|---|---|")
    for side_px in (256, 218, 437):
        for count in (patches // 4, patches):
            seconds = [[_prepare_once(form, count, side_px) for form in ("torch", "dali")] for _ in range(runs)]
            torch_s, dali_s = (statistics.median(values) for values in zip(*seconds, strict=True))
            print(f"| {side_px} px to 256 px | {count} | {torch_s:.2f} | {dali_s:.2f} |")


def _prepare_once(form: str, count: int, side_px: int) -> float:
    return _measure("preparing", {"form": form, "count": str(count), "side_px": str(side_px)}, {})


def prepare_regions(form: str, count: str, side_px: str) -> float:
    """One form of the patch stage, its start included."""
    keep_large_buffers()
    regions = np.random.default_rng(0).integers(0, 256, (BATCH, int(side_px), int(side_px), 3), dtype=np.uint8)
    spec = find_encoder("resnet50_block3")
    started = time.perf_counter()
    batches = choose_patch_batches(form)(
        (regions for _ in range(int(count) // BATCH)),
        patch_side_px=256,
        mean=spec.mean,
        deviation=spec.deviation,
        batch_size=BATCH,
    )
    for _batch in batches:
        pass
    return time.perf_counter() - started


def memory(*slides: str, encoder: str = "efficientnet_lite0", runtime: str = "torch") -> None:
    """Print the memory of embedding slides, reading processes included, on top of the encoder's own."""
    print_table(measure_memory(*slides, encoder=encoder, runtime=runtime))


def measure_memory(*slides: str, encoder: str = "efficientnet_lite0", runtime: str = "torch") -> Rows:
    """Peaks of embedding slides over that of the encoder alone, and how much they rise from slide to slide."""
    alone = _peak_mb("encoder_loop", "", encoder, runtime)[1]
    rows: Rows = []
    peaks: list[float] = []
    for slide in slides:
        patches, peak = _peak_mb("embed_once", slide, encoder, runtime)
        peaks.append(peak)
        name = f"memory on top of {encoder} alone ({alone:.0f} MB): {Path(slide).name}, {patches} patches"
        rows.append((name, f"at most {MEMORY_GOAL_MB} MB", f"{peak - alone:.0f} MB"))
    if len(peaks) > 1:
        rows.append(("largest difference between these slides", "flat", f"{max(peaks) - min(peaks):.0f} MB"))
    return rows


def encoder_loop(slide: str, encoder: str, runtime: str) -> int:
    """What the encoder takes by itself."""
    keep_large_buffers()
    ready = load(encoder, "", runtime)
    for _ in range(20):
        ready.encode(torch.zeros(BATCH, 3, 256, 256))
    return 0


def embed_once(slide: str, encoder: str, runtime: str) -> int:
    """One slide, the whole way."""
    keep_large_buffers()
    run = EmbeddingRun(load(encoder, "", runtime), SETTINGS, assume_mpp=MPP)
    with tempfile.TemporaryDirectory() as folder:
        (done,) = embed_slides({Path(slide): Path(folder) / "slide.h5"}, run)
    return done.patches


def _peak_mb(what: str, slide: str, encoder: str, runtime: str) -> tuple[int, float]:
    """What a process gives, and the largest sum of its and its children's proportional memory."""
    command = [sys.executable, __file__, what, slide or "none", encoder, runtime]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _tree_mb(process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        return int(process.stdout.read().split()[-1]), peak


def _tree_mb(pid: int) -> float:
    total = 0.0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += _tree_mb(int(child))
    except OSError:
        return total
    return total


def _measure(name: str, arguments: dict[str, str], environment: dict[str, str]) -> float:
    command = [sys.executable, __file__, "measure", json.dumps({"name": name, **arguments})]
    finished = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    return float(finished.stdout.split()[-1])


def measure(what: dict[str, str]) -> float:
    """Run one of the measured things; for this command's own use."""
    arguments = dict(what)
    name = arguments.pop("name")
    function = prepare_regions if name == "preparing" else MEASURED[name][0]
    return function(**arguments)


COMMANDS = (goals, speed, preparing, memory, measure, encoder_loop, embed_once)

if __name__ == "__main__":
    Fire({command.__name__: command for command in COMMANDS})
