"""compare(): whether the slides of late are still like those of the reference.

A verdict needs both size and evidence. Size is the population stability index

    PSI = sum over bins of (recent - reference) * ln(recent / reference)

of the shares of slides in the reference's quantile bins (an empty bin counts as half a slide), with the customary
limits 0.1 and 0.25 (Lewis, An Introduction to Credit Scoring, 1994). These are for thousands of values. Without
any change PSI is, for n reference and m recent slides and B bins, (1/n + 1/m) times a chi-square of B - 1 degrees
of freedom (Yurdakul and Naranjo, J Risk Model Validation 14(4), 2020): of 100 and 50 slides it is above 0.25 more
often than not. Its mean (B - 1)(1/n + 1/m) is therefore taken away before it is held against the limits.

Evidence is the two-sample Kolmogorov-Smirnov test, its p-values adjusted by Holm for the number of measures, which
holds however the measures depend on each other. So without change the chance that a comparison of all measures
says ``watch`` or more is at most ``watch_p``, however few the slides; ``drift`` at most ``drift_p``. That is per
look, and for slides that do not depend on each other: several slides of a patient make alarms more frequent.

What is found: of 15 normal measures and 100 reference slides, one that moved by 1.5 standard deviations gives an
alarm nearly always within 30 slides, one that moved by 1 in seven of ten, and always within 100. One that only
varies twice as much is mostly missed, even with 300 and 100 slides: the test looks for shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.stats import ks_2samp

from s4mil_monai.measures import SlideMeasures
from s4mil_monai.statistics.comparisons import adjust_holm
from s4mil_monai.statistics.drift_reference import DriftReference, MeasureReference, values_of

DriftVerdict = Literal["too_few", "stable", "watch", "drift"]
SEVERITY: dict[DriftVerdict, int] = {"too_few": 0, "stable": 1, "watch": 2, "drift": 3}

EMPTY_BIN = 0.5
"""Slides that an empty bin counts as: PSI would be infinite, and half a slide is the least that was not seen."""


class DriftSettings(BaseModel):
    """When a measure is said to have drifted."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    watch_psi: float = Field(default=0.1, gt=0)
    """PSI beyond chance from which on a measure is watched: normal values moved by a third of their deviation."""
    drift_psi: float = Field(default=0.25, gt=0)
    """The same for drift: by half their deviation."""
    watch_p: float = Field(default=0.01, gt=0, lt=1)
    """Adjusted p-value below which a measure is watched. With a comparison a night of slides that are new each
    time, there are at most four false ones a year."""
    drift_p: float = Field(default=0.001, gt=0, lt=1)
    """The same for drift: at most one false one in three years."""
    least_slides: int = Field(default=20, ge=5)
    """Recent slides with fewer of which nothing is said."""

    @model_validator(mode="after")
    def _drift_is_more(self) -> DriftSettings:
        if self.drift_psi < self.watch_psi or self.drift_p > self.watch_p:
            raise ValueError("drift needs a PSI of watch_psi or more and a p-value of watch_p or less")
        return self


class DriftFinding(BaseModel):
    """What became of one measure."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    measure: str
    """Field of :class:`SlideMeasures`."""
    verdict: DriftVerdict
    slides: int
    """Recent ones that have the measure."""
    wanted: int
    """Fewest that are compared."""
    reference_slides: int
    median: float | None = None
    """Of the recent slides; this and all below None where there are too few."""
    reference_median: float
    psi: float | None = None
    """As it is, chance included."""
    psi_by_chance: float | None = None
    """What it would be on average without any change."""
    ks: float | None = None
    """Largest difference of the two cumulative shares, 0 to 1."""
    ks_p: float | None = None
    """Of this measure alone."""
    ks_p_adjusted: float | None = None
    """By Holm, for all measures compared."""


def compare(
    reference: DriftReference | None, recent: Sequence[SlideMeasures], settings: DriftSettings | None = None
) -> list[DriftFinding]:
    """Hold recent slides against the reference, measure by measure.

    Args:
        reference: Of the model that scored the slides; None where the bundle has none.
        recent: Of the same model; one slide each.
        settings: When a measure is said to have drifted.

    Returns:
        One finding for each measure of the reference, in its order; none without a reference.
    """
    if reference is None:
        return []
    settings = settings or DriftSettings()
    measured = [
        _measure(name, known, values_of(recent, name), settings) for name, known in reference.measures.items()
    ]
    adjusted = adjust_holm([np.nan if finding.ks_p is None else finding.ks_p for finding in measured])
    return [_judge(finding, float(p), settings) for finding, p in zip(measured, adjusted, strict=True)]


def population_stability(reference: ArrayLike, recent: ArrayLike) -> float:
    """PSI of two distributions over the same bins.

    Args:
        reference: (B,) counts.
        recent: (B,) counts.
    """
    before, now = np.asarray(reference, np.float64), np.asarray(recent, np.float64)
    p, q = np.maximum(before, EMPTY_BIN) / before.sum(), np.maximum(now, EMPTY_BIN) / now.sum()
    return float(((q - p) * np.log(q / p)).sum())


def stability_by_chance(reference: ArrayLike, recent: ArrayLike) -> float:
    """Mean of PSI where both counts are of one distribution; bins empty on both sides do not count."""
    before, now = np.asarray(reference), np.asarray(recent)
    bins = int(((before > 0) | (now > 0)).sum())
    return float((bins - 1) * (1 / before.sum() + 1 / now.sum()))


def _measure(name: str, known: MeasureReference, values: np.ndarray, settings: DriftSettings) -> DriftFinding:
    finding = DriftFinding(
        measure=name,
        verdict="too_few",
        slides=len(values),
        wanted=settings.least_slides,
        reference_slides=known.slides,
        reference_median=float(np.median(known.sample)),
    )
    if len(values) < settings.least_slides:
        return finding
    counts = known.count(values)
    test: Any = ks_2samp(known.sample, values)
    found = {
        "median": float(np.median(values)),
        "psi": population_stability(known.counts, counts),
        "psi_by_chance": stability_by_chance(known.counts, counts),
        "ks": float(test.statistic),
        "ks_p": float(test.pvalue),
    }
    return finding.model_copy(update=found)


def _judge(finding: DriftFinding, p: float, settings: DriftSettings) -> DriftFinding:
    if finding.psi is None or finding.psi_by_chance is None:
        return finding
    beyond_chance = finding.psi - finding.psi_by_chance
    verdict: DriftVerdict = "stable"
    if beyond_chance >= settings.drift_psi and p <= settings.drift_p:
        verdict = "drift"
    elif beyond_chance >= settings.watch_psi and p <= settings.watch_p:
        verdict = "watch"
    return finding.model_copy(update={"verdict": verdict, "ks_p_adjusted": p})


def worst_verdict(findings: Sequence[DriftFinding]) -> DriftVerdict | Literal["no_reference"]:
    """The verdict on all measures together."""
    verdicts: list[DriftVerdict] = [finding.verdict for finding in findings]
    if not verdicts:
        return "no_reference"
    return max(verdicts, key=SEVERITY.__getitem__)


def describe_drift(findings: Sequence[DriftFinding]) -> str:
    """One line for the report of a run."""
    worst = worst_verdict(findings)
    if worst == "no_reference":
        return "drift: not compared, the bundle has no reference"
    slides = max(finding.slides for finding in findings)
    against = f"{slides} slides against {max(finding.reference_slides for finding in findings)}"
    if worst == "too_few":
        return f"drift: too few slides to tell ({slides}, wanted {findings[0].wanted})"
    if worst == "stable":
        compared = sum(finding.verdict == "stable" for finding in findings)
        return f"drift: stable in {compared} measures, {against}"
    moved = sorted(
        (finding for finding in findings if finding.verdict in ("watch", "drift")),
        key=lambda finding: (-SEVERITY[finding.verdict], finding.ks_p_adjusted),
    )
    return f"drift: {worst}, {against}: {'; '.join(_describe_one(finding) for finding in moved)}"


def _describe_one(finding: DriftFinding) -> str:
    assert finding.psi is not None
    assert finding.psi_by_chance is not None
    return (
        f"{finding.measure} {finding.reference_median:.3g} -> {finding.median:.3g} "
        f"({finding.verdict}, PSI {finding.psi:.2f} of which {finding.psi_by_chance:.2f} by chance, "
        f"p {finding.ks_p_adjusted:.1g})"
    )
