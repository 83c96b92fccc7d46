"""The step in PyTorch: on the CPU as it is, on an NVIDIA GPU as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from s4mil_monai.models.s4d import BLOCK
from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.streaming.chunk_step import ChunkState, ChunkStep
from s4mil_monai.streaming.cuda_graph import Buffers, GraphedSlide, make_buffers
from s4mil_monai.streaming.runtime import CHUNK, Maxima, Runtime, SlideState, fill_up, shape_of


class TorchRuntime(Runtime):
    """Runs the step of a model in PyTorch; nothing needs to be exported.

    Args:
        model: The slide or the multitask form.
        chunk: T, a multiple of 64.
        precision: Of products; ``float32``, ``float16`` or ``bfloat16``.
        device: Where it computes.
        scripted: The same step in TorchScript, for whole chunks, to run in its place.

    Raises:
        ValueError: No such precision, or another chunk.
    """

    name = "torch"

    def __init__(
        self,
        model: S4MIL,
        *,
        chunk: int = CHUNK,
        precision: str = "float32",
        device: str | torch.device = "cpu",
        scripted: Callable[..., tuple[Tensor, ...]] | None = None,
    ):
        if chunk < BLOCK or chunk % BLOCK:
            raise ValueError(f"a chunk is a multiple of {BLOCK} patches, got {chunk}")
        self.step = ChunkStep(model, precision=precision).to(device)
        self.precision, self.device, self.scripted = precision, torch.device(device), scripted
        self.shape = shape_of(self.step, chunk)
        self._warm_up()

    def open(self) -> SlideState:
        """Begin a slide."""
        if self.device.type != "cuda":
            return _EagerSlide(self)
        buffers = make_buffers(self.shape, self.device)
        return GraphedSlide(self.shape, buffers, lambda: self._launch(buffers))

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Pack the weights now, not while the first slide's score is awaited."""
        features = torch.zeros(BLOCK, self.shape.in_features, device=self.device)
        self.step(*self.step.first_state(), features, features[:, 0] == 0)

    @torch.inference_mode()
    def _launch(self, buffers: Buffers) -> None:
        """One step over the buffers, as a CUDA graph records it."""
        output = self.step(*buffers.state, buffers.features, buffers.valid)
        for kept, new in zip(buffers.state, output.state, strict=True):
            kept.copy_(new)
        buffers.patch_logits.copy_(output.patch_logits)
        buffers.logits.copy_(output.logits)


class _EagerSlide(SlideState):
    """A slide on the CPU; the last step is only as long as it has to be."""

    def __init__(self, runtime: TorchRuntime):
        self._runtime, self._device = runtime, runtime.device
        self._state: ChunkState = runtime.step.first_state()
        self._logits: Tensor | None = None

    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)  # the step has a precision of its own
    def read(self, features: Tensor) -> Tensor:
        count = len(features)
        scripted = self._runtime.scripted
        length = self._runtime.shape.chunk if scripted else -(-count // BLOCK) * BLOCK
        filled = fill_up(features.to(self._device), length)
        valid = torch.arange(length, device=self._device) < count
        if scripted is None:
            self._state, patch_logits, self._logits = self._runtime.step(*self._state, filled, valid)
        else:
            *state, patch_logits, self._logits = scripted(*self._state, filled, valid)
            self._state = ChunkState(*state)
        return patch_logits[:count].cpu()

    def maxima(self) -> Maxima:
        assert self._logits is not None
        state = self._state
        return Maxima(state.running_max.cpu(), state.winners.long().cpu(), self._logits.cpu())
