"""The step as an ONNX graph of fixed shape, without custom operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s4mil_monai.extras import require
from s4mil_monai.onnx_graphs import export_graph
from s4mil_monai.streaming.chunk_step import ChunkStep
from s4mil_monai.streaming.runtime import StepShape

OPSET = 20
"""The first with GELU as an operator."""

STATE = ("ssm", "running_max", "winners", "start")
INPUTS = (*STATE, "features", "valid")
OUTPUTS = (*(f"next_{name}" for name in STATE), "patch_logits", "logits")


def sizes_of(shape: StepShape) -> dict[str, tuple[int, ...]]:
    """Shape of each input and output, by name."""
    state: dict[str, tuple[int, ...]] = {
        "ssm": (shape.layers, shape.width, 2, shape.modes),
        "running_max": (shape.width,),
        "winners": (shape.width,),
        "start": (1,),
    }
    return {
        **state,
        "features": (shape.chunk, shape.in_features),
        "valid": (shape.chunk,),
        **{f"next_{name}": size for name, size in state.items()},
        "patch_logits": (shape.chunk, shape.patch_classes),
        "logits": (shape.classes,),
    }


class FlatStep(nn.Module):
    """The step with one flat tuple of outputs, in the order of :data:`OUTPUTS`."""

    def __init__(self, step: ChunkStep):
        super().__init__()
        self.step = step

    def forward(
        self, ssm: Tensor, running_max: Tensor, winners: Tensor, start: Tensor, features: Tensor, valid: Tensor
    ) -> tuple[Tensor, ...]:
        """As :meth:`ChunkStep.forward`."""
        output = self.step(ssm, running_max, winners, start, features, valid)
        return (*output.state, output.patch_logits, output.logits)


def example_inputs(step: ChunkStep, chunk: int) -> tuple[Tensor, ...]:
    """Inputs of the right shapes: the first chunk of a slide."""
    return (*step.first_state(), torch.zeros(chunk, step.in_features), torch.ones(chunk, dtype=torch.bool))


def to_onnx(step: ChunkStep, *, chunk: int) -> bytes:
    """Export a step on the CPU; checked by ONNX's own checker.

    Args:
        step: The step.
        chunk: T, fixed in the graph.

    Raises:
        MissingExtraError: ONNX is not installed.
    """
    program = export_graph(
        FlatStep(step).eval(),
        example_inputs(step, chunk),
        opset_version=OPSET,
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
    )
    onnx = require("onnx", extra="onnx")
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program.model_proto.SerializeToString()
