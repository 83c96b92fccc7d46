"""A cluster of three machines in one process group, two of which die while slides are scored; run as a script.

``python -m tests.batch.ray_scenario SITE BUNDLE``, in a network namespace, with a HOME and RAY_TMPDIR of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from s4mil_monai.batch.logs import set_up_logs
from s4mil_monai.batch.ray_cluster import import_ray
from s4mil_monai.batch.ray_executor import RayExecutor
from s4mil_monai.batch.site import Site, new_run, open_ledger, read_checked_site
from s4mil_monai.batch.states import JobState
from tests.batch.small_site import SmallSite

NODE = {"num_cpus": 2, "object_store_memory": 80 << 20}
QUICK = {
    "health_check_period_ms": 300,
    "health_check_failure_threshold": 3,
    "health_check_initial_delay_ms": 0,
    "health_check_timeout_ms": 1000,
}
"""Ray notices within seconds that a machine is gone."""


def main(folder: str, bundle: str) -> None:
    """Score all slides of the site while two of three machines die; then look again."""
    import_ray()  # sets what it reads as it is imported
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": QUICK}
    )
    others = [cluster.add_node(**NODE) for _ in range(2)]
    small = SmallSite(Path(folder), Path(bundle))
    small.configure(executor="ray", ray_address=cluster.address, workers=2)
    site = read_checked_site(small.file, default_bundle=lambda: Path(bundle))
    set_up_logs()
    executor = RayExecutor(site.worker_settings(), workers=2, readers=2, address=cluster.address)
    executor.start()
    killer = threading.Thread(target=kill_both, args=(small, others), daemon=True)
    killer.start()
    run_pass(site, executor)
    assert not killer.is_alive(), "all was scored before both machines were killed"
    run_pass(site, executor)
    executor.stop()
    cluster.shutdown()


def run_pass(site: Site, executor: RayExecutor) -> None:
    site.make_scheduler(open_ledger(site.settings), executor, run=new_run()).run(threading.Event())


def kill_both(site: SmallSite, nodes: list) -> None:
    """One machine by its raylet alone, whose workers live on for a while; later one with all its processes."""
    first = find_busy(nodes)
    wait_for_published(site, 2)
    os.kill(raylet_of(first), signal.SIGKILL)
    second = next(node for node in nodes if node is not first)
    wait_for_published(site, 5)
    for process in (raylet_of(second), *children_of(raylet_of(second))):
        os.kill(process, signal.SIGKILL)


def find_busy(nodes: list) -> object:
    """The machine that embeds, if one of these does."""
    return max(nodes, key=lambda node: sum("Embedding" in name_of(one) for one in children_of(raylet_of(node))))


def wait_for_published(site: SmallSite, count: int) -> None:
    while sum(state is JobState.PUBLISHED for state in site.states().values()) < count:
        time.sleep(0.05)


def raylet_of(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


if __name__ == "__main__":
    main(*sys.argv[1:])
