"""torchvision's ResNets (He et al. 2016, arXiv:1512.03385), their blocks calling BatchNorm and ReLU in one pass.

Layers, their names and their results in evaluation are torchvision's. A module of its own because torchvision takes
seconds to load.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from facefast.models.fused import Layers, norm_act


class FusedBasicBlock(BasicBlock):  # type: ignore[misc] # torchvision has no types
    """torchvision's, in fewer passes."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H / stride, W / stride]."""
        out = norm_act(self.bn1, self.relu, self.conv1(x), training=self.training)
        identity = x if self.downsample is None else self.downsample(x)
        return norm_act(self.bn2, self.relu, self.conv2(out), identity, training=self.training)


class FusedBottleneck(Bottleneck):  # type: ignore[misc] # torchvision has no types
    """torchvision's, in fewer passes."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H / stride, W / stride]."""
        out = norm_act(self.bn1, self.relu, self.conv1(x), training=self.training)
        out = norm_act(self.bn2, self.relu, self.conv2(out), training=self.training)
        identity = x if self.downsample is None else self.downsample(x)
        return norm_act(self.bn3, self.relu, self.conv3(out), identity, training=self.training)


class FusedResNet(ResNet):  # type: ignore[misc] # torchvision has no types
    """torchvision's, in fewer passes."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_act(self.bn1, self.relu, self.conv1(x), training=self.training))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(self.avgpool(x).flatten(1))
        return out


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    ResNet: FusedResNet,
}


def build(name: str) -> nn.Module:
    """torchvision's model of this name, with random weights."""
    network: nn.Module = get_model(name, weights=None)
    for module in network.modules():
        module.__class__ = _FUSED.get(type(module), type(module))
        downsample = getattr(module, "downsample", None)
        if isinstance(downsample, nn.Sequential):
            downsample.__class__ = Layers
    return network
