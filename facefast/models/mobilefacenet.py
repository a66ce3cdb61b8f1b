"""MobileFaceNet (Chen et al. 2018, arXiv:1804.07573), for pictures of any shape.

Names of layers and parameters are those of github.com/Xiaoccer/MobileFaceNet_Pytorch, so that its checkpoints load key
for key. There are two smaller ones: half of the residual blocks, to start from the layers of a whole one, and half the
channels with ReLU, for integer runtimes without PReLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from facefast.models.fused import Layers, adds_nothing, norm_act
from facefast.models.residual import drop_paths

# Expansion, channels, blocks, stride of the first block: table 1 of the paper.
BLOCKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
SHORT = ((2, 64, 3, 2), (4, 128, 1, 2), (2, 128, 3, 1), (4, 128, 1, 2), (2, 128, 1, 1))
"""Half of the residual blocks of each stage."""
REDUCTION = 16
Blocks = tuple[tuple[int, int, int, int], ...]
Activation = Callable[[int], nn.Module]
"""A layer for a number of channels, such as `nn.PReLU`."""


def relu(channels: int) -> nn.Module:
    """ReLU as an `Activation`: it needs no channels."""
    return nn.ReLU()


def stages(blocks: Blocks) -> dict[str, tuple[str, ...]]:
    """Stage names and what they hold; a block that halves the pictures begins one."""
    named: dict[str, tuple[str, ...]] = {"stem": ("conv1", "dw_conv1")}
    first = number = 0
    for _, _, count, stride in blocks:
        number += stride > 1
        stage = f"stage{number}"
        named[stage] = (*named.get(stage, ()), *(f"blocks.{i}" for i in range(first, first + count)))
        first += count
    return named | {"embedding": ("conv2", "linear7", "linear1")}


class ConvBlock(nn.Module):
    """Convolution, BatchNorm and, where there is one, an activation; `groups` equal to `channels` is depthwise."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.prelu = nn.Identity() if activation is None else activation(out)  # the published name, whatever it is

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out, H', W']."""
        return norm_act(self.bn, self.prelu, self.conv(x), training=self.training)


class Bottleneck(nn.Module):
    """Inverted residual with a linear bottleneck (MobileNetV2); `drop` is the branch's stochastic depth."""

    def __init__(
        self, channels: int, out: int, stride: int, expansion: int, activation: Activation, drop: nn.Module
    ) -> None:
        super().__init__()
        wide = channels * expansion
        self.connect = stride == 1 and channels == out
        self.conv = Layers(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            activation(wide),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            activation(wide),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out, H / stride, W / stride]."""
        if self.connect and adds_nothing(self.drop):
            out: Tensor = self.conv(x, x)
            return out
        out = self.drop(self.conv(x))
        return x + out if self.connect else out


class MobileFaceNet(nn.Module):
    """Pictures [B, 3, H, W] to embeddings [B, embedding].

    Args:
        shape: (height, width) of the pictures; the global depthwise convolution has a weight per cell of the last
            feature map, so a trained network takes this shape only.
        embedding: numbers in an embedding.
        blocks: as `BLOCKS`.
        width: factor on every number of channels of the paper.
        activation: what follows a BatchNorm; the paper's is PReLU.
        drop_path: stochastic depth of the last residual block, see `residual.drop_paths`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        embedding: int = 128,
        *,
        blocks: Blocks = BLOCKS,
        width: float = 1.0,
        activation: Activation = nn.PReLU,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        channels, last = round(64 * width), round(512 * width)
        self.conv1 = ConvBlock(3, channels, 3, stride=2, padding=1, activation=activation)
        self.dw_conv1 = ConvBlock(channels, channels, 3, padding=1, groups=channels, activation=activation)
        # A block that changes the number of channels or the stride adds nothing to its input and is never left out.
        next_drop = drop_paths(drop_path, sum(count - (stride > 1) for _, _, count, stride in blocks))
        layers = []
        for expansion, paper, count, stride in blocks:
            out = round(paper * width)
            for i in range(count):
                residual = i > 0 or stride == 1
                drop = next_drop() if residual else nn.Identity()
                layers.append(Bottleneck(channels, out, stride if i == 0 else 1, expansion, activation, drop))
                channels = out
        self.blocks = nn.Sequential(*layers)
        self.conv2 = ConvBlock(channels, last, 1, activation=activation)
        grid = (math.ceil(shape[0] / REDUCTION), math.ceil(shape[1] / REDUCTION))
        self.linear7 = ConvBlock(last, last, grid, groups=last)
        self.linear1 = ConvBlock(last, embedding, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Conv2d):  # torch counts a depthwise layer's fan-out C times too large
                nn.init.kaiming_normal_(module.weight, mode="fan_in")

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to embeddings [B, embedding], not normalised."""
        x = self.blocks(self.dw_conv1(self.conv1(images)))
        embeddings: Tensor = self.linear1(self.linear7(self.conv2(x)))
        return embeddings.flatten(1)
