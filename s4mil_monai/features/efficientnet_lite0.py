"""EfficientNet-Lite0 as a patch encoder, with the parameter names of the public PyTorch conversion.

Tan and Le, "EfficientNet", ICML 2019, in TensorFlow's "lite" form: no squeeze and excitation, ReLU6, stem and
head of fixed width. The weights come from TensorFlow, hence its "SAME" padding (one more pixel at the right
and bottom for stride 2) and batch norm epsilon of 1e-3.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 1280
"""Features of a patch."""

STAGES = (
    # expansion, channels, blocks, stride, kernel
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow's "SAME"."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1):
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.stride[0] > 1:
            left, right = self._pads(input.shape[3])
            top, bottom = self._pads(input.shape[2])
            input = F.pad(input, [left, right, top, bottom])
        return self._conv_forward(input, self.weight, self.bias)  # TorchScript knows no super()

    def _pads(self, side: int) -> tuple[int, int]:
        stride, kernel = self.stride[0], self.kernel_size[0]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        return total // 2, total - total // 2


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class MBConv(nn.Module):
    """Expand, depthwise, project; added to its input where shapes agree."""

    __constants__ = ("expands",)

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int, kernel: int):
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = SameConv2d(inputs, hidden, 1)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride=stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv = SameConv2d(hidden, outputs, 1)
        self._bn2 = _norm(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        if self.expands:
            hidden = F.relu6(self._bn0(self._expand_conv(x)))
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.adds else hidden


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) normalised patches → (B, 1280) features, mean pooled after the head convolution."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList()
        inputs = 32
        for expansion, outputs, blocks, stride, kernel in STAGES:
            for block in range(blocks):
                self._blocks.append(
                    MBConv(
                        inputs,
                        outputs,
                        expansion=expansion,
                        stride=stride if block == 0 else 1,
                        kernel=kernel,
                    )
                )
                inputs = outputs
        self._conv_head = SameConv2d(inputs, WIDTH, 1)
        self._bn1 = _norm(WIDTH)

    def forward(self, patches: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(patches)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
