"""The exported step in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s4mil_monai.errors import ExportError, MissingExtraError, first_line
from s4mil_monai.onnx_graphs import start_session
from s4mil_monai.streaming.manifest import check_file
from s4mil_monai.streaming.onnx_export import INPUTS, OUTPUTS, sizes_of
from s4mil_monai.streaming.runtime import Maxima, Runtime, SlideState, StepShape, fill_up


class OnnxRuntime(Runtime):
    """Runs an exported step on the CPU.

    Args:
        content: The ONNX graph.
        precision: Of its products.
        shape: Its sizes.
        path: What errors call it.

    Raises:
        ExportError: ONNX Runtime cannot run it: it is damaged, or of a precision that the CPU form lacks.
        MissingExtraError: ONNX Runtime is not installed.
    """

    name = "onnxruntime"

    def __init__(self, content: bytes, *, precision: str, shape: StepShape, path: str = "step"):
        self.precision, self.shape = precision, shape
        try:
            self.session = start_session(content)
        except MissingExtraError:
            raise
        except Exception as error:  # of no common class
            raise ExportError(
                path, f"ONNX Runtime cannot run it ({first_line(error)}); export it again"
            ) from error
        for end in self.session.get_inputs():
            if tuple(end.shape) != sizes_of(shape).get(end.name):
                raise ExportError(path, f"{end.name} is {tuple(end.shape)}, which its manifest does not say")

    def open(self) -> SlideState:
        """Begin a slide."""
        return _OnnxSlide(self.session, self.shape)


def load_onnx(path: Path, *, precision: str, model_sha256: str) -> OnnxRuntime:
    """Load an exported step, with its manifest beside it.

    Args:
        path: The ``.onnx`` file.
        precision: Of its products.
        model_sha256: Of the weights the step has to be of.

    Raises:
        ExportError: The file or its manifest is missing or damaged, or as :class:`OnnxRuntime`.
        MisfitError: It is of another precision or model.
        MissingExtraError: ONNX Runtime is not installed.
    """
    content, manifest = check_file(path, kind="onnx", precision=precision, model_sha256=model_sha256)
    return OnnxRuntime(content, precision=manifest.precision, shape=manifest.shape, path=str(path))


class _OnnxSlide(SlideState):
    def __init__(self, session: Any, shape: StepShape):
        self._session, self._shape = session, shape
        self._state: list[NDArray[Any]] = [tensor.numpy() for tensor in shape.first_state()]
        self._logits: NDArray[np.float32] | None = None

    def read(self, features: Tensor) -> Tensor:
        count = len(features)
        chunk = fill_up(features.cpu(), self._shape.chunk).numpy()
        valid = np.arange(self._shape.chunk) < count
        *self._state, patch_logits, self._logits = self._session.run(
            list(OUTPUTS), dict(zip(INPUTS, (*self._state, chunk, valid), strict=True))
        )
        return torch.from_numpy(patch_logits[:count])

    def maxima(self) -> Maxima:
        assert self._logits is not None
        _, running_max, winners, _ = self._state
        return Maxima(
            torch.from_numpy(running_max), torch.from_numpy(winners).long(), torch.from_numpy(self._logits)
        )
