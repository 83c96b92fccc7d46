"""metrics_text(): the state of a site's batch as text that Prometheus reads.

Nothing listens on a port: the text is for a file that node_exporter's textfile collector takes up. Labels are
words of this package (states, decisions, stages, kinds of errors, measures); names of slides and patients are
none, and whatever does not look like such a word is counted as ``other``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from s4mil_monai.statistics.drift import SEVERITY, DriftFinding, worst_verdict

WORD = re.compile(r"(?!.*\d\d)[A-Za-z]\w{0,63}", re.ASCII)
"""What a label may be: no dots, hyphens, spaces, slashes or numbers, which names of files and cases have."""
OTHER = "other"
"""Label of what has none that may be told, such as a library's ``_LinAlgError``."""


@dataclass(frozen=True)
class StageSeconds:
    """How long one stage took, over the slides scored."""

    slides: int
    sum_s: float
    quantiles_s: Mapping[float, float] = field(default_factory=dict)
    """Seconds by quantile (0 to 1)."""


@dataclass(frozen=True)
class BatchSnapshot:
    """What a ledger knows at one moment; times are Unix seconds, None where there was none."""

    jobs: Mapping[str, int]
    """Of the present model and settings, by state, also those of 0: a series that goes is no 0 to Prometheus."""
    earlier_jobs: Mapping[str, int] = field(default_factory=dict)
    """Of other models or settings; what waits there is scored only if they come back."""
    scored: int = 0
    """Slides that were given a score, ever; this and the next two only grow."""
    published: Mapping[str, int] = field(default_factory=dict)
    """By decision (``none`` where the bundle has no calibration), ever."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Tries that failed, by class name of the error, ever."""
    stages: Mapping[str, StageSeconds] = field(default_factory=dict)
    oldest_waiting_s: float | None = None
    """How long the slide that waits longest has waited, of those in ``jobs``."""
    run_started: float | None = None
    """Of the last run."""
    run_ended: float | None = None
    """None while it goes on, too."""
    run_exit: int | None = None
    """Its exit status."""
    drift: tuple[DriftFinding, ...] = ()
    """Empty without a reference."""


def metrics_text(snapshot: BatchSnapshot) -> str:
    """Text in Prometheus' exposition format, of a registry of its own.

    Raises:
        ValueError: A stage is not a word of this package.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(snapshot))
    return generate_latest(registry).decode()


class _Families(Collector):
    """Gives the metrics of one snapshot to a registry."""

    def __init__(self, snapshot: BatchSnapshot):
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        yield from _describe_jobs(self._snapshot)
        yield from _describe_stages(self._snapshot)
        yield from _describe_run(self._snapshot)
        yield from _describe_drift(self._snapshot.drift)


def _describe_jobs(snapshot: BatchSnapshot) -> Iterator[Metric]:
    yield _gauge("s4mil_jobs", "Jobs of the present model by state.", "state", snapshot.jobs)
    yield _gauge("s4mil_earlier_jobs", "Jobs of earlier models by state.", "state", snapshot.earlier_jobs)
    yield CounterMetricFamily("s4mil_slides_scored", "Slides that were given a score.", snapshot.scored)
    yield _counter("s4mil_slides_published", "Results published, by decision.", "decision", snapshot.published)
    yield _counter("s4mil_slide_failures", "Tries that failed, by kind of error.", "kind", snapshot.failures)
    yield from _lone_gauge(
        "s4mil_oldest_waiting_seconds",
        "How long the slide that waits longest has waited.",
        snapshot.oldest_waiting_s,
    )


def _describe_stages(snapshot: BatchSnapshot) -> Iterator[Metric]:
    family = SummaryMetricFamily("s4mil_stage_seconds", "Seconds a slide spent in a stage.", labels=["stage"])
    for stage, seconds in snapshot.stages.items():
        for quantile, value in sorted(seconds.quantiles_s.items()):
            family.add_sample(family.name, {"stage": _word(stage), "quantile": f"{quantile:g}"}, value)
        family.add_metric([_word(stage)], seconds.slides, seconds.sum_s)
    yield family


def _describe_run(snapshot: BatchSnapshot) -> Iterator[Metric]:
    begin, end = "s4mil_last_run_start_timestamp_seconds", "s4mil_last_run_end_timestamp_seconds"
    yield from _lone_gauge(begin, "When the last run began, Unix time.", snapshot.run_started)
    yield from _lone_gauge(end, "When the last run ended, Unix time.", snapshot.run_ended)
    yield from _lone_gauge("s4mil_last_run_exit_status", "Exit status of the last run.", snapshot.run_exit)


def _describe_drift(findings: tuple[DriftFinding, ...]) -> Iterator[Metric]:
    verdict = GaugeMetricFamily(
        "s4mil_drift_verdict", "1 for the worst verdict on any measure, 0 for the others.", labels=["verdict"]
    )
    worst = worst_verdict(findings)
    for known in ("no_reference", *SEVERITY):
        verdict.add_metric([known], float(known == worst))
    yield verdict
    numbers = {
        "s4mil_drift_level": ("0 too few slides, 1 stable, 2 watch, 3 drift.", _levels(findings)),
        "s4mil_drift_psi": ("Population stability index, chance included.", _column(findings, "psi")),
        "s4mil_drift_psi_by_chance": ("Its mean without any change.", _column(findings, "psi_by_chance")),
        "s4mil_drift_ks_p_value": (
            "Of the Kolmogorov-Smirnov test, adjusted by Holm.",
            _column(findings, "ks_p_adjusted"),
        ),
        "s4mil_drift_slides": ("Recent slides compared.", _column(findings, "slides")),
    }
    for name, (text, values) in numbers.items():
        yield _gauge(name, text, "measure", values)


def _levels(findings: tuple[DriftFinding, ...]) -> dict[str, float]:
    return {finding.measure: SEVERITY[finding.verdict] for finding in findings}


def _column(findings: tuple[DriftFinding, ...], name: str) -> dict[str, float]:
    """A field by measure, where it is known."""
    found = {finding.measure: getattr(finding, name) for finding in findings}
    return {measure: value for measure, value in found.items() if value is not None}


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for word, value in _by_word(values).items():
        family.add_metric([word], value)
    return family


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for word, value in _by_word(values).items():
        family.add_metric([word], value)
    return family


def _lone_gauge(name: str, text: str, value: float | None) -> Iterator[Metric]:
    """Nothing where the value is not known: an absent metric can be alerted on, a made-up one cannot."""
    if value is not None:
        yield GaugeMetricFamily(name, text, value)


def _by_word(values: Mapping[str, float]) -> dict[str, float]:
    """Values by label; those whose label is no word are summed up under ``other``."""
    found: dict[str, float] = {}
    for label, value in values.items():
        word = label if WORD.fullmatch(label) else OTHER
        found[word] = found.get(word, 0) + value
    return found


def _word(label: str) -> str:
    if not WORD.fullmatch(label):
        raise ValueError(f"a label is a word of this package, not {label!r}")
    return label
