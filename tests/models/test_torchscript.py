"""The compiled form against the model it comes from."""

from __future__ import annotations

import pytest
import torch

from s4mil_monai.models.s4mil import S4MIL
from s4mil_monai.models.torchscript import ExportableSlideLogits

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.mark.parametrize("options", [{}, {"layers": 2, "patch_classes": 2}, {"discretization": "bilinear"}])
def test_compiled_model_gives_the_same_logits_for_bags_of_any_length(options, tmp_path):
    torch.manual_seed(0)
    network = ExportableSlideLogits(S4MIL(5, classes=3, width=8, state_dim=4, **options)).eval()
    torch.jit.script(network).save(tmp_path / "model.ts")
    compiled = torch.jit.load(tmp_path / "model.ts")
    for length in (1, 63, 64, 65, 500):  # a block has 64
        image = torch.randn(2, 5, length)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(image), network(image), atol=1e-5, rtol=0)
