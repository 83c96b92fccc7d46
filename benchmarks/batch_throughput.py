"""A batch of slides, the whole way, against the encoder alone on the same patches.

    python benchmarks/batch_throughput.py --source gallery19_20x.tif [--slides FOLDER] [--count 20] [--rounds 3]
        [--encoders efficientnet_lite0,resnet50_block3] [--batch 16]

The batch is what `s4mil batch run` does: its scheduler, its ledger (SQLite), a scoring process, results published
with pictures, report and provenance. "batch" is the time from the first slide's claim, with the model loaded, to
the last result published, as the ledger has it. "encoder" embeds the very patches of these slides from memory, in
batches of the same size, in a process of its own whose threads spin while they wait, as installed (those of a
scoring process do not); one slide is in memory at a time, and only `Encoder.encode` is counted. Both in turn, so
that a machine whose speed drifts treats them alike: a ratio is that of the best of each, and every round's own is
printed too. CPU seconds of the encoder hold its spinning.

Slides are crops of `--source`, of differing sizes, read as 0.5 µm/px; or those of `--slides`. Slide models are
untrained, ResNet50's weights random: neither changes the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
import torch
import yaml
from encoders import write_random_resnet50
from fire import Fire
from numpy.typing import NDArray

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.batch.ledger import Ledger
from s4mil_monai.batch.site import new_run, open_ledger, read_checked_site
from s4mil_monai.batch.states import JobState
from s4mil_monai.features.encoder import load_encoder
from s4mil_monai.features.patch_stream import stream_patches
from s4mil_monai.features.prepare import prepare_slide
from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.bundle import BundleSettings, NetworkSettings, WeightsSettings, ship_weights
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.models.seal import seal_bundle
from s4mil_monai.result import EncoderRecord, PatchSettings
from s4mil_monai.slides.isolation import open_isolated
from s4mil_monai.slides.pyramid import write_pyramid

MPP = 0.5
LEAST_SIDE_PX, MOST_SIDE_PX = 3200, 6300
"""Sides of the crops: about 150 to 600 patches of 256 px."""


# What runs


@dataclass(frozen=True)
class BatchRun:
    """One batch, from an empty ledger to the last result."""

    loading_s: float
    """Python's start, imports and the model, in the scoring process."""
    seconds: float
    cpu_s: float
    """Of the scoring process, those that read for it, and the scheduler; where other programs run beside it, they
    make it wait and leave this as it is."""
    idle_share: float
    """Of all cores of the machine, while it ran."""
    busy_s: dict[str, float]
    """By stage, added up over the slides; stages overlap."""
    patches: int


def run_batch(site_file: Path) -> BatchRun:
    """Score the site's slides as ``s4mil batch run`` does."""
    site = read_checked_site(site_file, default_bundle=Path)
    ledger = open_ledger(site.settings)
    executor = site.make_executor()
    started = time.perf_counter()
    executor.start()
    loading_s = time.perf_counter() - started
    before, used_s = _cpu_times(), _cpu_of_tree_s(os.getpid())
    done = site.make_scheduler(ledger, executor, run=new_run()).run(threading.Event())
    after, used_s = _cpu_times(), _cpu_of_tree_s(os.getpid()) - used_s
    executor.stop()
    if done.exit_code or not done.outcomes:
        raise RuntimeError(f"the batch was not scored: {done.problems or done.stopped}")
    return BatchRun(loading_s, _span_s(ledger), used_s, _idle_share(before, after), *_add_up(ledger))


def _span_s(ledger: Ledger) -> float:
    """From the first claim to the last result published."""
    history = ledger.history()
    begun = min(line.at for line in history if line.after is JobState.RUNNING)
    return max(line.at for line in history if line.after is JobState.PUBLISHED) - begun


def _add_up(ledger: Ledger) -> tuple[dict[str, float], int]:
    busy: Counter[str] = Counter()
    patches = 0
    for job in ledger.jobs():
        assert job.summary is not None
        busy.update(job.summary["seconds"])
        patches += job.summary["patches"]
    return dict(busy), patches


def _cpu_times() -> tuple[float, float]:
    """Seconds that all cores were idle, and all seconds, since the machine started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def _cpu_of_tree_s(pid: int) -> float:
    """CPU seconds of a process and all below it that run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    used_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = [task.joinpath("children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    return used_s + sum(_cpu_of_tree_s(int(child)) for found in children for child in found)


def _idle_share(before: tuple[float, float], after: tuple[float, float]) -> float:
    return (after[0] - before[0]) / (after[1] - before[1])


def encoder_alone(site_file: str) -> None:
    """Print the seconds the encoder takes for all slides of the site, its CPU seconds, and how many patches."""
    keep_large_buffers()
    site = read_checked_site(Path(site_file), default_bundle=Path)
    name = json.loads((site.bundle / "configs" / "metadata.json").read_text())["s4mil"]["encoder"]["name"]
    encoder = load_encoder(name, weights=site.settings.encoder_weights)
    folder = site.settings.sources[0].folder
    assert folder is not None
    encoder.encode(torch.zeros(site.settings.batch_size, 3, 256, 256))
    seconds, cpu_s, patches = 0.0, 0.0, 0
    for path in sorted(folder.iterdir()):
        with open_isolated(path) as slide:
            prepared = prepare_slide(slide, PatchSettings())
            stream = stream_patches(
                prepared,
                encoder.spec,
                device=encoder.device,
                patch_stage="torch",
                batch_size=site.settings.batch_size,
            )
            batches = [batch.patches for batch in stream]
            prepared.fingerprint.result()
        started, used_s = time.perf_counter(), time.process_time()
        for batch in batches:
            encoder.encode(batch)
        seconds += time.perf_counter() - started
        cpu_s += time.process_time() - used_s
        patches += sum(map(len, batches))
    print(seconds, cpu_s, patches)


@dataclass(frozen=True)
class EncoderRun:
    """The encoder on the patches of all slides."""

    seconds: float
    cpu_s: float
    patches: int


def _measure_encoder(site_file: Path) -> EncoderRun:
    command = [sys.executable, __file__, "encoder_alone", str(site_file)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, cpu_s, patches = finished.stdout.split()[-3:]
    return EncoderRun(float(seconds), float(cpu_s), int(patches))


# What it runs on


def cut_slides(source: Path, folder: Path, count: int) -> None:
    """Cut ``count`` slides of differing sizes from one, mirrored now and then, each with other pixels."""
    folder.mkdir(parents=True)
    with openslide.OpenSlide(source) as opened:
        width, height = opened.dimensions
        picture = np.asarray(opened.read_region((0, 0), 0, (width, height)).convert("RGB"))
    chance = np.random.default_rng(0)
    for number, side_px in enumerate(np.linspace(LEAST_SIDE_PX, MOST_SIDE_PX, count).astype(int)):
        write_pyramid(_crop(picture, side_px, chance), folder / f"slide_{number:02}.tif", mpp=MPP)


def _crop(picture: NDArray[np.uint8], side_px: int, chance: np.random.Generator) -> NDArray[np.uint8]:
    top, left = (int(chance.integers(0, size - side_px + 1)) for size in picture.shape[:2])
    crop = picture[top : top + side_px, left : left + side_px]
    return np.ascontiguousarray(crop[:: chance.choice([1, -1]), :: chance.choice([1, -1])])


def make_bundle(folder: Path, encoder: str, weights: Path | None) -> Path:
    """A sealed bundle for an encoder, of the published size, untrained."""
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps({"name": f"untrained-{encoder}"}))
    loaded = load_encoder(encoder, weights=weights)
    network = NetworkSettings(in_features=loaded.spec.width, classes=2)
    torch.manual_seed(0)
    trained = folder.with_suffix(".pt")
    torch.save(SlideLogits(S4MIL(**network.model_dump())).state_dict(), trained)
    settings = BundleSettings(
        classes=("normal", "tumour"),
        network=network,
        encoder=EncoderRecord(name=encoder, sha256=loaded.fingerprint, width=loaded.spec.width),
        patches=PatchSettings(),
        weights=WeightsSettings(path="models/model.pt", sha256=""),
    )
    ship_weights(folder, trained, settings)
    seal_bundle(folder)
    return folder


def write_site(folder: Path, slides: Path, bundle: Path, weights: Path | None, batch: int) -> Path:
    """Settings of one run, with folders of its own."""
    folder.mkdir()
    settings = {
        "sources": [{"folder": str(slides)}],
        "out": "out",
        "bundle": str(bundle),
        "device": "cpu",
        "batch_size": batch,
        "settle_s": 0,
        **({"encoder_weights": str(weights)} if weights else {}),
    }
    file = folder / "site.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


# The table


def main(
    source: str = "",
    slides: str = "",
    count: int = 20,
    rounds: int = 3,
    encoders: str | tuple[str, ...] = ("efficientnet_lite0", "resnet50_block3"),
    batch: int = 16,
) -> None:
    """Print one table an encoder."""
    if not slides and not source:
        raise SystemExit("give --source, a slide to cut others from, or --slides, a folder")
    names = encoders.split(",") if isinstance(encoders, str) else encoders
    print(
        f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads, batches of {batch}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not slides:
            cut_slides(Path(source), folder / "slides", count)
        for encoder in names:
            compare(encoder, Path(slides).absolute() if slides else folder / "slides", folder, rounds, batch)


def compare(encoder: str, slides: Path, folder: Path, rounds: int, batch: int) -> None:
    """Run batch and encoder in turn, and print what came of it."""
    weights = write_random_resnet50(folder) if encoder == "resnet50_block3" else None
    bundle = make_bundle(folder / f"bundle-{encoder}", encoder, weights)
    batches: list[BatchRun] = []
    alone: list[EncoderRun] = []
    for number in range(rounds):
        site = write_site(folder / f"{encoder}-{number}", slides, bundle, weights, batch)
        alone.append(_measure_encoder(site))
        batches.append(run_batch(site))
        if batches[-1].patches != alone[-1].patches:
            raise RuntimeError(f"the batch has read {batches[-1].patches} patches, not {alone[-1].patches}")
        print(f"  round {number}: {batches[-1].seconds:.1f} : {alone[-1].seconds:.1f} s", file=sys.stderr)
    print_table(encoder, len(list(slides.iterdir())), batches, alone)


def print_table(encoder: str, slides: int, batches: list[BatchRun], alone: list[EncoderRun]) -> None:
    """The times, their ratio, and where the best batch spent its time."""
    best = min(batches, key=lambda run: run.seconds)
    best_alone = min(alone, key=lambda run: run.seconds)
    pairs = list(zip(batches, alone, strict=True))
    print(f"\n{encoder}: {slides} slides, {best.patches} patches\n")
    print("| | best | all rounds |\n|---|---|---|")
    print(f"| batch, s | {best.seconds:.1f} | {' '.join(f'{run.seconds:.1f}' for run in batches)} |")
    print(f"| encoder alone, s | {best_alone.seconds:.1f} | {' '.join(f'{run.seconds:.1f}' for run in alone)} |")
    ratios = " ".join(f"{run.seconds / other.seconds:.2f}" for run, other in pairs)
    print(f"| **batch : encoder** | **{best.seconds / best_alone.seconds:.2f}** | {ratios} |")
    ratios = " ".join(f"{run.cpu_s / other.cpu_s:.2f}" for run, other in pairs)
    print(f"| the same in CPU seconds | {best.cpu_s / best_alone.cpu_s:.2f} | {ratios} |")
    print(f"| CPU seconds, batch : encoder | {best.cpu_s:.1f} : {best_alone.cpu_s:.1f} | |")
    print(f"| loading the model before it, s | {best.loading_s:.1f} | |")
    print(f"| cores idle during the batch | {best.idle_share:.0%} | |")
    for stage, seconds in best.busy_s.items():
        if stage != "total":  # overlaps with that of other slides
            print(f"| busy: {stage}, s | {seconds:.1f} | |")


if __name__ == "__main__":
    Fire({"main": main, "encoder_alone": encoder_alone}) if sys.argv[1:2] == ["encoder_alone"] else Fire(main)
