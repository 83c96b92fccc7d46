"""Simulated out-of-fold predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from s4mil_monai.statistics.predictions import PooledRuns, check_predictions


def simulate(
    models: Mapping[str, float],
    *,
    slides: int = 120,
    classes: int = 2,
    folds: int = 5,
    seeds: int = 1,
    per_patient: int = 1,
) -> pd.DataFrame:
    """Predictions of models by how far, in deviations, the true class's logit stands out.

    The slides of a patient, of whom there are ``slides / per_patient``, are copies of one.
    """
    patient = np.arange(slides) // per_patient
    label = patient % classes
    parts = []
    for number, (model, strength) in enumerate(models.items()):
        for seed in range(seeds):
            drawn = np.random.default_rng([number, seed]).normal(size=(slides // per_patient, classes))
            logits = np.repeat(drawn, per_patient, axis=0)
            logits[np.arange(slides), label] += strength
            facts = {
                "model": model,
                "seed": seed,
                "fold": (patient // classes) % folds,
                "slide": [f"s{i:04}" for i in range(slides)],
                "patient": [f"p{i:04}" for i in patient],
                "label": label,
            }
            probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            parts.append(pd.DataFrame(facts | {f"p_{c}": probabilities[:, c] for c in range(classes)}))
    return check_predictions(pd.concat(parts))


def pooled_scores(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray | None = None) -> PooledRuns:
    """One run of two classes with these probabilities of class 1."""
    patients = np.arange(len(labels)) if patients is None else patients
    return PooledRuns("m", np.arange(len(labels)), patients, labels, np.stack([1 - scores, scores], -1)[None])
