"""Schedulers killed with SIGKILL at random moments, hundreds of times: is every slide published once, and whole?

    python -m benchmarks.faults [--kills 500] [--seed 0] [--whole 5]

From the root of a checkout, as it uses what the tests use. Most kills hit schedulers whose processes write real
files but score nothing, forked from one that has imported everything; ledger, intake, publishing, recovery, report
and the supervision of processes are as in use. Six in ten are killed at a line of code, drawn evenly over phases,
the others at a moment. The last --whole kills hit `s4mil batch run` itself, which scores drawn slides with the
demonstration model.

Leaves with 1 if a slide was lost, published twice or half-written, or if ledger or chain are broken.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fire import Fire

from s4mil_monai.cli.options import shipped_bundle
from tests.batch.audit import Audit, audit
from tests.batch.broken_machine import wait_until
from tests.batch.fork_server import ForkServer
from tests.batch.light_site import LightSite
from tests.batch.small_site import SmallSite
from tests.batch.storm import Storm, describe_moment


def storm(folder: Path, kills: int, seed: int) -> tuple[Storm, Audit]:
    """Kill schedulers whose processes score nothing."""
    server = ForkServer()
    try:
        site = LightSite(folder, shipped_bundle(), server)
        site.configure(losses=10_000)
        raging = Storm(site, random.Random(seed))
        raging.rage(kills)
        return raging, raging.finish()
    finally:
        server.close()


def kill_whole_commands(folder: Path, kills: int, seed: int) -> tuple[Counter[str], Audit]:
    """Kill `s4mil batch run`, each time within seconds of its first slide."""
    generator, hit = random.Random(seed), Counter[str]()
    site = SmallSite(folder, shipped_bundle())
    site.configure(losses=10_000)
    for number in range(kills):
        site.scan(f"{number}.tif", seed=number)
        command = site.start("run")
        wait_until(lambda: bool(list(site.out.glob(".work/*"))))
        time.sleep(generator.uniform(0, 1.5))
        command.kill()
        command.communicate()
        hit[describe_moment(site.out)] += 1
    for _ in range(2):
        site.call("run")
    return hit, audit(site.ledger(), site.share, site.out)


def main(kills: int = 500, seed: int = 0, whole: int = 5) -> None:
    """Kill, finish, compare, print."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        light, heavy = Path(folder) / "light", Path(folder) / "whole"
        for place in (light, heavy):
            place.mkdir()
        raging, found = storm(light, kills - whole, seed)
        hit, found_whole = kill_whole_commands(heavy, whole, seed)
    print(f"{raging.kills + hit.total()} kills, seed {seed}, {time.perf_counter() - started:.0f} s\n")
    print("| killed | where it hit | kills |\n|---|---|---|")
    for how, counts in (("at a line", raging.by_code), ("at a moment", raging.by_clock), ("whole command", hit)):
        for where, count in counts.most_common():
            print(f"| {how} | {where} | {count} |")
    print("\n| | published | lost | twice | half-written | broken |\n|---|---|---|---|---|---|")
    for name, audited in (("light", found), ("whole command", found_whole)):
        wrong = (audited.lost, audited.twice, audited.half_written, audited.broken)
        print(f"| {name} | {audited.published} | {' | '.join(str(len(problems)) for problems in wrong)} |")
    problems = [*found.problems, *found_whole.problems]
    print("\n".join(problems))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    Fire(main)
