"""How far an exported step is from the model, and the bound it has to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from s4mil_monai.errors import ExportError, OverflowedError
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.streaming.manifest import Parity
from s4mil_monai.streaming.runtime import Runtime
from s4mil_monai.streaming.stream import SlideStream

BOUNDS = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
"""Of a logit's difference, as a share of the largest logit of the bag, or of 1 where that is smaller. Half
precision keeps 11 and 8 bits of each factor; measured with the shipped weights are 2e-6, 1e-3 and 1e-2."""


LEAST_SAME_WINNERS = {"float32": 0.98, "float16": 0.9, "bfloat16": 0.8}
"""Share of a bag's channels whose maximum has to be given to the same patch. Two patches may share one up to
rounding: with the shipped weights none of 512 differs in float32, 3 in float16, 19 in bfloat16."""


def random_bags(in_features: int, chunk: int) -> list[Tensor]:
    """Bags around the length of a chunk, not negative as an encoder's features are; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    lengths = (1, chunk - 1, chunk, chunk + 1, 2 * chunk + 17)
    return [torch.randn(length, in_features, generator=generator).abs() for length in lengths]


def measure_parity(
    runtime: Runtime,
    model: S4MIL,
    *,
    real_bags: Sequence[Tensor] = (),
    by: Literal["onnxruntime", "torch", "tensorrt"],
) -> Parity:
    """Run random and real bags through a runtime and through the model in float32.

    Args:
        runtime: Of the exported step.
        model: What it was exported from.
        real_bags: (n, D) features of slides.
        by: What the runtime is.
    """
    drawn = random_bags(runtime.shape.in_features, runtime.shape.chunk)
    bags = [*drawn, *real_bags]
    differences = [_differences(runtime, model, bag) for bag in bags]
    return Parity(
        by=by,
        random_bags=len(drawn),
        real_bags=len(real_bags),
        patches=sum(len(bag) for bag in bags),
        winners=min(found.winners for found in differences),
        logits=max(found.logits for found in differences),
        patch_logits=max(found.patch_logits for found in differences),
        bound=BOUNDS[runtime.precision],
    )


def refuse_if_inexact(parity: Parity, *, precision: str, path: str) -> None:
    """The gate.

    Raises:
        ExportError: The step's logits differ by more than the bound or are no numbers, or it names other patches.
    """
    worst = max(parity.logits, parity.patch_logits)
    if not worst <= parity.bound:
        raise ExportError(
            path,
            f"its logits differ by {worst:.1e} from the model's, at most {parity.bound:.0e} is accepted; take a "
            "higher precision",
        )
    if parity.winners < LEAST_SAME_WINNERS[precision]:
        raise ExportError(
            path,
            f"it gives {1 - parity.winners:.0%} of the maxima of a bag to other patches than the model; the "
            "reasons for a score would be wrong",
        )


@dataclass(frozen=True)
class _Difference:
    """Of one bag."""

    winners: float
    logits: float
    patch_logits: float


@torch.inference_mode()
def _differences(runtime: Runtime, model: S4MIL, bag: Tensor) -> _Difference:
    stream = SlideStream(runtime)
    stream.add(bag)
    wanted = model(bag.unsqueeze(0))
    try:
        found = stream.finish()
    except OverflowedError:
        return _Difference(winners=0.0, logits=torch.inf, patch_logits=torch.inf)
    assert found.patch_logits is not None
    assert wanted.patch_logits is not None
    assert found.winners is not None
    assert wanted.winners is not None
    return _Difference(
        winners=float((found.winners == wanted.winners).float().mean()),
        logits=_share(found.logits, wanted.logits),
        patch_logits=_share(found.patch_logits, wanted.patch_logits),
    )


def _share(found: Tensor, wanted: Tensor) -> float:
    worst = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    return float(worst.nan_to_num(nan=torch.inf))
