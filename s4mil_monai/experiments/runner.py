"""run_experiment(): all pieces that are not finished, some at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass

from s4mil_monai.experiments.plan import Piece, Plan
from s4mil_monai.experiments.run_piece import run_piece, start_process
from s4mil_monai.experiments.settings import ExperimentError
from s4mil_monai.experiments.tracking import open_parent_run
from s4mil_monai.training.mlflow_store import uri_of_folder


@dataclass(frozen=True)
class Failed:
    """A piece that could not be run."""

    piece: Piece
    reason: str


Report = Callable[[Piece, "Failed | None"], None]
"""Called after each piece."""


def run_experiment(
    plan: Plan, *, workers: int = 1, tracking_uri: str | None = None, report: Report
) -> list[Failed]:
    """Run every piece that is not finished; one that fails does not stop the others.

    Stopped at any moment, even by a kill, a later call runs what is not finished; a piece that was stopped in the
    middle goes on after its last whole epoch.

    Args:
        plan: The pieces.
        workers: How many at a time, each with its share of the cores.
        tracking_uri: MLflow's; a database in the experiment's folder by default.
        report: Told after each piece.

    Returns:
        The pieces that failed.
    """
    uri = tracking_uri or uri_of_folder(plan.folder)
    open_parent_run(uri, plan)
    failed: list[Failed] = []
    threads = max(1, usable_cores() // workers)
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_process,
        initargs=(os.getpid(), threads),
    ) as pool:
        waiting: dict[Future[None], Piece] = {
            pool.submit(run_piece, plan.settings, piece, uri): piece for piece in plan.unfinished
        }
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    piece = waiting.pop(future)
                    problem = _problem(piece, future)
                    if problem is not None:
                        failed.append(problem)
                    report(piece, problem)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def usable_cores() -> int:
    """Cores this process may use; ``OMP_NUM_THREADS`` asks for fewer, as on a machine that is shared."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(wanted)) if wanted.isdigit() and int(wanted) else cores


def _problem(piece: Piece, future: Future[None]) -> Failed | None:
    try:
        future.result()
    except ExperimentError as error:
        return Failed(piece, error.reason)
    except Exception as error:  # noqa: BLE001 — a process that died
        return Failed(piece, f"{type(error).__name__}: {' '.join(str(error).split())}")
    return None
