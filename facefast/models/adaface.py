"""The residual network of AdaFace (Kim et al. 2022, arXiv:2204.00964).

Names of layers and parameters are those of github.com/mk-minchul/AdaFace (net.py), so that its checkpoints load key for
key. It differs from `iresnet` in its shortcuts (a block that keeps its channels takes every second pixel as it is) and
in an embedding whose BatchNorm learns nothing.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from facefast.models.fused import Layers, adds_nothing
from facefast.models.residual import drop_paths

# Blocks of the four stages. The published IR-101 has 100 layers by this count.
DEPTHS = {
    "adaface_ir18": (2, 2, 2, 2),
    "adaface_ir50": (3, 4, 14, 3),
    "adaface_ir101": (3, 13, 30, 3),
}
CHANNELS = (64, 128, 256, 512)
REDUCTION = 16
DROPOUT = 0.4


class Block(nn.Module):
    """BN, convolution, BN, PReLU, convolution, BN, plus the input; `drop` is the branch's stochastic depth."""

    def __init__(self, channels: int, out: int, stride: int, drop: nn.Module) -> None:
        super().__init__()
        if channels == out:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = Layers(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.res_layer = Layers(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.PReLU(out),
            nn.Conv2d(out, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out, H / stride, W / stride]."""
        shortcut = self.shortcut_layer(x)
        out: Tensor = (
            self.res_layer(x, shortcut) if adds_nothing(self.drop) else self.drop(self.res_layer(x)) + shortcut
        )
        return out


class AdaFaceIR(nn.Module):
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
        self.input_layer = Layers(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        drop = drop_paths(drop_path, sum(depths))
        blocks, channels = [], 64
        for out, count in zip(CHANNELS, depths, strict=True):
            for i in range(count):
                blocks.append(Block(channels, out, 2 if i == 0 else 1, drop()))
                channels = out
        self.body = nn.Sequential(*blocks)
        cells = math.ceil(shape[0] / REDUCTION) * math.ceil(shape[1] / REDUCTION)
        self.output_layer = Layers(
            nn.BatchNorm2d(channels),
            nn.Dropout(DROPOUT),
            nn.Flatten(),
            nn.Linear(channels * cells, embedding),
            nn.BatchNorm1d(embedding, affine=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to embeddings [B, embedding], not normalised."""
        embeddings: Tensor = self.output_layer(self.body(self.input_layer(images)))
        return embeddings


def stages(depths: tuple[int, int, int, int]) -> dict[str, tuple[str, ...]]:
    """Stage names and what they hold: the published network numbers its blocks through, whatever their stage."""
    named: dict[str, tuple[str, ...]] = {"stem": ("input_layer",)}
    first = 0
    for k, count in enumerate(depths, start=1):
        named[f"stage{k}"] = tuple(f"body.{i}" for i in range(first, first + count))
        first += count
    return named | {"embedding": ("output_layer",)}
