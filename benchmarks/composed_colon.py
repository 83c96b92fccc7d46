"""Composed colon bags: every model of an experiment on test tiles, with intervals from a bootstrap over tiles.

    python benchmarks/demonstration_weights.py --tiles FOLDER        # embeds the tiles
    s4mil experiment configs/experiments/composed_colon.yaml         # trains
    python benchmarks/composed_colon.py configs/experiments/composed_colon.yaml [--resamples 8] [--workers 1]

Bags are no independent samples: a long one, drawn with replacement, holds nearly all test tiles. So each resample
draws test *tiles* with replacement within their classes, composes new bags of what was drawn, and has every model
score the same bags. An interval is the value on the test bags of the experiment, mean over seeds, +- 1.96 of its
deviations: the root of the resamples' variance within a seed, mean over seeds, divided by the number of seeds. It
holds for the trained models as they are; how far trainings and splits differ, the values by seed tell.

Baselines beside the experiment's models: logistic regression (scikit-learn, standardised, C chosen on validation
bags) on the mean and on the maximum of the features, and of colour alone. What is measured is kept in the
experiment's folder; a stop loses one resample.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fire import Fire
from monai.bundle.config_parser import ConfigParser
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.experiments.plan import Piece, Plan, plan_experiment
from s4mil_monai.experiments.settings import read_experiment
from s4mil_monai.models.bag_model import SlideLogits
from s4mil_monai.models.pooled import load_forest
from s4mil_monai.training.bags import Bag
from s4mil_monai.training.composed import ComposedBag, TileFeatures, compose_bags
from s4mil_monai.training.datasets import DatasetSettings, load_dataset, read_dataset
from s4mil_monai.training.splits import Split
from s4mil_monai.weights import load_state, read_weights

Scores = tuple[float, NDArray[np.float64] | None]
"""Probability that a bag holds the finding, and (L,) a score of each patch where the model has one."""
Predict = Callable[[NDArray[np.float32]], Scores]
POOLED = {"mean_sklearn": np.mean, "max_sklearn": np.max}
COLOUR = {"mean_colour": np.mean, "max_colour": np.max}
MEASURES = ("auroc", "accuracy", "patch_auroc")


def main(experiment: str, out: str = "output/experiments", resamples: int = 8, workers: int = 1) -> None:
    """Measure what is not measured yet, and print the tables."""
    settings = read_experiment(Path(experiment))
    plan = plan_experiment(settings, Path(out) / settings.name)
    measure = partial(measure_seed, plan, resamples=resamples)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = pd.concat(pool.map(measure, settings.seeds), ignore_index=True)
    print(report(plan, rows, resamples))


# Measuring ----------------------------------------------------------------------------------------------------


def measure_seed(plan: Plan, seed: int, *, resamples: int) -> pd.DataFrame:
    """All finished models of one seed: resample 0 is the experiment's own test bags."""
    keep_large_buffers()
    torch.set_num_threads(1)
    settings = read_dataset(plan.settings.dataset, seed=seed)
    split = load_split(settings)
    models = load_models(plan, seed, split)
    folder = plan.folder / "tile_bootstrap"
    folder.mkdir(exist_ok=True)
    frames = []
    for resample in range(resamples + 1):
        file = folder / f"seed{seed}_{resample:03d}.csv"
        frames.append(measure_resample(settings, composed(split.test), models, resample, file))
    return pd.concat(frames, ignore_index=True)


def load_split(settings: DatasetSettings) -> Split:
    """The bags of an experiment, as it composes them for the seed of the settings."""
    dataset = load_dataset(settings)
    assert dataset.folds is not None  # composed bags come with their parts
    return dataset.split(dataset.folds, 0)


def composed(bags: Sequence[Bag]) -> list[ComposedBag]:
    """The bags of a part of a split, whose tiles are known."""
    return [bag for bag in bags if isinstance(bag, ComposedBag)]


def tiles_of(bags: Sequence[Bag]) -> TileFeatures:
    """The tiles that all bags of a part are composed of."""
    return composed(bags)[0].tiles


def measure_resample(
    settings: DatasetSettings, test: list[ComposedBag], models: dict[str, Predict], resample: int, file: Path
) -> pd.DataFrame:
    """Figures of each model on one set of bags; those in the file are not measured again."""
    known = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=["model"])
    missing = {name: model for name, model in models.items() if name not in set(known["model"])}
    if missing:
        bags = compose_anew(settings, test[0].tiles, resample) if resample else test
        made = measure(missing, bags).assign(seed=settings.seed, resample=resample)
        known = made if known.empty else pd.concat([known, made], ignore_index=True)
        known.to_csv(file, index=False)
    return known.loc[known["model"].isin(list(models))]


def compose_anew(settings: DatasetSettings, tiles: TileFeatures, resample: int) -> list[ComposedBag]:
    """As many bags as the experiment tests on, of test tiles drawn with replacement."""
    drawn = tiles.resample(np.random.default_rng([settings.seed, resample]))
    seed = settings.seed + 3000 + 100_000 * resample  # no other resample's, and no part's of the experiment
    return compose_bags(drawn, settings.recipe, count=settings.bags[2], seed=seed, name="test")


def measure(models: Mapping[str, Predict], bags: Sequence[ComposedBag]) -> pd.DataFrame:
    """AUROC and accuracy of bags, and of the patches inside positive bags, mean over bags; one row a model."""
    rows = []
    for bag in bags:
        features, colours = bag.features, show_colours(bag).features
        for name, predict in models.items():
            score, patches = predict(colours if name in COLOUR else features)
            rows.append((name, bag.label, score, patch_auroc(bag, patches)))
    found = pd.DataFrame(rows, columns=["model", "label", "score", "patch_auroc"])
    return pd.DataFrame([summarize(name, of_model) for name, of_model in found.groupby("model", sort=False)])


def patch_auroc(bag: ComposedBag, patches: NDArray[np.float64] | None) -> float:
    """Of the patches inside a positive bag; NaN where there is none."""
    return float("nan") if patches is None or not bag.label else roc_auc_score(bag.patch_labels, patches)


def summarize(name: object, rows: pd.DataFrame) -> dict[str, object]:
    """One model's figures."""
    labels, scores = rows["label"].to_numpy(), rows["score"].to_numpy()
    figures = roc_auc_score(labels, scores), accuracy_score(labels, scores > 0.5), rows["patch_auroc"].mean()
    return {"model": name, **dict(zip(MEASURES, figures, strict=True))}


def as_colours(tiles: TileFeatures) -> TileFeatures:
    """Tiles of which nothing is seen but mean and deviation of red, green and blue."""
    assert tiles.colours is not None
    return replace(tiles, features=tiles.colours)


# Models -------------------------------------------------------------------------------------------------------


def load_models(plan: Plan, seed: int, split: Split) -> dict[str, Predict]:
    """The trained models of one seed, and the baselines fitted here."""
    pieces = [piece for piece in plan.pieces if piece.seed == seed and piece.is_finished]
    models = {piece.model.name: load_piece(piece) for piece in pieces}
    return models | fit_baselines(split)


def fit_baselines(split: Split) -> dict[str, Predict]:
    """Logistic regression on pooled features, and on pooled colours."""
    train, validation = composed(split.train), composed(split.validation)
    coloured = [[show_colours(bag) for bag in part] for part in (train, validation)]
    models = {name: fit_pooled(train, validation, pool) for name, pool in POOLED.items()}
    return models | {name: fit_pooled(coloured[0], coloured[1], pool) for name, pool in COLOUR.items()}


def show_colours(bag: ComposedBag) -> ComposedBag:
    """The bag with nothing but the colours of its tiles."""
    return replace(bag, tiles=as_colours(bag.tiles), noise=None)


def load_piece(piece: Piece) -> Predict:
    """A trained model, from the configuration that it was trained by."""
    if (piece.folder / "forest.skops").is_file():
        forest = load_forest(piece.folder / "forest.skops")
        return lambda features: (float(forest.predict_proba([features])[0, 1]), None)
    config = json.loads((piece.folder / "config.json").read_text(encoding="utf-8"))["config"]
    network = ConfigParser(config).get_parsed_content("network_def")
    assert isinstance(network, SlideLogits)
    load_state(network, read_weights(piece.folder / "model.pt"), piece.folder / "model.pt")
    return partial(predict_by_network, network.eval())


def predict_by_network(network: SlideLogits, features: NDArray[np.float32]) -> Scores:
    """Patches are scored by their logits, or by their attention where there are no logits."""
    with torch.inference_mode():
        output = network.model(torch.from_numpy(features)[None])
    patches = None if output.attention is None else output.attention[0].numpy()
    if output.patch_logits is not None:
        patches = (output.patch_logits[0, :, 1] - output.patch_logits[0, :, 0]).numpy()
    return output.logits.softmax(1)[0, 1].item(), patches


def fit_pooled(train: Sequence[ComposedBag], validation: Sequence[ComposedBag], pool: Callable) -> Predict:
    """Logistic regression on pooled features; its C is the best on the validation bags."""
    (x, y), (x_validation, y_validation) = pooled(train, pool), pooled(validation, pool)

    def fit(strength: float) -> Pipeline:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000)).fit(x, y)

    def quality(model: Pipeline) -> float:
        return float(roc_auc_score(y_validation, model.predict_proba(x_validation)[:, 1]))

    model = max((fit(strength) for strength in (0.001, 0.01, 0.1, 1.0)), key=quality)
    return lambda features: (float(model.predict_proba(pool(features, axis=0)[None])[0, 1]), None)


def pooled(bags: Sequence[ComposedBag], pool: Callable) -> tuple[NDArray[np.float32], list[int]]:
    """(n, D) vectors and labels of bags."""
    return np.stack([pool(bag.features, axis=0) for bag in bags]), [bag.label for bag in bags]


def tile_auroc(split: Split, *, colour: bool) -> float:
    """Single test tiles, adenocarcinoma against healthy, by logistic regression on training tiles."""
    parts = [tiles_of(part) for part in (split.train, split.test)]
    shown = [as_colours(part) if colour else part for part in parts]
    train, test = (part.take(np.flatnonzero(np.isin(part.labels, ("AC", "H")))) for part in shown)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=5000))
    model.fit(train.features, train.labels == "AC")
    return float(roc_auc_score(test.labels == "AC", model.predict_proba(test.features)[:, 1]))


# Tables -------------------------------------------------------------------------------------------------------


def report(plan: Plan, rows: pd.DataFrame, resamples: int) -> str:
    """Markdown: all models, and how the data were made."""
    dataset = read_dataset(plan.settings.dataset)
    best = best_pooled(rows)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "monai", "scikit-learn"))
    seeds = ", ".join(map(str, plan.settings.seeds))
    return "\n".join(
        [
            f"**{plan.settings.name}** (data set {dataset.name}, seeds {seeds})",
            "",
            *table_of_models(rows, best),
            "",
            f"Mean over seeds ± 1.96 deviations of it over {resamples} resamples of the test tiles a seed. The "
            f"difference is that of AUROC from {best}, the best pooled baseline by mean AUROC, on the same bags. "
            "Patches: inside positive bags, by patch logits or, for CLAM, attention; mean over bags.",
            *notes_on_data(dataset, plan.settings.seeds),
            f"{versions}, Python {platform.python_version()}, CPU.",
        ]
    )


def best_pooled(rows: pd.DataFrame) -> str:
    """Name of the best model that sees a pooled vector of features."""
    names = [name for name in rows["model"].unique() if "pooling" in name or "forest" in name or name in POOLED]
    found = rows[(rows["resample"] == 0) & rows["model"].isin(names)].groupby("model")["auroc"].mean()
    return str(found.idxmax())


def table_of_models(rows: pd.DataFrame, best: str) -> list[str]:
    """One row a model."""
    lines = [
        "| model | seeds | AUROC of bags | by seed | difference | accuracy of bags | AUROC of patches |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in rows["model"].unique():
        own, reference = (index_rows(rows, model) for model in (name, best))
        common = own.index.intersection(reference.index)
        difference = own.loc[common, ["auroc"]] - reference.loc[common, ["auroc"]]
        by_seed = own.xs(0, level="resample")["auroc"]
        cells = [
            name,
            str(len(by_seed)),
            interval(own["auroc"]),
            ", ".join(f"{value:.3f}" for value in by_seed),
            "" if name == best else interval(difference["auroc"], signed=True),
            interval(own["accuracy"]),
            interval(own["patch_auroc"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def index_rows(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    """A model's figures by seed and resample."""
    return rows[rows["model"] == model].set_index(["seed", "resample"]).sort_index()[list(MEASURES)]


def interval(values: pd.Series, *, signed: bool = False) -> str:
    """Value and half width as text; empty where there is none."""
    by_seed = values.unstack("resample")
    value = by_seed[0].mean()
    variances = by_seed.drop(columns=0).var(axis=1)
    deviation = np.sqrt(variances.mean() / len(variances))
    if np.isnan(value):
        return ""
    sign = "+" if signed else ""
    return f"{value:{sign}.3f}" if np.isnan(deviation) else f"{value:{sign}.3f} ± {1.96 * deviation:.3f}"


def notes_on_data(dataset: DatasetSettings, seeds: Sequence[int]) -> list[str]:
    """How bags are made, and what single tiles show by colour and by features."""
    recipe, (train, validation, test) = dataset.recipe, dataset.bags
    splits = [load_split(dataset.model_copy(update={"seed": seed})) for seed in seeds]
    colour, features = (np.mean([tile_auroc(split, colour=on) for split in splits]) for on in (True, False))
    return [
        f"{train} training, {validation} validation and {test} test bags of {recipe.length[0]:,} to "
        f"{recipe.length[1]:,} patches; tiles split by {dataset.apart}; adenocarcinoma "
        f"{recipe.finding_share[0]:.0%} to {recipe.finding_share[1]:.0%} of its patches' features; noise of "
        f"{recipe.noise:g} deviations.",
        "Single test tiles, adenocarcinoma against healthy, logistic regression: colour alone "
        f"{colour:.3f}, features {features:.3f}.",
    ]


if __name__ == "__main__":
    Fire(main)
