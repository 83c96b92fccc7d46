"""What becomes of damaged and hostile slides: nothing may crash, hang, or be scored silently.

    python benchmarks/fuzz.py [SLIDE ...] [--mutations 2000] [--seed 0]

Each mutation takes a slide, damages a copy, and sends it through everything before the encoder: opening in a
process of its own, resolution, tissue, grid, quality, reading every patch, comparison with the overview.
Without a SLIDE the demonstration slide is taken. Outcomes:

- a named error: the slide is refused, with one line;
- flagged: it would be scored, with a finding, a note or left-out patches that the sound slide does not have;
- same: every patch is what it was, so the damage lies where it does not matter;
- changed, warned: a block of a patch differs from what it was by more than 2 grey levels, on a slide of one level
  whose result always says that such damage would go unnoticed;
- changed unnoticed: the same on a slide with coarser levels to compare with. Below the tolerance of that
  comparison (32 of 255 for a block of 64 x 64 px) no reader can tell it from tissue.

Leaves with 1 if anything else happened: an unexpected exception, or a mutation that took longer than its limits.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from fire import Fire
from numpy.typing import NDArray

from s4mil_monai.demo import MPP, draw_demo_slide
from s4mil_monai.errors import SlideError
from s4mil_monai.features.encoder import find_encoder
from s4mil_monai.features.extract import block_colours
from s4mil_monai.features.patch_stream import check_damage, stream_patches
from s4mil_monai.features.prepare import NOTHING_TO_COMPARE, PreparedSlide, prepare_slide
from s4mil_monai.result import PatchSettings
from s4mil_monai.slides.damage import ColourCheck
from s4mil_monai.slides.isolation import ReaderPool, open_isolated
from s4mil_monai.slides.limits import DEFAULT_LIMITS
from s4mil_monai.slides.pyramid import write_pyramid

LIMITS = replace(DEFAULT_LIMITS, opening_s=20.0, reading_s=5.0)
"""As in use, but less patient: thousands of slides are waiting."""

LONGEST_S = 120.0
"""A mutation that takes longer hangs."""

HEADER_BYTES = 4096
"""Where directories of most files begin, or end: damage there is the most dangerous."""

UNNOTICED_GREY = 2.0
"""Differences of a block's mean colour up to this are none."""

SETTINGS = PatchSettings(min_tissue=0.1)

Mutation = Callable[[bytearray, np.random.Generator], None]


def flip_bits(data: bytearray, generator: np.random.Generator) -> None:
    """Flip one to 64 bits anywhere."""
    for at in generator.integers(0, len(data), 2 ** generator.integers(0, 7)):
        data[at] ^= 1 << generator.integers(0, 8)


def flip_header_bits(data: bytearray, generator: np.random.Generator) -> None:
    """Flip one to 16 bits where directories lie."""
    size = min(HEADER_BYTES, len(data) // 2)
    for at in generator.integers(-size, size, 2 ** generator.integers(0, 5)):
        data[at] ^= 1 << generator.integers(0, 8)


def overwrite_words(data: bytearray, generator: np.random.Generator) -> None:
    """Write extreme numbers over counts, offsets and sizes where directories lie."""
    size = min(HEADER_BYTES, len(data) // 2) // 4
    for word in generator.integers(-size, size, generator.integers(1, 5)):
        at = (word * 4) % (len(data) - 4)
        value = generator.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, len(data), 8, 65535])
        data[at : at + 4] = int(value).to_bytes(4, "little")


def cut_short(data: bytearray, generator: np.random.Generator) -> None:
    """End the file early."""
    del data[generator.integers(0, len(data)) :]


def blank_a_stretch(data: bytearray, generator: np.random.Generator) -> None:
    """Zeros or ones over a stretch, as a copy over a bad line or a bad disk leaves them."""
    length = int(min(len(data) // 2, 2 ** generator.integers(4, 18)))
    at = int(generator.integers(0, len(data) - length))
    data[at : at + length] = bytes([generator.choice([0, 255])]) * length


def swap_stretches(data: bytearray, generator: np.random.Generator) -> None:
    """Exchange two stretches of a file."""
    length = int(min(len(data) // 4, 2 ** generator.integers(4, 16)))
    a, b = sorted(int(at) for at in generator.integers(0, len(data) - length, 2))
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]


def add_noise(data: bytearray, generator: np.random.Generator) -> None:
    """Random bytes over a stretch."""
    length = int(min(len(data) // 2, 2 ** generator.integers(2, 14)))
    at = int(generator.integers(0, len(data) - length))
    data[at : at + length] = generator.bytes(length)


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    flip_header_bits,
    overwrite_words,
    cut_short,
    blank_a_stretch,
    swap_stretches,
    add_noise,
)


@dataclass(frozen=True)
class Outcome:
    """What became of one slide."""

    kind: str
    """Name of the error, ``scored``, ``flagged``, ``same``, ``changed unnoticed``; ``bug`` or ``hang``."""
    text: str = ""
    notes: frozenset[str] = frozenset()
    """Everything a reader of the result would be told."""
    patches: dict[tuple[int, int], NDArray[np.float32]] = field(default_factory=dict)
    """(3, 4, 4) mean colours of the blocks of every sound patch by corner, of 255."""


def look_at(path: Path, pool: ReaderPool) -> Outcome:
    """Send one slide through everything before the encoder."""
    try:
        with open_isolated(path, assume_mpp=MPP, pool=pool) as slide:
            return _read_all(prepare_slide(slide, SETTINGS))
    except SlideError as error:
        return Outcome(type(error).__name__, str(error))
    except Exception:  # noqa: BLE001 — this is what is looked for
        return Outcome("bug", traceback.format_exc())


def _read_all(prepared: PreparedSlide) -> Outcome:
    spec = find_encoder("efficientnet_lite0")
    check = ColourCheck(prepared.tissue.overview, prepared.grid)
    corners = [(x, y) for x, y in prepared.grid.top_left_px0.tolist()]
    patches: dict[tuple[int, int], NDArray[np.float32]] = {}
    damaged = 0
    for batch in stream_patches(prepared, spec, device=torch.device("cpu"), patch_stage="torch", batch_size=16):
        colours = block_colours(batch.patches, spec)
        sound = batch.sound & ~check.disagreeing(batch.start, colours) if check.possible else batch.sound
        damaged += int((~sound).sum())
        check_damage(prepared, damaged)
        patches |= {corners[batch.start + i]: colours[i] for i in np.flatnonzero(sound)}
    notes = {*prepared.slide.notes, *(finding.text for finding in prepared.quality.findings)}
    notes |= {f"passed over {reason}" for reason in prepared.slide.passed_over}
    notes |= {f"{damaged} damaged patches"} if damaged else set()
    return Outcome("scored", notes=frozenset(notes), patches=patches)


def compare(found: Outcome, sound: Outcome) -> Outcome:
    """Tell changes that are flagged, those that nobody notices, and none."""
    if found.kind != "scored":
        return found
    if new := found.notes - sound.notes:
        return Outcome("flagged", "; ".join(sorted(new)))
    changed = "changed, warned" if NOTHING_TO_COMPARE in found.notes else "changed unnoticed"
    if others := len(sound.patches.keys() ^ found.patches.keys()):
        return Outcome(changed, f"{others} patches more or less than {len(sound.patches)}")
    most = max(float(np.abs(colours - sound.patches[at]).max()) for at, colours in found.patches.items())
    return (
        Outcome(changed, f"a block of a patch differs by {most:.1f} of 255")
        if most > UNNOTICED_GREY
        else Outcome("same")
    )


def fuzz(slides: Sequence[Path], *, mutations: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Give the name of each mutation, and what became of the slide it was done to."""
    pool = ReaderPool(limits=LIMITS)
    try:
        sound = {path: look_at(path, pool) for path in slides}
        with tempfile.TemporaryDirectory() as folder:
            for number in range(mutations):
                original = slides[number % len(slides)]
                mutation = MUTATIONS[number // len(slides) % len(MUTATIONS)]
                path = Path(folder) / f"{number}{original.suffix}"
                _mutate(original, path, mutation, np.random.default_rng((seed, number)))
                started = time.perf_counter()
                outcome = compare(look_at(path, pool), sound[original])
                seconds = time.perf_counter() - started
                if seconds > LONGEST_S:
                    outcome = Outcome("hang", f"{seconds:.0f} s, then {outcome.kind}: {outcome.text}")
                yield f"{number} {mutation.__name__} {original.name}", outcome
                path.unlink()
    finally:
        pool.close()


def _mutate(original: Path, path: Path, mutation: Mutation, generator: np.random.Generator) -> None:
    data = bytearray(original.read_bytes())
    mutation(data, generator)
    path.write_bytes(data)


def main(
    *slides: str, mutations: int = 2000, seed: int = 0, show: str | tuple[str, ...] = "bug,hang,changed unnoticed"
) -> None:
    """Print the outcomes that were asked for as they come, and how many there were of each in the end."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(slide) for slide in slides] or [
            write_pyramid(draw_demo_slide(), Path(folder) / "demo.tif", mpp=MPP)
        ]
        started = time.perf_counter()
        counts: Counter[str] = Counter()
        shown = show.split(",") if isinstance(show, str) else show  # fire makes a tuple of names with commas
        for name, outcome in fuzz(paths, mutations=mutations, seed=seed):
            counts[outcome.kind] += 1
            if outcome.kind in shown:
                print(f"{name}: {outcome.kind}: {outcome.text}", flush=True)
    print(f"\n{mutations} mutations of {len(paths)} slides, {time.perf_counter() - started:.0f} s\n")
    print("| outcome | mutations |\n|---|---|")
    for kind, count in counts.most_common():
        print(f"| {kind} | {count} |")
    sys.exit(1 if counts["bug"] or counts["hang"] else 0)


if __name__ == "__main__":
    Fire(main)
