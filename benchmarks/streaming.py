"""The streamed aggregator: speed beside the textbook model and beside its matrix products alone, memory, growth.

    python benchmarks/streaming.py [--runs 7]                      # the CPU rows
    python benchmarks/streaming.py gpu [--library tensorrt]        # the GPU rows, on an NVIDIA GPU

Each row is a process of its own with large buffers kept. What is compared runs in turns in one process, so that a
machine whose speed drifts treats both alike; a ratio is that of the medians. Streams give winners and patch logits
as well.

"products" are the two large matrix products of S4MIL (1024 to 512 and 512 to 1024) and nothing else, over all
patches, by the fastest of the routes there are: `F.linear`, a 1x1 convolution, and oneDNN's packed product, each
over the whole bag and over chunks. For ONNX Runtime they are a graph of these two products, chunk by chunk.
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
from aggregators import TextbookS4MIL
from fire import Fire
from torch import Tensor

from s4mil_monai.allocator import keep_large_buffers
from s4mil_monai.errors import S4MilError
from s4mil_monai.models.fast_linear import fast_linear
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.onnx_graphs import start_session
from s4mil_monai.streaming.chunk_step import ChunkStep
from s4mil_monai.streaming.onnx_export import OPSET, to_onnx
from s4mil_monai.streaming.onnx_runtime import OnnxRuntime
from s4mil_monai.streaming.packed_linear import PackedLinear
from s4mil_monai.streaming.runtime import CHUNK, Runtime, shape_of
from s4mil_monai.streaming.stream import SlideStream
from s4mil_monai.streaming.tensorrt_build import build_engine, choose_library, current_capability
from s4mil_monai.streaming.torch_runtime import TorchRuntime

LENGTH = 30_000
LONG, SHORT = 1_000_000, 10_000
Step = Callable[[], object]


def main(runs: int = 7) -> None:
    """Print the CPU rows beside their goals."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, chunks of {CHUNK}, large buffers kept\n")
    print("| what | goal | measured | by |\n|---|---|---|---|")
    textbook = run_row("textbook", 32, runs)
    print(_line("textbook : streamed, N = 32", "at least 32", textbook, "textbook", "streamed"))
    for state_dim, goal in ((32, "at most 1.5"), (128, "at most 2")):
        found = run_row("products", state_dim, runs)
        print(_line(f"streamed : products, N = {state_dim}", goal, found, "streamed", "products"))
    for state_dim in (32, 128):
        found = run_row("onnx", state_dim, runs)
        goal = "at most 1.8" if state_dim == 32 else "none"
        print(_line(f"ONNX Runtime : its products, N = {state_dim}", goal, found, "streamed", "products"))
    memory = run_row("memory", 32, 1)
    print(f"| peak memory above start, L = {LONG:,} | at most 150 MB | {memory['mb']:.0f} MB | |")
    growth = run_row("growth", 32, 3)
    print(
        f"| time per patch, L = {LONG:,} : L = {SHORT:,} | at most 1.05 | {growth['long'] / growth['short']:.3f} "
        f"| {1e6 * growth['long']:.2f} : {1e6 * growth['short']:.2f} µs |"
    )
    delay = run_row("delay", 32, runs)
    print(f"| last patch to score, CPU, chunks of 512 | at most 50 ms | {delay['median']:.1f} ms "
          f"| largest of {delay['runs']}: {delay['largest']:.1f} ms |")  # fmt: skip


def _line(what: str, goal: str, found: dict, above: str, below: str) -> str:
    ratio = found[above] / found[below]
    return f"| {what} | {goal} | {ratio:.2f} | {1000 * found[above]:.0f} : {1000 * found[below]:.0f} ms |"


def gpu(library: str | None = None, runs: int = 20) -> None:
    """Print the GPU rows: PyTorch with CUDA graphs, and TensorRT if it can be had."""
    model = make_model(32)
    features = torch.randn(LENGTH, 1024, device="cuda").abs()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, L = {LENGTH:,}, features on the GPU\n")
    print("| runtime | precision | ms, median | goal |\n|---|---|---|---|")
    for precision in ("bfloat16", "float32"):
        for chunk in (2048, 8192, 15_360):
            row = _time_gpu(TorchRuntime(model, chunk=chunk, precision=precision, device="cuda"), features, runs)
            print(f"| torch, chunks of {chunk:,} | {precision} | {row:.3f} | at most 0.4 |")
    try:
        chosen = choose_library(library)
    except S4MilError as missing:
        print(f"\nno TensorRT row: {missing}")
        return
    from s4mil_monai.streaming.tensorrt_runtime import TensorRTRuntime

    for precision in ("bfloat16", "float32"):
        step = ChunkStep(model, precision=precision)
        engine = build_engine(to_onnx(step, chunk=CHUNK), library=chosen, targets=(str(current_capability()),))
        runtime = TensorRTRuntime(engine.plan, library=chosen, precision=precision, shape=shape_of(step, CHUNK))
        print(
            f"| {chosen} {engine.version} | {precision} | {_time_gpu(runtime, features, runs):.3f} | at most 0.4 |"
        )


def _time_gpu(runtime: Runtime, features: Tensor, runs: int) -> float:
    """Milliseconds from one slide's features to its score, its graph recorded before."""
    from s4mil_monai.streaming.cuda_graph import GraphedSlide

    slide = runtime.open()
    assert isinstance(slide, GraphedSlide)
    chunks = features.split(runtime.shape.chunk)

    def run() -> None:
        slide.restart()
        for chunk in chunks:
            slide.read(chunk)
        slide.maxima()

    return 1000 * in_turns({"all": run}, runs)["all"]


def run_row(name: str, state_dim: int, runs: int) -> dict:
    """One row, in a process of its own."""
    command = [sys.executable, __file__, "row", name, str(state_dim), str(runs)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def row(name: str, state_dim: int, runs: int) -> None:
    """Measure and print as JSON."""
    keep_large_buffers()
    torch.manual_seed(0)
    print(json.dumps(ROWS[name](make_model(state_dim), runs)))


def make_model(state_dim: int) -> S4MIL:
    """The paper's slide model with random weights."""
    return S4MIL(1024, state_dim=state_dim).eval().requires_grad_(False)


def against_textbook(model: S4MIL, runs: int) -> dict[str, float]:
    """The streamed model and the textbook's."""
    textbook = TextbookS4MIL(32)
    textbook.load_state_dict(model.state_dict())
    features = torch.randn(LENGTH, 1024)
    runtime = TorchRuntime(model)
    difference = (textbook(features.unsqueeze(0)) - stream(runtime, features)).abs().max()
    assert difference < 1e-4, f"streamed and textbook differ by {difference}"
    return in_turns(
        {"streamed": lambda: stream(runtime, features), "textbook": lambda: textbook(features.unsqueeze(0))},
        min(runs, 3),
    )


def against_products(model: S4MIL, runs: int) -> dict[str, float]:
    """The streamed model and its two products alone, by their fastest route."""
    features, values = torch.randn(LENGTH, 1024), torch.randn(LENGTH, 512)
    runtime = TorchRuntime(model)
    routes = {f"products {i}": route for i, route in enumerate(product_routes(model, features, values))}
    found = in_turns({"streamed": lambda: stream(runtime, features), **routes}, runs)
    return {"streamed": found["streamed"], "products": min(found[name] for name in routes)}


def product_routes(model: S4MIL, features: Tensor, values: Tensor) -> list[Step]:
    """The two products by every route, over the whole bag and over chunks."""
    layers = (model.project, model.layers()[0][1].mix)

    def route(apply: Callable[[int, Tensor], Tensor], length: int) -> Step:
        def run() -> None:
            for part in features.split(length):
                apply(0, part)
            for part in values.split(length):
                apply(1, part)

        return run

    packed = [PackedLinear(layer.weight, layer.bias, torch.float32) for layer in layers]
    ways: list[Callable[[int, Tensor], Tensor]] = [
        lambda i, x: layers[i](x),
        lambda i, x: fast_linear(layers[i], x.unsqueeze(0)),
        lambda i, x: packed[i](x),
    ]
    return [route(way, length) for way in ways for length in (LENGTH, CHUNK)]


def onnx_against_products(model: S4MIL, runs: int) -> dict[str, float]:
    """The exported step in ONNX Runtime and a graph of its two products."""
    step = ChunkStep(model)
    runtime = OnnxRuntime(to_onnx(step, chunk=CHUNK), precision="float32", shape=shape_of(step, CHUNK))
    products = start_session(_products_graph(model))
    chunk, values = torch.randn(CHUNK, 1024).numpy(), torch.randn(CHUNK, 512).numpy()
    features = torch.randn(LENGTH // CHUNK * CHUNK, 1024)

    def multiply() -> None:
        for _ in range(len(features) // CHUNK):
            products.run(None, {"x0": chunk, "x1": values})

    return in_turns({"streamed": lambda: stream(runtime, features), "products": multiply}, runs)


def _products_graph(model: S4MIL) -> bytes:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, inputs, outputs, weights = [], [], [], []
    for i, layer in enumerate((model.project, model.layers()[0][1].mix)):
        weights += [numpy_helper.from_array(layer.weight.detach().numpy(), f"w{i}")]
        weights += [numpy_helper.from_array(layer.bias.detach().numpy(), f"b{i}")]
        inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [CHUNK, layer.in_features]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [CHUNK, layer.out_features]))
        nodes.append(helper.make_node("Gemm", [f"x{i}", f"w{i}", f"b{i}"], [f"y{i}"], transB=1))
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def memory(model: S4MIL, runs: int) -> dict[str, float]:
    """Peak resident memory above what is held before the first patch; features are made block by block."""
    slide = SlideStream(TorchRuntime(model))
    before = _resident_mb()
    for length in _pieces(LONG):
        slide.add(torch.randn(length, 1024))
    slide.finish()
    return {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}


def _pieces(length: int) -> list[int]:
    return [CHUNK] * (length // CHUNK) + [length % CHUNK] * bool(length % CHUNK)


def _resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def growth(model: S4MIL, runs: int) -> dict[str, float]:
    """Seconds per patch of a long and of a short slide; the features of a few chunks come again and again."""
    runtime = TorchRuntime(model)
    pool = torch.randn(8, CHUNK, 1024).unbind(0)

    def read(length: int) -> None:
        slide = SlideStream(runtime)
        for i, size in enumerate(_pieces(length)):
            slide.add(pool[i % len(pool)][:size])
        slide.finish()

    repeats = LONG // SHORT // 4

    def short() -> None:
        for _ in range(repeats):
            read(SHORT)

    found = in_turns({"long": lambda: read(LONG), "short": short}, runs)
    return {"long": found["long"] / LONG, "short": found["short"] / (repeats * SHORT)}


def delay(model: S4MIL, runs: int) -> dict[str, float]:
    """Milliseconds from the last features to the score, with as many patches waiting as there can be."""
    from s4mil_monai.streaming.choose import CPU_CHUNK

    runtime = TorchRuntime(model, chunk=CPU_CHUNK)
    waits = []
    for _ in range(10 * runs):
        slide = SlideStream(runtime)
        slide.add(torch.randn(3 * CPU_CHUNK - 17, 1024))
        started = time.perf_counter()
        slide.add(torch.randn(16, 1024))
        output = slide.finish()
        model.take_apart(output)
        waits.append(1000 * (time.perf_counter() - started))
    return {"median": statistics.median(waits), "largest": max(waits), "runs": len(waits)}


def stream(runtime: Runtime, features: Tensor) -> Tensor:
    """Logits of one slide."""
    slide = SlideStream(runtime)
    slide.add(features)
    return slide.finish().logits


@torch.inference_mode()
def in_turns(steps: dict[str, Step], runs: int) -> dict[str, float]:
    """Median seconds of each, after one run that does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(runs + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


ROWS: dict[str, Callable[[S4MIL, int], dict]] = {
    "textbook": against_textbook,
    "products": against_products,
    "onnx": onnx_against_products,
    "memory": memory,
    "growth": growth,
    "delay": delay,
}

if __name__ == "__main__":
    Fire({"main": main, "gpu": gpu, "row": row}) if sys.argv[1:2] in (["row"], ["gpu"]) else Fire(main)
