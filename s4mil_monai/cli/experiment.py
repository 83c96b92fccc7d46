"""``s4mil experiment``: models x data set x folds, to tables and figures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from s4mil_monai.cli.console import EXIT_ERROR, complain, say
from s4mil_monai.cli.usage import require_positive

if TYPE_CHECKING:
    from s4mil_monai.experiments.plan import Piece, Plan
    from s4mil_monai.experiments.runner import Failed


def experiment(
    file: str, *, out: str = "output/experiments", workers: int = 1, tracking_uri: str | None = None
) -> int:
    """Train all models of an experiment on all folds; write OUT/<name>/ with predictions, tables and figures.

    Stopped at any moment, even by a power cut, it goes on when it is started again: finished folds are left alone.

    Args:
        file: YAML of the experiment, as in configs/experiments.
        out: Folder that gets a folder named after the experiment.
        workers: Trainings at a time, each with its share of the cores.
        tracking_uri: MLflow server; a database in the experiment's folder by default.
    """
    require_positive("workers", workers)
    from s4mil_monai.experiments.plan import plan_experiment
    from s4mil_monai.experiments.results import write_results
    from s4mil_monai.experiments.runner import run_experiment
    from s4mil_monai.experiments.settings import read_experiment
    from s4mil_monai.experiments.tracking import adopt_children, close_parent_run
    from s4mil_monai.training.mlflow_store import uri_of_folder

    settings = read_experiment(Path(file))
    plan = plan_experiment(settings, Path(out) / settings.name)
    uri = tracking_uri or uri_of_folder(plan.folder)
    done = len(plan.pieces) - len(plan.unfinished)
    if done:
        say(f"{settings.name}: {done} of {len(plan.pieces)} trainings are finished already")
    failed = run_experiment(plan, workers=workers, tracking_uri=uri, report=_Live(plan))
    if any(piece.is_finished for piece in plan.pieces):
        adopt_children(uri, plan)
        written = write_results(plan)
        close_parent_run(uri, plan, written)
        say((plan.folder / "tables" / "summary.md").read_text(encoding="utf-8"))
        say(f"open {plan.folder / 'tables' / 'summary.md'} and {plan.folder / 'figures'}")
    for problem in failed:
        complain(f"{problem.piece.folder}: {problem.reason}")
    return EXIT_ERROR if failed else 0


class _Live:
    """One line a training: which, its AUROC beside the mean of its model so far, how long the rest will take."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._left = len(plan.unfinished)
        self._all = self._left
        self._started = time.perf_counter()

    def __call__(self, piece: Piece, failed: Failed | None) -> None:
        self._left -= 1
        passed = time.perf_counter() - self._started
        rest = passed / (self._all - self._left) * self._left
        state = f"failed, {failed.reason}" if failed else self._describe(piece)
        say(
            f"{piece.model.name} seed {piece.seed} fold {piece.fold}: {state} "
            f"({self._all - self._left}/{self._all}, {rest / 60:.0f} min left)"
        )

    def _describe(self, piece: Piece) -> str:
        from s4mil_monai.experiments.results import read_metrics

        now = read_metrics(piece).get("auroc")
        of_model = [other for other in self._plan.pieces if other.model == piece.model and other.is_finished]
        found = [value for other in of_model if (value := read_metrics(other).get("auroc")) is not None]
        if now is None or not found:
            return "done"
        return f"done, AUROC {now:.3f}, mean {sum(found) / len(found):.3f} of {len(found)}"
