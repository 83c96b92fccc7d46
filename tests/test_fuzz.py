"""Damaged and hostile slides: a named error, a flag, or nothing changed; `benchmarks/fuzz.py` does thousands."""

from __future__ import annotations

from collections import Counter

from benchmarks.fuzz import MUTATIONS, fuzz

ROUNDS = 7


def test_no_damage_crashes_hangs_or_passes_as_a_sound_slide(tissue_slide):
    outcomes = dict(fuzz([tissue_slide], mutations=ROUNDS * len(MUTATIONS), seed=1))
    counts = Counter(outcome.kind for outcome in outcomes.values())
    errors = {"UnreadableSlideError", "DecoderHungError", "NoTissueError", "TooCoarseError"}
    assert counts.keys() <= errors | {"flagged", "same", "changed unnoticed"}, {
        name: outcome.text for name, outcome in outcomes.items() if outcome.kind in ("bug", "hang")
    }
    # each kind has to occur, else the damage misses what it is for
    assert counts["UnreadableSlideError"] >= ROUNDS
    assert counts["flagged"] >= 1
    # 32 of 255 in a block of a patch is what the comparison with coarser levels lets pass
    unnoticed = [outcome.text for outcome in outcomes.values() if outcome.kind == "changed unnoticed"]
    assert len(unnoticed) <= len(outcomes) // 5, unnoticed
