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
from torch import Tensor

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.demo import MPP, draw_demo_slide
from s4mil_monai.features.encoder import Encoder, load_encoder
from s4mil_monai.features.patch_stream import stream_patches
from s4mil_monai.features.prepare import prepare_slide
from s4mil_monai.result import PatchSettings, read_result
from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.pyramid import write_pyramid

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


def prepare(path: Path, encoder: Encoder) -> list[Tensor]:
    """All patches of a slide as the encoder takes them."""
    with open_isolated(path) as slide:
        prepared = prepare_slide(slide, PatchSettings())
        stream = stream_patches(
            prepared, encoder.spec, device=encoder.device, patch_stage="torch", batch_size=BATCH
        )
        return [batch.patches for batch in stream]


if __name__ == "__main__":
    Fire(main)
