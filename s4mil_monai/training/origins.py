"""Which features go together in one training, and which go with a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s4mil_monai.errors import TableError
from s4mil_monai.features.store import UNKNOWN, UNKNOWN_NUMBER, FeatureOrigin, has_patch_mpp
from s4mil_monai.training.labels import SlideTable, name_rows

ALIKE = ("encoder", "encoder_sha256", "patch_side_px", "scan_order")
"""Facts in which all features of a training agree; not to know one is as good as another value."""

ALIKE_WHERE_KNOWN = ("encoder_precision", "overlap_px", "min_tissue")
"""Facts in which they agree as far as they are known: files of other tools do not say them.

What ran the encoder and what prepared its patches may differ, as these agree to rounding at one precision.
"""

OF_PATCHES = {
    "mpp": "patch_mpp",
    "side_px": "patch_side_px",
    "overlap_px": "overlap_px",
    "scan_order": "scan_order",
}
"""Keys under ``patches`` of a bundle's metadata, and the facts of a feature file they are about."""


def check_origins(
    table: SlideTable,
    origins: Sequence[FeatureOrigin],
    *,
    encoder: str | None = None,
    patches: Mapping[str, Any] | None = None,
) -> None:
    """Refuse features of different encoders, resolutions, overlaps, tissue thresholds or scan orders in one table.

    Args:
        table: The slides, in the order of ``origins``.
        origins: Where the features of each come from.
        encoder: Refuse features of another one.
        patches: ``mpp``, ``side_px``, ``overlap_px`` and ``scan_order`` of a model's patches, as far as given;
            features that are known to be of others are refused.

    Raises:
        TableError: They differ, or are of another encoder or other patches than wanted; rows are named.
    """
    for fact in (*ALIKE, *ALIKE_WHERE_KNOWN):
        values = [getattr(origin, fact) for origin in origins]
        _refuse_different(table, fact, values, set(values) - (_NOT_KNOWN if fact in ALIKE_WHERE_KNOWN else set()))
    known = {origin.patch_mpp for origin in origins if origin.patch_mpp > 0}
    # Made for one µm/px, they lie around it: no further from the middle than that of the middle itself.
    middle = (min(known) + max(known)) / 2 if known else 0.0
    if not all(has_patch_mpp(origin, middle) for origin in origins if origin.patch_mpp > 0):
        _refuse_different(table, "patch_mpp", [origin.patch_mpp for origin in origins], known)
    if encoder is not None and origins[0].encoder != encoder:
        raise TableError(table.path, f"features are of {origins[0].encoder}, wanted {encoder}")
    for key, wanted in (patches or {}).items():
        if key in OF_PATCHES:
            _refuse_other(table, OF_PATCHES[key], origins, wanted)


_NOT_KNOWN = {UNKNOWN, UNKNOWN_NUMBER, ""}


def _refuse_different(table: SlideTable, fact: str, values: Sequence[Any], found: set[Any]) -> None:
    if len(found) < 2:
        return
    by_value = [
        f"{_as_text(value)} for {name_rows(table.rows[[other == value for other in values]])}"
        for value in sorted(found)
    ]
    raise TableError(
        table.path,
        f"its slides were embedded with different {fact}: {'; '.join(by_value)}; embed all alike (s4mil embed)",
    )


def _refuse_other(table: SlideTable, fact: str, origins: Sequence[FeatureOrigin], wanted: Any) -> None:
    def is_other(origin: FeatureOrigin) -> bool:
        value = getattr(origin, fact)
        if value in _NOT_KNOWN or wanted is None:
            return False
        return not has_patch_mpp(origin, wanted) if fact == "patch_mpp" else value != wanted

    odd = [is_other(origin) for origin in origins]
    if any(odd):
        found = sorted({getattr(origin, fact) for origin, is_odd in zip(origins, odd, strict=True) if is_odd})
        named = name_rows(table.rows[odd])
        raise TableError(
            table.path,
            f"the model was trained with {fact} {_as_text(wanted)}, and features have "
            f"{', '.join(map(_as_text, found))} for {named}",
        )


def _as_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value) or UNKNOWN
