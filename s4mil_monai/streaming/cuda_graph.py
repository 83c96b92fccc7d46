"""One slide on an NVIDIA GPU: fixed buffers, and the step recorded once as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from s4mil_monai.streaming.chunk_step import ChunkState
from s4mil_monai.streaming.runtime import Maxima, SlideState, StepShape

_one_capture_at_a_time = threading.Lock()

WARM_UP = 3
"""Steps before the graph is recorded, as PyTorch's documentation of CUDA graphs asks for."""


@dataclass(frozen=True)
class Buffers:
    """Everything a step reads and writes on the GPU, and the pinned memory beside it on the host."""

    state: ChunkState
    features: Tensor
    """(T, D) float32."""
    valid: Tensor
    """(T,) bool."""
    patch_logits: Tensor
    """(T, P) float32."""
    logits: Tensor
    """(C,) float32."""
    host_features: Tensor
    host_patch_logits: Tensor

    @torch.inference_mode()
    def reset(self, shape: StepShape) -> None:
        """The state before the first patch."""
        for kept, first in zip(self.state, shape.first_state(self.features.device), strict=True):
            kept.copy_(first)
        self.features.zero_()
        self.valid.fill_(True)


@torch.inference_mode()
def make_buffers(shape: StepShape, device: torch.device) -> Buffers:
    """Allocate the buffers of one slide."""

    def on_device(*size: int) -> Tensor:
        return torch.zeros(size, device=device)

    return Buffers(
        state=shape.first_state(device),
        features=on_device(shape.chunk, shape.in_features),
        valid=torch.ones(shape.chunk, dtype=torch.bool, device=device),
        patch_logits=on_device(shape.chunk, shape.patch_classes),
        logits=on_device(shape.classes),
        host_features=torch.empty(shape.chunk, shape.in_features, pin_memory=True),
        host_patch_logits=torch.empty(shape.chunk, shape.patch_classes, pin_memory=True),
    )


class GraphedSlide(SlideState):
    """A slide whose step is replayed from a CUDA graph.

    Args:
        shape: Of the step.
        buffers: Of this slide alone.
        launch: Enqueues one step over the buffers on PyTorch's current stream, the new state into the old one's
            place; must allocate nothing that outlives it.
    """

    def __init__(self, shape: StepShape, buffers: Buffers, launch: Callable[[], None]):
        self._shape, self._buffers = shape, buffers
        self._launch = launch  # holds what the graph's kernels point at
        self._stream = torch.cuda.Stream(buffers.features.device)
        self._stream.wait_stream(torch.cuda.current_stream(buffers.features.device))
        with _one_capture_at_a_time, torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                launch()
            self._graph = torch.cuda.CUDAGraph()
            # other threads may allocate meanwhile: patches of the next slide are being read
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                launch()
            buffers.reset(shape)

    @torch.inference_mode()
    def read(self, features: Tensor) -> Tensor:
        count, buffers = len(features), self._buffers
        self._stream.wait_stream(torch.cuda.current_stream(buffers.features.device))
        with torch.cuda.stream(self._stream):
            if features.device.type == "cpu":
                buffers.host_features[:count].copy_(features)
                features = buffers.host_features[:count]
            buffers.features[:count].copy_(features, non_blocking=True)
            if count < len(buffers.valid):
                buffers.features[count:].zero_()
                buffers.valid[count:].fill_(False)
            self._graph.replay()
            buffers.host_patch_logits.copy_(buffers.patch_logits, non_blocking=True)
        self._stream.synchronize()
        return buffers.host_patch_logits[:count].clone()

    def restart(self) -> None:
        """Begin another slide with the same buffers and the same graph."""
        self._stream.synchronize()
        self._buffers.reset(self._shape)
        torch.cuda.current_stream(self._buffers.features.device).synchronize()

    def maxima(self) -> Maxima:
        self._stream.synchronize()
        state = self._buffers.state
        return Maxima(state.running_max.cpu(), state.winners.long().cpu(), self._buffers.logits.cpu())
