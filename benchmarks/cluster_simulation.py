"""A simulation of many GPUs and a million slides: how long, how busy, what is lost, and what it waits for.

    python benchmarks/cluster_simulation.py [--gpus 1000] [--slides 1000000] [--ledger_jobs_s 64] [--seed 0]

No cluster was run. What is simulated: GPUs in nodes take slides from one ledger and keep one claimed ahead; all
share one storage; nodes fail, come back, and what they had is taken up again. The ledger serves one call after the
other; `--ledger_jobs_s`, how many jobs it brings from added to published in a second, is to be taken from
benchmarks/ledger_scale.py. Storage is shared evenly: where all GPUs together ask for more than it gives, all of
them slow down alike. The first row has neither limits nor failures: its makespan can be checked by hand.

Numbers that are assumed, not measured, are the fields of :class:`Cluster`.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
from fire import Fire
from numpy.typing import NDArray

HOUR_S, DAY_S = 3600.0, 86400.0
CLAIM_SHARE = 0.5
"""Of the ledger's time for a job: adding and claiming it; the rest is publishing."""


@dataclass(frozen=True)
class Cluster:
    """What is assumed."""

    gpus: int = 1000
    gpus_per_node: int = 8
    patches_s: float = 1000
    """That one GPU embeds, reading and preparing kept up with."""
    slide_overhead_s: float = 0.5
    """Between slides, whatever their length."""
    loading_s: float = 60
    """Of a model, at the start and after a failure."""
    storage_bytes_s: float = 100e9
    """All readers together."""
    patch_bytes: float = 50e3
    """Of 512 px squares at 40x, JPEG."""
    tissue_share: float = 0.6
    """Of a file's bytes that are patches; the rest is read only where the file is hashed."""
    hashes: float = 2
    """Times a file is read through: by intake, and by the process that scores it."""
    ledger_jobs_s: float = 64
    """From added to published, if it does nothing else."""
    mtbf_s: float = 30 * DAY_S
    """Of a node."""
    repair_s: float = HOUR_S
    """Until a node is back, and its scheduler takes up what it had."""
    lease_s: float = 120
    every_s: float = 600
    """From one pass of a scheduler to its next; at its begin it takes up what others have left, once their leases
    have ended. As long as there are slides, a pass does not end."""

    @property
    def bytes_per_patch(self) -> float:
        """Read for each patch, its part of the hashing counted."""
        return self.patch_bytes * (1 + self.hashes / self.tissue_share)


@dataclass
class Ledger:
    """One server, first come, first served."""

    free_at: float = 0.0
    busy_s: float = 0.0
    longest_wait_s: float = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When a call that is made now comes back."""
        begun = max(now, self.free_at)
        self.longest_wait_s = max(self.longest_wait_s, begun - now)
        self.free_at = begun + seconds
        self.busy_s += seconds
        return self.free_at


@dataclass
class Gpu:
    """One GPU and what it has."""

    node: int
    is_up: bool = False
    epoch: int = 0
    """Counts failures, so that what was planned before one is dropped."""
    slide: int | None = None
    began_v: float = 0.0
    ahead: deque[tuple[int, float]] = field(default_factory=deque)
    """Claimed slides, and when the claim's answer comes."""


@dataclass
class Outcome:
    """What a simulation gives."""

    makespan_s: float
    useful_gpu_s: float
    lost_gpu_s: float
    failures: int
    slides_lost: int
    ledger: Ledger


class Simulation:
    """Runs one cluster through all slides.

    Work is counted in virtual seconds: those in which storage keeps up with every GPU. All GPUs at work advance
    alike, so one clock serves them all, and a slide's end is known when it begins.
    """

    def __init__(self, cluster: Cluster, patches: NDArray[np.int64], seed: int):
        self._cluster, self._chance = cluster, np.random.default_rng(seed)
        self._work_s = (patches / cluster.patches_s + cluster.slide_overhead_s).tolist()
        self._demand = cluster.bytes_per_patch * float(patches.sum()) / sum(self._work_s)  # bytes/s of a busy GPU
        self._queue = deque(range(len(patches)))
        self._gpus = [Gpu(number // cluster.gpus_per_node) for number in range(cluster.gpus)]
        self._ends: list[tuple[float, int, int]] = []
        """(virtual time, GPU, epoch) of slides in work."""
        self._events: list[tuple[float, int, str, int, int]] = []
        """(time, number, what, GPU or node, epoch)."""
        self._numbers = 0
        self._now = self._v = 0.0
        self._active = self._done = 0
        self._idle: set[int] = set()
        self.outcome = Outcome(0, sum(self._work_s), 0, 0, 0, Ledger())

    def run(self) -> Outcome:
        """Until the last slide is published."""
        for number in range(len(self._gpus)):
            self._plan(self._cluster.loading_s, "up", number, 0)
        for node in range(math.ceil(len(self._gpus) / self._cluster.gpus_per_node)):
            self._plan_failure(node)
        total = len(self._work_s)
        while self._done < total:
            self._step()
        self.outcome.makespan_s = max(self._now, self.outcome.ledger.free_at)
        return self.outcome

    def _step(self) -> None:
        rate = self._rate()
        work_at = self._now + (self._ends[0][0] - self._v) / rate if self._ends else math.inf
        if self._events and self._events[0][0] < work_at:
            at, _, what, number, epoch = heapq.heappop(self._events)
            self._advance(at, rate)
            getattr(self, f"_{what}")(number, epoch)
            return
        end_v, number, epoch = heapq.heappop(self._ends)
        self._advance(work_at, rate)
        if self._gpus[number].epoch == epoch:
            self._v = end_v
            self._finish(number)

    def _rate(self) -> float:
        return min(1.0, self._cluster.storage_bytes_s / max(1.0, self._active * self._demand))

    def _advance(self, at: float, rate: float) -> None:
        self._v += (at - self._now) * rate
        self._now = at

    def _plan(self, at: float, what: str, number: int, epoch: int) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (at, self._numbers, what, number, epoch))

    # What happens -----------------------------------------------------------------------------------------------

    def _up(self, number: int, epoch: int) -> None:
        if self._gpus[number].epoch == epoch:
            self._gpus[number].is_up = True
            self._claim(number)
            self._begin(number, epoch)

    def _claim(self, number: int) -> None:
        if self._queue:
            seconds = CLAIM_SHARE / self._cluster.ledger_jobs_s
            self._gpus[number].ahead.append((self._queue.popleft(), self.outcome.ledger.serve(self._now, seconds)))

    def _begin(self, number: int, epoch: int) -> None:
        gpu = self._gpus[number]
        if gpu.epoch != epoch or not gpu.is_up or gpu.slide is not None:
            return
        if not gpu.ahead:
            self._idle.add(number)
            return
        slide, ready_at = gpu.ahead[0]
        if ready_at > self._now:
            self._plan(ready_at, "begin", number, epoch)
            return
        gpu.ahead.popleft()
        gpu.slide, gpu.began_v = slide, self._v
        self._active += 1
        heapq.heappush(self._ends, (self._v + self._work_s[slide], number, epoch))
        self._claim(number)

    def _finish(self, number: int) -> None:
        gpu = self._gpus[number]
        gpu.slide = None
        self._active -= 1
        self._done += 1
        self.outcome.ledger.serve(self._now, (1 - CLAIM_SHARE) / self._cluster.ledger_jobs_s)
        self._begin(number, gpu.epoch)

    def _plan_failure(self, node: int) -> None:
        if math.isfinite(self._cluster.mtbf_s):
            self._plan(self._now + self._chance.exponential(self._cluster.mtbf_s), "fail", node, 0)

    def _fail(self, node: int, _epoch: int) -> None:
        self.outcome.failures += 1
        for number in self._gpus_of(node):
            self._lose(number)
        epoch = self._gpus[self._gpus_of(node)[0]].epoch
        self._plan(self._now + self._cluster.repair_s, "repaired", node, epoch)
        self._plan(self._now + self._cluster.lease_s + self._cluster.every_s, "look", node, epoch)

    def _lose(self, number: int) -> None:
        gpu = self._gpus[number]
        gpu.epoch += 1
        gpu.is_up = False
        self._idle.discard(number)
        if gpu.slide is not None:
            self.outcome.lost_gpu_s += self._v - gpu.began_v
            self.outcome.slides_lost += 1
            self._active -= 1
            gpu.ahead.append((gpu.slide, 0.0))
            gpu.slide = None

    def _repaired(self, node: int, epoch: int) -> None:
        """The scheduler starts, and first takes up what the one before it had."""
        self._take_up(node)
        for number in self._gpus_of(node):
            self._plan(self._now + self._cluster.loading_s, "up", number, epoch)
        self._plan_failure(node)

    def _look(self, node: int, epoch: int) -> None:
        """A scheduler that has nothing left begins a pass, and finds what a node that failed has left."""
        if self._gpus[self._gpus_of(node)[0]].epoch != epoch:
            return
        if self._idle:
            self._take_up(node)
        else:
            self._plan(self._now + self._cluster.every_s, "look", node, epoch)

    def _take_up(self, node: int) -> None:
        for number in self._gpus_of(node):
            gpu = self._gpus[number]
            if not gpu.is_up:
                self._queue.extend(slide for slide, _ in gpu.ahead)
                gpu.ahead.clear()
        for number in list(self._idle) if self._queue else ():
            self._idle.discard(number)
            self._claim(number)
            self._begin(number, self._gpus[number].epoch)

    def _gpus_of(self, node: int) -> range:
        first = node * self._cluster.gpus_per_node
        return range(first, min(first + self._cluster.gpus_per_node, len(self._gpus)))


# The table


def draw_lengths(slides: int, seed: int) -> NDArray[np.int64]:
    """Patches by slide: log-normal, median 6,000, cut to the range the paper's slides have."""
    drawn = np.random.default_rng(seed).lognormal(math.log(6000), 0.8, slides)
    return drawn.clip(85, 62_235).astype(np.int64)


def scenarios(base: Cluster) -> dict[str, Cluster]:
    """By name; each differs from the one called "base" by what its name says."""
    unlimited = {"storage_bytes_s": math.inf, "ledger_jobs_s": math.inf, "mtbf_s": math.inf}
    faster = replace(base, ledger_jobs_s=4 * base.ledger_jobs_s)
    return {
        "no limits, no failures": replace(base, **unlimited),
        "base": base,
        "250 patches/s": replace(base, patches_s=250),
        "ledger four times as fast": faster,
        "that, 4,000 patches/s": replace(faster, patches_s=4000),
        "that, storage of 20 GB/s": replace(faster, storage_bytes_s=20e9),
        "that, storage of 20 GB/s, slides hashed once": replace(faster, storage_bytes_s=20e9, hashes=1),
        "that, each node fails every day": replace(faster, mtbf_s=DAY_S),
    }


def main(gpus: int = 1000, slides: int = 1_000_000, ledger_jobs_s: float = 64, seed: int = 0) -> None:
    """Print a row for each scenario."""
    patches = draw_lengths(slides, seed)
    base = Cluster(gpus=gpus, ledger_jobs_s=ledger_jobs_s)
    print(
        f"{gpus} GPUs, {slides} slides of {patches.min()} to {patches.max()} patches, mean {patches.mean():.0f}\n"
    )
    print("| | makespan, h | GPUs at work | slides/s | ledger busy | longest wait for it, s |", end="")
    print(" failures | slides begun anew | GPU hours lost | waits for |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, cluster in scenarios(base).items():
        outcome = Simulation(cluster, patches, seed).run()
        print(describe(name, cluster, patches, outcome), flush=True)
    print(f"\n{base}")


def describe(name: str, cluster: Cluster, patches: NDArray[np.int64], outcome: Outcome) -> str:
    """A line of the table."""
    ledger, makespan_s = outcome.ledger, outcome.makespan_s
    bounds = find_bounds(cluster, patches)
    slowest = max(bounds, key=lambda bound: bounds[bound])
    cells = (
        f"{makespan_s / HOUR_S:.2f}",
        f"{outcome.useful_gpu_s / (cluster.gpus * makespan_s):.0%}",
        f"{len(patches) / makespan_s:.1f}",
        f"{ledger.busy_s / makespan_s:.0%}",
        f"{ledger.longest_wait_s:.1f}",
        f"{outcome.failures}",
        f"{outcome.slides_lost}",
        f"{outcome.lost_gpu_s / HOUR_S:.1f}",
        f"{slowest} ({bounds[slowest] / HOUR_S:.2f} h)",
    )
    return f"| {name} | {' | '.join(cells)} |"


def find_bounds(cluster: Cluster, patches: NDArray[np.int64]) -> dict[str, float]:
    """Seconds each part would take if it alone were the limit."""
    work_s = float(patches.sum()) / cluster.patches_s + len(patches) * cluster.slide_overhead_s
    return {
        "GPUs": work_s / cluster.gpus,
        "storage": float(patches.sum()) * cluster.bytes_per_patch / cluster.storage_bytes_s,
        "ledger": len(patches) / cluster.ledger_jobs_s,
    }


if __name__ == "__main__":
    Fire(main)
