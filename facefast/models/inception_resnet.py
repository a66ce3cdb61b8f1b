"""Inception-ResNet v1 (Szegedy et al. 2016, arXiv:1602.07261) as FaceNet's successors use it.

Names of layers and parameters are those of github.com/timesler/facenet-pytorch, so that its files, themselves converted
from davidsandberg/facenet, load key for key.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facefast.models.fused import RELU, norm_act

EPSILON = 0.001  # TensorFlow's for BatchNorm, with which the published weights were trained
DROPOUT = 0.6
FEATURES = 1792
SMALLEST = 75
"""Pixels on a side below which the last feature map is empty."""
STAGES = {
    "stem": ("conv2d_1a", "conv2d_2a", "conv2d_2b", "conv2d_3b", "conv2d_4a", "conv2d_4b"),
    "stage1": ("repeat_1", "mixed_6a"),
    "stage2": ("repeat_2", "mixed_7a"),
    "stage3": ("repeat_3", "block8"),
    "embedding": ("last_linear", "last_bn"),
}
Kernel = int | tuple[int, int]


class Conv(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out, H', W']."""
        return norm_act(self.bn, RELU, self.conv(x), training=self.training)


class Residual(nn.Module):
    """Branches side by side, joined by a 1 x 1 convolution, scaled and added to the input.

    Args:
        channels: of input and output.
        branches: from `channels` each, named branch0, branch1, ...
        width: channels of the branches together.
        scale: factor on what is added.
        last: no ReLU after the sum.
    """

    def __init__(self, channels: int, branches: list[nn.Module], width: int, scale: float, last: bool = False) -> None:
        super().__init__()
        self.branches = len(branches)
        for k, branch in enumerate(branches):
            self.add_module(f"branch{k}", branch)
        self.conv2d = nn.Conv2d(width, channels, 1)
        self.scale = scale
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to the same shape."""
        joined = torch.cat([self.get_submodule(f"branch{k}")(x) for k in range(self.branches)], 1)
        out: Tensor = self.conv2d(joined) * self.scale + x
        return out if self.last else F.relu(out)


class Reduction(nn.Module):
    """Branches side by side that halve the map, beside a pooling that does: branch0, branch1, ..."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = len(branches)
        for k, branch in enumerate(branches):
            self.add_module(f"branch{k}", branch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, more channels, H / 2, W / 2]."""
        found = [self.get_submodule(f"branch{k}")(x) for k in range(self.branches)]
        return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)


def _block35() -> Residual:
    branches: list[nn.Module] = [
        Conv(256, 32, 1),
        nn.Sequential(Conv(256, 32, 1), Conv(32, 32, 3, padding=1)),
        nn.Sequential(Conv(256, 32, 1), Conv(32, 32, 3, padding=1), Conv(32, 32, 3, padding=1)),
    ]
    return Residual(256, branches, 96, 0.17)


def _block17() -> Residual:
    factored = (Conv(896, 128, 1), Conv(128, 128, (1, 7), padding=(0, 3)), Conv(128, 128, (7, 1), padding=(3, 0)))
    return Residual(896, [Conv(896, 128, 1), nn.Sequential(*factored)], 256, 0.1)


def _block8(scale: float = 0.2, last: bool = False) -> Residual:
    factored = (Conv(1792, 192, 1), Conv(192, 192, (1, 3), padding=(0, 1)), Conv(192, 192, (3, 1), padding=(1, 0)))
    return Residual(1792, [Conv(1792, 192, 1), nn.Sequential(*factored)], 384, scale, last)


class InceptionResNetV1(nn.Module):
    """Pictures [B, 3, H, W] of any size from 75 pixels on to embeddings [B, embedding].

    Args:
        shape: (height, width) of the pictures; a trained network takes others too.
        embedding: numbers in an embedding.

    Raises:
        ValueError: smaller pictures.
    """

    def __init__(self, shape: tuple[int, int], embedding: int = 512) -> None:
        super().__init__()
        if min(shape) < SMALLEST:
            raise ValueError(
                f"inception_resnet_v1 cannot take pictures of {shape[0]}x{shape[1]} pixels; image.size must be at "
                f"least {SMALLEST}"
            )
        self.conv2d_1a = Conv(3, 32, 3, 2)
        self.conv2d_2a = Conv(32, 32, 3)
        self.conv2d_2b = Conv(32, 64, 3, padding=1)
        self.conv2d_3b = Conv(64, 80, 1)
        self.conv2d_4a = Conv(80, 192, 3)
        self.conv2d_4b = Conv(192, 256, 3, 2)
        self.repeat_1 = nn.Sequential(*(_block35() for _ in range(5)))
        self.mixed_6a = Reduction(
            [
                Conv(256, 384, 3, 2),
                nn.Sequential(Conv(256, 192, 1), Conv(192, 192, 3, padding=1), Conv(192, 256, 3, 2)),
            ]
        )
        self.repeat_2 = nn.Sequential(*(_block17() for _ in range(10)))
        self.mixed_7a = Reduction(
            [
                nn.Sequential(Conv(896, 256, 1), Conv(256, 384, 3, 2)),
                nn.Sequential(Conv(896, 256, 1), Conv(256, 256, 3, 2)),
                nn.Sequential(Conv(896, 256, 1), Conv(256, 256, 3, padding=1), Conv(256, 256, 3, 2)),
            ]
        )
        self.repeat_3 = nn.Sequential(*(_block8() for _ in range(5)))
        self.block8 = _block8(scale=1.0, last=True)
        self.dropout = nn.Dropout(DROPOUT)
        self.last_linear = nn.Linear(FEATURES, embedding, bias=False)
        self.last_bn = nn.BatchNorm1d(embedding, eps=EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to embeddings [B, embedding], not normalised."""
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(images)))
        x = self.conv2d_3b(F.max_pool2d(x, 3, 2))
        x = self.conv2d_4b(self.conv2d_4a(x))
        x = self.mixed_6a(self.repeat_1(x))
        x = self.mixed_7a(self.repeat_2(x))
        x = self.block8(self.repeat_3(x))
        embeddings: Tensor = self.last_bn(self.last_linear(self.dropout(x.mean((2, 3)))))
        return embeddings
