"""Speed and memory of the slide models, beside the textbook S4D and the two matrix products alone.

    python benchmarks/aggregators.py [--length 30000] [--runs 5]

Three tables: Table 2 of the paper (parameters, time and memory of a forward pass); training steps; the longest
slide. Each row is a process of its own, on one core setting and with the same allocator setting, so that memory is
that row's alone: "peak" is the process's highest resident memory above what it held once input and model were
there.

"textbook" is S4MIL with the kernel as it is usually written: exp(dtA l) for every channel, mode and position at
once, (H, N/2, L) complex, and FFT convolution; the parameters and the rest of the model are the same. "floor" is
the two large matrix products of S4MIL and nothing else, by the faster of `F.linear` and a 1x1 convolution.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from fire import Fire
from torch import Tensor, nn
from torch.nn import functional as F

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.models.bag_model import BagModel
from s4mil_monai.models.clam import ClamMB, ClamSB
from s4mil_monai.models.fast_linear import fast_linear
from s4mil_monai.models.pooled import PooledModel
from s4mil_monai.models.s4d import S4D
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.models.sequence import LSTMModel, TransformerModel
from s4mil_monai.models.transmil import TransMIL

LONGEST = 62_235
"""Patches of the longest slide of the paper's data sets."""


class TextbookS4D(S4D):
    """The same layer with the kernel materialised for every mode."""

    def convolve(self, u: Tensor, *, computation: str = "textbook") -> Tensor:
        """(B, L, H) → (B, L, H) by FFT with a kernel of (H, N/2, L) numbers."""
        L = u.shape[1]
        A = -self.log_A_real.exp() + 1j * self.A_imag
        dtA = A * self.log_dt.exp().unsqueeze(-1)
        C = torch.view_as_complex(self.C) * (dtA.exp() - 1) / A
        K = 2 * torch.einsum("hn,hnl->hl", C, torch.exp(dtA.unsqueeze(-1) * torch.arange(L))).real
        u_hat = torch.fft.rfft(u.transpose(1, 2), n=2 * L)
        y = torch.fft.irfft(u_hat * torch.fft.rfft(K, n=2 * L), n=2 * L)[..., :L]
        return y.transpose(1, 2) + u * self.D

    def mix_channels(self, y: Tensor) -> Tensor:
        """As the base class, through ``F.linear``."""
        return F.glu(self.mix(F.gelu(y)), dim=-1)


class TextbookS4MIL(S4MIL):
    """S4MIL on the textbook layer, the whole bag at once."""

    def __init__(self, state_dim: int):
        super().__init__(1024, state_dim=state_dim)
        self.blocks = nn.Sequential(nn.Sequential(nn.LayerNorm(512), TextbookS4D(512, state_dim=state_dim)))

    def forward(self, features: Tensor, mask: Tensor | None = None):
        """(1, L, 1024) → the slide's logits, without anything else."""
        values = self.blocks(F.relu(self.project(features)))
        return self.head(values.max(dim=1).values)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mean pooling": lambda: PooledModel(1024, pooling="mean"),
    "max pooling": lambda: PooledModel(1024, pooling="max"),
    "transformer": lambda: TransformerModel(1024),
    "LSTM": lambda: LSTMModel(1024),
    "CLAM-SB": lambda: ClamSB(1024),
    "CLAM-MB": lambda: ClamMB(1024),
    "TransMIL": lambda: TransMIL(1024),
    "S4MIL, N = 128": lambda: S4MIL(1024, state_dim=128),
    "S4MIL, N = 32": lambda: S4MIL(1024, state_dim=32),
    "textbook S4MIL, N = 128": lambda: TextbookS4MIL(128),
    "textbook S4MIL, N = 32": lambda: TextbookS4MIL(32),
    "floor": lambda: S4MIL(1024, state_dim=32),
}
SLOW = ("textbook S4MIL, N = 128", "transformer")
"""Rows that get fewer runs."""


def main(length: int = 30_000, runs: int = 5) -> None:
    """Print the three tables."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, large buffers kept\n")
    forward = {name: measure(name, length, "forward", 1 if name in SLOW else runs) for name in MODELS}
    print(f"Forward pass, L = {length:,}\n\n| model | parameters | ms | peak MB | textbook : this |")
    print("|---|---|---|---|---|")
    for name, row in forward.items():
        parameters = "" if name == "floor" else f"{row['parameters']:,}"
        print(f"| {name} | {parameters} | {row['ms']:.0f} | {row['peak_mb']:.0f} | {_ratio(name, forward)} |")
    print("\nTraining step (forward and backward)\n\n| model | L | ms | peak MB | textbook : this |")
    print("|---|---|---|---|---|")
    for state_dim in (32, 128):
        names = [f"S4MIL, N = {state_dim}", f"textbook S4MIL, N = {state_dim}"]
        steps = {name: measure(name, 10_000, "train", 2 if "textbook" in name else runs) for name in names}
        for name, row in steps.items():
            print(f"| {name} | 10,000 | {row['ms']:.0f} | {row['peak_mb']:.0f} | {_ratio(name, steps)} |")
    row = measure("S4MIL, N = 128", LONGEST, "train", 2)
    print(f"| S4MIL, N = 128 | {LONGEST:,} | {row['ms']:.0f} | {row['peak_mb']:.0f} | |")
    row = measure("S4MIL, N = 128", LONGEST, "forward", 3)
    print(f"\nLongest slide, forward, N = 128, L = {LONGEST:,}: {row['ms']:.0f} ms, peak {row['peak_mb']:.0f} MB")


def _ratio(name: str, rows: dict[str, dict]) -> str:
    textbook = rows.get(f"textbook {name}")
    return f"{textbook['ms'] / rows[name]['ms']:.1f}" if textbook else ""


def measure(name: str, length: int, task: str, runs: int) -> dict:
    """One row, in a process of its own."""
    command = [sys.executable, __file__, "row", name, str(length), task, str(runs)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def row(name: str, length: int, task: str, runs: int) -> None:
    """Measure and print as JSON."""
    keep_large_buffers()
    torch.manual_seed(0)
    model = MODELS[name]().train(task == "train")
    features = torch.randn(1, length, 1024)
    step = _floor(model, length) if isinstance(model, S4MIL) and name == "floor" else _step(model, features, task)
    before = _peak_mb()
    step()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    parameters = sum(p.numel() for p in model.parameters())
    result = {"ms": 1000 * statistics.median(times), "peak_mb": _peak_mb() - before, "parameters": parameters}
    print(json.dumps(result))


def _step(model: nn.Module, features: Tensor, task: str) -> Callable[[], None]:
    def logits() -> Tensor:
        output = model(features)
        return output.logits if isinstance(model, BagModel) and not isinstance(output, Tensor) else output

    def forward() -> None:
        with torch.inference_mode():
            logits()

    def train() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(logits(), torch.tensor([1])).backward()

    return forward if task == "forward" else train


def _floor(model: S4MIL, length: int) -> Callable[[], None]:
    """The two products by the faster route, found by trying both."""
    layers = (model.project, model.layers()[0][1].mix)
    inputs = [torch.randn(1, length, layer.in_features) for layer in layers]

    def run(route: Callable[[nn.Linear, Tensor], Tensor]) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for layer, x in zip(layers, inputs, strict=True):
                route(layer, x)
        return time.perf_counter() - started

    routes = (fast_linear, lambda layer, x: layer(x))
    best = min(routes, key=lambda route: min(run(route) for _ in range(3)))
    return lambda: run(best)  # type: ignore[return-value]


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    Fire({"main": main, "row": row}) if sys.argv[1:2] == ["row"] else Fire(main)
