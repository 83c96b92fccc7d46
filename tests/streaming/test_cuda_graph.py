"""What a slide on a GPU holds on to; the graph itself runs where there is one."""

from __future__ import annotations

import gc
import weakref

from s4mil_monai.streaming.stream import SlideStream
from s4mil_monai.streaming.torch_runtime import TorchRuntime
from tests.streaming.conftest import make_model


def test_open_slide_holds_its_runtime_and_so_the_weights_its_graph_points_at():
    runtime = TorchRuntime(make_model(), chunk=64)
    held = weakref.ref(runtime)
    stream = SlideStream(runtime)
    del runtime
    gc.collect()
    assert held() is not None
    del stream
    gc.collect()
    assert held() is None
