"""Models of one pooled vector per slide, which S4MIL is compared with (Fillioux et al., MICCAI 2023, Table 2).

A logistic regression on the mean or maximum of the patch features, and a random forest on the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import skops.io
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from s4mil_monai.errors import WeightsError
from s4mil_monai.models.bag_model import BagModel, BagOutput, keep_valid, mean_valid

Pooling = Literal["mean", "max"]

TRUSTED_TYPES = ("sklearn.tree._tree.Tree",)
"""All that a forest file holds beyond what skops trusts by itself: the nodes of a tree, as arrays."""


class PooledModel(BagModel):
    """Mean or maximum of the patch features → linear: logistic regression on one vector per slide.

    For 2 classes one unit gives the log-odds z of class 1, and the logits are ``[0, z]``, whose softmax is
    the sigmoid of z; with D = 1024 these are the 1,025 parameters of Table 2. For more classes each has its
    own unit.

    Args:
        in_features: D, width of the patch features.
        classes: C, at least 2.
        pooling: ``mean`` or ``max``, over the patches.

    Raises:
        ValueError: Fewer than 2 classes, or no such pooling.
    """

    def __init__(self, in_features: int = 1024, *, classes: int = 2, pooling: Pooling = "mean"):
        super().__init__()
        _check_settings(classes, pooling)
        self.in_features, self.classes = in_features, classes
        self.pooling: Pooling = pooling
        self.head = nn.Linear(in_features, 1 if classes == 2 else classes)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> BagOutput:
        """Predict; see :class:`BagModel` for shapes.

        Raises:
            ValueError: As :meth:`BagModel.check_bags`.
        """
        self.check_bags(features, mask)
        mean = self.pooling == "mean"
        pooled = mean_valid(features, mask) if mean else keep_valid(features, mask).amax(dim=1)  # (B, D)
        logits = self.head(pooled)  # (B, 1) or (B, C)
        if self.classes == 2:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return BagOutput(logits=logits)


def fit_logistic(model: PooledModel, bags: Iterable[NDArray[Any]], labels: ArrayLike, *, C: float = 1.0) -> None:
    """Give a pooled model the weights of the logistic regression that fits bags best.

    The problem is convex, so its solution is computed and not approached by epochs: with the networks' learning
    rate and patience the weights are still far from it when training stops. Each pooled feature gets mean 0 and
    deviation 1 over the bags before it is penalised; the model's weights take that back, for features as they are.

    Args:
        model: Learns in place.
        bags: (L, D) features of each slide, read once and one after the other.
        labels: Class number of each slide; every class must be there.
        C: Inverse strength of the L2 penalty; 1 is scikit-learn's default and was not tuned.

    Raises:
        ValueError: A class has no bag, or a bag cannot be read, as in :func:`pool_bags`.
    """
    numbers = np.asarray(labels)
    if sorted(set(numbers.tolist())) != list(range(model.classes)):
        raise ValueError(
            f"wanted bags of each class 0 to {model.classes - 1}, got {sorted(set(numbers.tolist()))}"
        )
    scaler = StandardScaler()
    pooled = scaler.fit_transform(pool_bags(bags, model.pooling))
    found = LogisticRegression(C=C, max_iter=10_000).fit(pooled, numbers)
    weight = found.coef_ / scaler.scale_
    bias = found.intercept_ - weight @ scaler.mean_
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight))
        model.head.bias.copy_(torch.from_numpy(bias))


class PooledForest:
    """Random forest on the mean or maximum of the patch features.

    Args:
        pooling: ``mean`` or ``max``, over the patches.
        classes: C, at least 2.
        trees: Trees of the forest.
        seed: Of the draws of slides and channels; equal seeds on equal bags give equal forests.

    Raises:
        ValueError: Fewer than 2 classes, or no such pooling.
    """

    def __init__(self, *, pooling: Pooling = "mean", classes: int = 2, trees: int = 200, seed: int = 0):
        _check_settings(classes, pooling)
        self.pooling: Pooling = pooling
        self.classes = classes
        # One thread: several add up the trees' votes in no fixed order, and the last digit would vary.
        self.forest = RandomForestClassifier(n_estimators=trees, random_state=seed, n_jobs=1)

    def fit(self, bags: Iterable[NDArray[Any]], labels: ArrayLike) -> PooledForest:
        """Learn from (L, D) features and the class number of each slide; gives itself back.

        Bags are read once and one after the other.

        Raises:
            ValueError: A bag is empty, not finite or of another width, or a label is no class number.
        """
        numbers = np.asarray(labels)
        strange = sorted(set(numbers.ravel().tolist()) - set(range(self.classes)))
        if strange:
            raise ValueError(f"labels are class numbers 0 to {self.classes - 1}, got {strange[0]}")
        self.forest.fit(pool_bags(bags, self.pooling), numbers.astype(np.int64))
        return self

    def predict_proba(self, bags: Iterable[NDArray[Any]]) -> NDArray[np.float64]:
        """Predict (n, C) probabilities for n bags of (L, D) features; 0 for a class that training never saw.

        Raises:
            ValueError: A bag cannot be read, as in :meth:`fit`, or nothing was learned yet.
        """
        check_is_fitted(self.forest)
        pooled = pool_bags(bags, self.pooling)
        probabilities = np.zeros((len(pooled), self.classes))
        probabilities[:, self.forest.classes_] = self.forest.predict_proba(pooled)
        return probabilities

    def save(self, path: str | Path) -> None:
        """Write the forest as a sealed skops file, from which :func:`load_forest` runs no code.

        Raises:
            ValueError: Nothing was learned yet.
        """
        check_is_fitted(self.forest)
        content = {"pooling": self.pooling, "classes": self.classes, "forest": self.forest}
        Path(path).write_bytes(seal(skops.io.dumps(content, compression=ZIP_DEFLATED)))


SEAL_BYTES = 64
"""Of a SHA-256 in hexadecimal."""


def seal(archive: bytes) -> bytes:
    """The same zip archive with a SHA-256 of all that precedes it as its comment, which is its end.

    A zip's own CRCs leave out its headers, where a flipped bit goes unnoticed.
    """
    buffer = BytesIO(archive)
    with ZipFile(buffer, "a") as opened:
        opened.comment = b"0" * SEAL_BYTES
    content = buffer.getvalue()[:-SEAL_BYTES]
    return content + hashlib.sha256(content).hexdigest().encode()


def is_sealed(data: bytes) -> bool:
    """Whether this is what :func:`seal` gave, to the last bit."""
    return data[-SEAL_BYTES:] == hashlib.sha256(data[:-SEAL_BYTES]).hexdigest().encode()


def load_forest(path: str | Path) -> PooledForest:
    """Read a forest that :meth:`PooledForest.save` wrote; it predicts the same to the last bit.

    Raises:
        WeightsError: There is no such file, one byte of it differs from what was saved, it is no sealed skops
            file (a pickle is not), or it holds something that is no forest; that is not loaded.
    """
    if not Path(path).is_file():
        raise WeightsError(str(path), "there is no such forest file")
    data = Path(path).read_bytes()  # once: what was checked is what is loaded
    if not is_sealed(data):
        reason = "damaged, or no forest saved with skops by s4mil_monai; copy it again or fit it anew"
        raise WeightsError(str(path), reason)
    try:
        strange = sorted(set(skops.io.get_untrusted_types(data=data)) - set(TRUSTED_TYPES))
        content = None if strange else skops.io.loads(data, trusted=list(TRUSTED_TYPES))
    except Exception as error:  # what skops cannot read raises anything
        reason = "no forest saved with skops, or one of another scikit-learn or skops; fit it anew"
        raise WeightsError(str(path), reason) from error
    if strange:
        raise WeightsError(str(path), f"holds {', '.join(strange)}, which no forest does; it was not loaded")
    return _restore(content, path)


def pool_bags(bags: Iterable[NDArray[Any]], pooling: Pooling) -> NDArray[np.float64]:
    """Pool n bags of (L, D) features over their patches; (n, D).

    Each is let go before the next is asked for: the features of a cohort need not fit into memory.

    Raises:
        ValueError: No bags, or one that is empty, not finite or of another width than the first.
    """
    pooled: list[NDArray[np.float64]] = []
    for number, bag in enumerate(bags):
        width = len(pooled[0]) if pooled else bag.shape[-1]
        if bag.ndim != 2 or len(bag) == 0 or bag.shape[1] != width:
            raise ValueError(f"bag {number}: wanted features (L, {width}) with L > 0, got {bag.shape}")
        if not np.isfinite(bag).all():
            raise ValueError(f"bag {number}: features are not finite; embed the slide again")
        pooled.append(_pool(bag, pooling))
    if not pooled:
        raise ValueError("wanted bags to pool, got none")
    return np.stack(pooled)


def _pool(bag: NDArray[Any], pooling: Pooling) -> NDArray[np.float64]:
    if pooling == "mean":
        # NumPy adds rows one after another; float32 would lose digits over 30,000 patches.
        return bag.mean(axis=0, dtype=np.float64)
    return bag.max(axis=0).astype(np.float64)


def _restore(content: Any, path: str | Path) -> PooledForest:
    """A forest from what its file held."""
    try:
        pooled = PooledForest(pooling=content["pooling"], classes=content["classes"])
        forest = content["forest"]
        check_is_fitted(forest)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(str(path), "holds no fitted forest with its pooling and classes") from error
    if not isinstance(forest, RandomForestClassifier):
        raise WeightsError(str(path), f"holds a {type(forest).__name__}, wanted a RandomForestClassifier")
    pooled.forest = forest
    return pooled


def _check_settings(classes: int, pooling: str) -> None:
    if classes < 2:
        raise ValueError(f"classes is 2 or more, got {classes}")
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is one of {', '.join(get_args(Pooling))}, got {pooling!r}")
