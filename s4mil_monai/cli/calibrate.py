"""``s4mil calibrate``: from out-of-fold predictions to decisions."""

from __future__ import annotations

from pathlib import Path

from s4mil_monai.cli.console import say
from s4mil_monai.cli.usage import UsageError, require_share


def calibrate(
    predictions: str,
    *,
    bundle: str,
    model: str,
    seed: int = 0,
    method: str = "temperature",
    sensitivity: float = 0.95,
    alpha: float = 0.05,
) -> int:
    """Fit probabilities, threshold and refer band to out-of-fold predictions; keep them in the bundle.

    Args:
        predictions: predictions.csv of an experiment.
        bundle: Folder of the trained model.
        model: Its name in the predictions.
        seed: Of the trainings to take.
        method: temperature, or platt for two classes.
        sensitivity: Wanted at the threshold.
        alpha: Share of the slides of each class that may be called the wrong one; the rest are referred.
    """
    for name, share in (("sensitivity", sensitivity), ("alpha", alpha)):
        require_share(name, share)
        if share in (0, 1):
            raise UsageError(f"--{name} lies between 0 and 1, got {share}")
    if method not in ("temperature", "platt"):
        raise UsageError(f"--method is temperature or platt, got {method!r}")
    from s4mil_monai.errors import TableError
    from s4mil_monai.models.bundle import describe_bundle
    from s4mil_monai.models.seal import kept_sealed
    from s4mil_monai.scoring import CALIBRATION_FILE
    from s4mil_monai.statistics.calibration import write_calibration
    from s4mil_monai.statistics.fit_calibration import fit_calibration, logits_of
    from s4mil_monai.statistics.predictions import is_cross_validation, read_predictions, rows_of

    target = Path(bundle) / CALIBRATION_FILE
    _, settings = describe_bundle(Path(bundle))
    rows = rows_of(read_predictions(predictions), model)
    rows = rows[rows["seed"] == seed]
    if rows.empty:
        raise TableError(predictions, f"has no trainings of {model} with seed {seed}")
    if not is_cross_validation(rows):
        raise TableError(predictions, f"has slides of {model} more than once, so they are not out of fold")
    found = fit_calibration(
        rows["label"].to_numpy(int),
        logits_of(rows),
        patients=rows["patient"].to_numpy(str),
        method=method,
        sensitivity=sensitivity,
        alpha=alpha,
        provenance=f"out-of-fold predictions of {model}, seed {seed}, {len(rows)} slides",
        where=predictions,
    )
    if found.classes != len(settings.classes):
        raise TableError(predictions, f"is of {found.classes} classes, {bundle} of {len(settings.classes)}")
    found = found.model_copy(update={"model_sha256": settings.weights.sha256})
    with kept_sealed(Path(bundle)):
        write_calibration(found, target)
    say(f"{model}: calibrated on {found.n} slides of {found.n_patients} patients, in {target}")
    if found.threshold is not None:
        low, high = found.refer_low, found.refer_high
        band = "nothing is referred" if low is None else f"referred between {low:.3f} and {high:.3f}"
        say(
            f"positive from {found.threshold:.3f}: sensitivity {found.sensitivity:.3f} "
            f"({found.sensitivity_low:.3f} to {found.sensitivity_high:.3f}), specificity {found.specificity:.3f} "
            f"({found.specificity_low:.3f} to {found.specificity_high:.3f}); {band}"
        )
    return 0
