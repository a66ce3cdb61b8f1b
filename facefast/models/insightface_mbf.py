"""InsightFace's MobileFaceNet ("mbf").

Names of layers and parameters are those of arcface_torch (backbones/mobilefacenet.py, `get_mbf`), so that its files
load key for key. It is wider than the paper's network, which is `mobilefacenet`: twice the channels between blocks, a
second convolution that is grouped but not depthwise, and 512 numbers from a linear layer.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from facefast.models.fused import Layers, adds_nothing
from facefast.models.residual import drop_paths

# Channels, channels inside a block, stride and number of blocks, residual or not, after the two first layers.
BLOCKS = (
    (128, 128, 2, 1, False),
    (128, 128, 1, 4, True),
    (256, 256, 2, 1, False),
    (256, 256, 1, 6, True),
    (256, 512, 2, 1, False),
    (256, 256, 1, 2, True),
)
FIRST, GROUPS, LAST = 128, 64, 512
REDUCTION = 16
STAGES = {
    "stem": ("layers.0", "layers.1"),
    "stage1": ("layers.2", "layers.3"),
    "stage2": ("layers.4", "layers.5"),
    "stage3": ("layers.6", "layers.7"),
    "embedding": ("conv_sep", "features"),
}


class Unit(nn.Module):
    """Convolution, BatchNorm and, unless `linear`, PReLU."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.layers = Layers(
            nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(out)
        )
        if not linear:
            self.layers.append(nn.PReLU(out))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, channels, H, W] to [B, out, H', W'], plus what is like it."""
        out: Tensor = self.layers(x, residual)
        return out


class Bottleneck(nn.Module):
    """Widen, depthwise convolution, narrow; plus the input where `residual`, with stochastic depth `drop`."""

    def __init__(self, channels: int, out: int, wide: int, stride: int, residual: bool, drop: nn.Module) -> None:
        super().__init__()
        self.layers = Layers(
            Unit(channels, wide),
            Unit(wide, wide, 3, stride=stride, padding=1, groups=wide),
            Unit(wide, out, linear=True),
        )
        self.residual = residual
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out, H / stride, W / stride]."""
        if self.residual and adds_nothing(self.drop):
            out: Tensor = self.layers(x, x)
            return out
        out = self.drop(self.layers(x))
        return x + out if self.residual else out


class Run(nn.Module):
    """Residual blocks in a row, under the published name `layers`."""

    def __init__(self, blocks: list[Bottleneck]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to the same shape."""
        out: Tensor = self.layers(x)
        return out


class GlobalDepthwise(nn.Module):
    """A weight per cell of the last feature map, then the embedding: [B, 512, H, W] to [B, embedding]."""

    def __init__(self, grid: tuple[int, int], embedding: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Unit(LAST, LAST, grid, groups=LAST, linear=True),
            nn.Flatten(),
            nn.Linear(LAST, embedding, bias=False),
            nn.BatchNorm1d(embedding),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 512, H, W] to [B, embedding]."""
        out: Tensor = self.layers(x)
        return out


class InsightFaceMobileFaceNet(nn.Module):
    """Pictures [B, 3, H, W] to embeddings [B, embedding].

    Args:
        shape: (height, width) of the pictures; a trained network takes this shape only.
        embedding: numbers in an embedding.
        drop_path: stochastic depth of the last residual block, see `residual.drop_paths`.
    """

    def __init__(self, shape: tuple[int, int], embedding: int = 512, drop_path: float = 0.0) -> None:
        super().__init__()
        next_drop = drop_paths(drop_path, sum(count for *_, count, residual in BLOCKS if residual))
        self.layers = nn.ModuleList(
            [Unit(3, FIRST, 3, stride=2, padding=1), Unit(FIRST, FIRST, 3, padding=1, groups=GROUPS)]
        )
        channels = FIRST
        for out, wide, stride, count, residual in BLOCKS:
            if residual:
                blocks = [Bottleneck(channels, out, wide, stride, True, next_drop()) for _ in range(count)]
                self.layers.append(Run(blocks))
            else:
                self.layers.append(Bottleneck(channels, out, wide, stride, False, nn.Identity()))
            channels = out
        self.conv_sep = Unit(channels, LAST)
        grid = (math.ceil(shape[0] / REDUCTION), math.ceil(shape[1] / REDUCTION))
        self.features = GlobalDepthwise(grid, embedding)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # torch counts a grouped layer's fan-out too large: its fan-in is the same number, counted right.
                nn.init.kaiming_normal_(module.weight, mode="fan_out" if module.groups == 1 else "fan_in")

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to embeddings [B, embedding], not normalised."""
        x = images
        for layer in self.layers:
            x = layer(x)
        embeddings: Tensor = self.features(self.conv_sep(x))
        return embeddings
