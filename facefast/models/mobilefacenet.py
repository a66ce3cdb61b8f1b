"""MobileFaceNet (Chen et al. 2018, arXiv:1804.07573), built by `backbones` for face sizes of any shape.

Names of layers and parameters are those of github.com/Xiaoccer/MobileFaceNet_Pytorch, so that its checkpoints load key
for key.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

# Expansion, channels, blocks, stride of the first block: table 1 of the paper.
BLOCKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
REDUCTION = 16
STAGES = {
    "stem": ("conv1", "dw_conv1"),
    "stage1": tuple(f"blocks.{i}" for i in range(5)),
    "stage2": tuple(f"blocks.{i}" for i in range(5, 12)),
    "stage3": tuple(f"blocks.{i}" for i in range(12, 15)),
    "embedding": ("conv2", "linear7", "linear1"),
}


class ConvBlock(nn.Module):
    """Convolution, BatchNorm and, unless `linear`, PReLU; `groups` equal to `channels` is depthwise."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.prelu = nn.Identity() if linear else nn.PReLU(out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out, H', W']."""
        out: Tensor = self.prelu(self.bn(self.conv(x)))
        return out


class Bottleneck(nn.Module):
    """Inverted residual with a linear bottleneck (MobileNetV2) and PReLU."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.connect = stride == 1 and channels == out
        self.conv = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.PReLU(wide),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.PReLU(wide),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out, H / stride, W / stride]."""
        out: Tensor = self.conv(x)
        return x + out if self.connect else out


class MobileFaceNet(nn.Module):
    """Pictures [B, 3, H, W] to embeddings [B, embedding].

    Args:
        shape: (height, width) of the pictures; the global depthwise convolution has a weight per cell of the last
            feature map, so a trained network takes this shape only.
        embedding: numbers in an embedding.
    """

    def __init__(self, shape: tuple[int, int], embedding: int = 128) -> None:
        super().__init__()
        self.conv1 = ConvBlock(3, 64, 3, stride=2, padding=1)
        self.dw_conv1 = ConvBlock(64, 64, 3, padding=1, groups=64)
        blocks, channels = [], 64
        for expansion, out, count, stride in BLOCKS:
            for i in range(count):
                blocks.append(Bottleneck(channels, out, stride if i == 0 else 1, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = ConvBlock(channels, 512, 1)
        grid = (math.ceil(shape[0] / REDUCTION), math.ceil(shape[1] / REDUCTION))
        self.linear7 = ConvBlock(512, 512, grid, groups=512, linear=True)
        self.linear1 = ConvBlock(512, embedding, 1, linear=True)
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
