"""ResNet-50 and SE-ResNet-50 of VGGFace2 (Cao et al. 2018, arXiv:1710.08092).

Names of layers and parameters are those of github.com/cydonia999/VGGFace2-pytorch, which torchvision's ResNet-50 has
too; the squeeze-and-excitation layers are called conv4 and conv5. The networks are Caffe's: a block's stride lies in
its first 1 x 1 convolution, and the first pooling starts at the picture's edge and keeps what is left over at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facefast.models.fused import RELU, Layers, norm_act

DEPTHS = (3, 4, 6, 3)
FEATURES = 2048
SQUEEZE = 16
NAMES = ("vggface2_resnet50", "vggface2_senet50")
STAGES = {
    "stem": ("conv1", "bn1"),
    "stage1": ("layer1",),
    "stage2": ("layer2",),
    "stage3": ("layer3",),
    "stage4": ("layer4",),
}


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution, squeeze and excitation where `squeeze`, plus the input."""

    def __init__(self, channels: int, width: int, stride: int, first: bool, squeeze: bool) -> None:
        super().__init__()
        out = width * 4
        self.conv1 = nn.Conv2d(channels, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.squeeze = squeeze
        if squeeze:
            self.conv4 = nn.Conv2d(out, out // SQUEEZE, 1)
            self.conv5 = nn.Conv2d(out // SQUEEZE, out, 1)
        self.downsample: nn.Module | None = None
        if first:
            self.downsample = Layers(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, 4 width, H / stride, W / stride]."""
        out = norm_act(self.bn1, RELU, self.conv1(x), training=self.training)
        out = norm_act(self.bn2, RELU, self.conv2(out), training=self.training)
        shortcut = x if self.downsample is None else self.downsample(x)
        if not self.squeeze:
            return norm_act(self.bn3, RELU, self.conv3(out), shortcut, training=self.training)
        out = norm_act(self.bn3, None, self.conv3(out), training=self.training)
        excitation = self.conv5(F.relu(self.conv4(out.mean((2, 3), keepdim=True))))
        out = out * excitation.sigmoid()
        return F.relu(out + shortcut)


class VGGFace2Net(nn.Module):
    """Pictures [B, 3, H, W] to pooled features [B, 2048], none below 0.

    Args:
        squeeze: SE-ResNet-50 instead of ResNet-50.
    """

    def __init__(self, squeeze: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, DEPTHS[0], 1, squeeze)
        self.layer2 = _stage(256, 128, DEPTHS[1], 2, squeeze)
        self.layer3 = _stage(512, 256, DEPTHS[2], 2, squeeze)
        self.layer4 = _stage(1024, 512, DEPTHS[3], 2, squeeze)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to features [B, 2048]."""
        x = norm_act(self.bn1, RELU, self.conv1(images), training=self.training)
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        # The published 7 x 7 average pooling is this one at 224 pixels.
        return torch.mean(x, (2, 3))


def _stage(channels: int, width: int, count: int, stride: int, squeeze: bool) -> nn.Sequential:
    first = Bottleneck(channels, width, stride, True, squeeze)
    return nn.Sequential(first, *(Bottleneck(width * 4, width, 1, False, squeeze) for _ in range(count - 1)))
