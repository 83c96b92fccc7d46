"""Time from command to report against what the encoder alone takes on the same patches.

    python benchmarks/scoring.py SLIDE [SLIDE ...] [--runs 3]

"whole" is `s4mil score SLIDE` from start to finish, a new process each time; "slide to score" is what it says of
itself, without Python's start, imports and the pictures. "encoder" embeds the very patches
of that slide, prepared beforehand, in batches of the same size with the same allocator setting. Both in turn, so
that a machine whose speed drifts treats them alike; medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fire import Fire

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.demo import MPP, draw_demo_slide
from s4mil_monai.features.encoder import Encoder, load_encoder
from s4mil_monai.features.extract import read_ahead
from s4mil_monai.features.patch_batches import torch_batches
from s4mil_monai.result import read_result
from s4mil_monai.slides.grid import lay_grid
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.slides.reader import open_slide
from s4mil_monai.slides.resolution import plan_reading
from s4mil_monai.slides.tissue import find_tissue

BATCH = 16


def main(*slides: str, runs: int = 3) -> None:
    """Print one row a slide; the demonstration slide if none is given."""
    keep_large_buffers()
    encoder = load_encoder("efficientnet_lite0")
    print("| slide | patches | whole, s | slide to score, s | encoder, s | whole : encoder | score : encoder |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(slide) for slide in slides] or [
            write_pyramid(draw_demo_slide(), Path(folder) / "demo.tif", mpp=MPP)
        ]
        for path in paths:
            print(row(path, encoder, Path(folder) / "results", runs))


def row(path: Path, encoder: Encoder, out: Path, runs: int) -> str:
    """One line of the table."""
    batches = prepare(path, encoder)
    whole, scoring, alone = [], [], []
    for _ in range(runs):
        started = time.perf_counter()
        command = [sys.executable, "-m", "s4mil_monai", "score", str(path), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        whole.append(time.perf_counter() - started)
        scoring.append(read_result(out / path.stem / "result.json").seconds["total"])
        started = time.perf_counter()
        for batch in batches:
            encoder.encode(batch)
        alone.append(time.perf_counter() - started)
    a, s, b = (statistics.median(times) for times in (whole, scoring, alone))
    return f"| {path.name} | {sum(map(len, batches))} | {a:.1f} | {s:.1f} | {b:.1f} | {a / b:.2f} | {s / b:.2f} |"


def prepare(path: Path, encoder: Encoder) -> list:
    """All patches of a slide as the encoder takes them."""
    with open_slide(path) as slide:
        grid = lay_grid(find_tissue(slide), plan_reading(slide, mpp=0.5, patch_side_px=256))
        return list(
            torch_batches(
                read_ahead(slide, grid, batch_size=BATCH),
                patch_side_px=256,
                mean=encoder.spec.mean,
                deviation=encoder.spec.deviation,
                batch_size=BATCH,
            )
        )


if __name__ == "__main__":
    Fire(main)
