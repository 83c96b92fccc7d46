"""ONNX, for encoders and for the aggregator's step: how a graph is exported, how ONNX Runtime starts on one."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s4mil_monai.extras import require

TALKATIVE = ("torch.onnx", "onnxscript", "onnx_ir", "torch.onnx._internal.exporter._registration")
"""Loggers that tell of every constant they touch, and miss torchvision, which nothing here uses."""


def import_onnxruntime() -> Any:
    """ONNX Runtime, kept from reporting to its maker.

    Its official builds send events to Microsoft and keep an identifier of the machine in ``~/.cache/Microsoft``,
    unless this variable says otherwise before it is imported; who wants that can set it to 0.

    Raises:
        MissingExtraError: It is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return require("onnxruntime", extra="onnx")


def start_session(graph: Path | bytes, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> Any:
    """Start ONNX Runtime on a graph, with as many threads as torch has.

    Args:
        graph: The file, or its content.
        providers: Of execution, the best first.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        Exception: It refuses the graph; its errors have no common class.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what is wrong comes back as an error
    # its threads would otherwise wait busily beside whatever else needs the cores
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        str(graph) if isinstance(graph, Path) else graph, options, providers=list(providers)
    )


def export_graph(network: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> Any:
    """Export a network by torch's exporter, which says nothing while it does.

    Args:
        network: On the CPU, in evaluation mode.
        inputs: Examples.
        options: As ``torch.onnx.export`` has them.

    Returns:
        torch's ``ONNXProgram``.

    Raises:
        MissingExtraError: The exporter is not installed.
        RuntimeError: The network cannot be exported.
    """
    require("onnx", extra="onnx")
    require("onnxscript", extra="onnx")
    with warnings.catch_warnings(), _hushed():
        warnings.simplefilter("ignore")  # the exporter's own imports use what torch deprecates
        return torch.onnx.export(network, inputs, dynamo=True, verbose=False, **options)


@contextmanager
def _hushed() -> Iterator[None]:
    """Talkative loggers say nothing below an error."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
