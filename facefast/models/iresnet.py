"""IResNet (Duta et al. 2020, arXiv:2004.04989) as face recognition uses it.

Names of layers and parameters are those of InsightFace's arcface_torch, so that its `backbone.pth` files load key for
key.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from facefast.models.fused import Layers, adds_nothing, norm_act
from facefast.models.residual import drop_paths

DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
REDUCTION = 16
STAGES = {
    "stem": ("conv1", "bn1", "prelu"),
    "stage1": ("layer1",),
    "stage2": ("layer2",),
    "stage3": ("layer3",),
    "stage4": ("layer4",),
    "embedding": ("bn2", "fc", "features"),
}


class Block(nn.Module):
    """BN, convolution, BN, PReLU, convolution, BN, plus the input; `drop` is the branch's stochastic depth."""

    def __init__(self, channels: int, out: int, stride: int, drop: nn.Module) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.prelu = nn.PReLU(out)
        self.conv2 = nn.Conv2d(out, out, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = Layers(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out, H / stride, W / stride]."""
        out = self.conv1(norm_act(self.bn1, None, x, training=self.training))
        out = self.conv2(norm_act(self.bn2, self.prelu, out, training=self.training))
        shortcut = x if self.downsample is None else self.downsample(x)
        if adds_nothing(self.drop):
            return norm_act(self.bn3, None, out, shortcut, training=self.training)
        dropped: Tensor = self.drop(norm_act(self.bn3, None, out, training=self.training))
        return dropped + shortcut


class FixedScaleBatchNorm(nn.BatchNorm1d):
    """BatchNorm that learns its bias only: a learned scale would undo the normalisation of the embedding.

    The scale is a buffer, not a frozen parameter, so that no policy of freezing and unfreezing can set it free.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        del self.weight
        self.register_buffer("weight", torch.ones(size))


class IResNet(nn.Module):
    """Pictures [B, 3, H, W] to embeddings [B, embedding].

    Args:
        depths: blocks of each of the four stages, see `DEPTHS`.
        shape: (height, width) of the pictures; the last layer has a weight per cell of the last feature map, so a
            trained network takes this shape only.
        embedding: numbers in an embedding.
        drop_path: stochastic depth of the last block, see `residual.drop_paths`.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        shape: tuple[int, int],
        embedding: int = 512,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        drop = drop_paths(drop_path, sum(depths))
        self.layer1 = _stage(64, 64, depths[0], drop)
        self.layer2 = _stage(64, 128, depths[1], drop)
        self.layer3 = _stage(128, 256, depths[2], drop)
        self.layer4 = _stage(256, 512, depths[3], drop)
        self.bn2 = nn.BatchNorm2d(512)
        cells = math.ceil(shape[0] / REDUCTION) * math.ceil(shape[1] / REDUCTION)
        self.fc = nn.Linear(512 * cells, embedding)
        self.features = FixedScaleBatchNorm(embedding)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to embeddings [B, embedding], not normalised."""
        x = norm_act(self.bn1, self.prelu, self.conv1(images), training=self.training)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = norm_act(self.bn2, None, x, training=self.training)
        embeddings: Tensor = self.features(self.fc(x.flatten(1)))
        return embeddings


def _stage(channels: int, out: int, count: int, drop: Callable[[], nn.Module]) -> nn.Sequential:
    blocks = [Block(channels if i == 0 else out, out, 2 if i == 0 else 1, drop()) for i in range(count)]
    return nn.Sequential(*blocks)
