"""What a published state dict is: its backbone and the pictures it was trained on, read off its keys and shapes.

`source.load_source` asks `recognise`; a further published layout is one function here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from facefast.models import iresnet
from facefast.recipe import ImageSpec

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
IMAGENET_CLASSES = 1000
WHOLE_CONTRACT = frozenset({"size", "width", "template", "mean", "std", "color"})
NORMALISATION = frozenset({"mean", "std", "color"})

# (bottleneck blocks, blocks per stage), as torchvision builds them.
RESNET_DEPTHS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


class Layout(NamedTuple):
    """What is known of a source model beside its numbers."""

    backbone: str
    embedding: int = 0
    """Numbers in an embedding; 0 is the backbone's own."""
    image: ImageSpec | None = None
    """The pictures it was trained on; None where the file does not tell."""
    fixed: frozenset[str] = frozenset()
    """Fields of `image` that the weights depend on; the others are only usual."""


def recognise(state: Mapping[str, Tensor]) -> Layout | None:
    """The layout of a state dict whose prefixes are stripped, or None where it is not one we know."""
    for known in (_mobilefacenet, _iresnet, _resnet):
        layout = known(state)
        if layout is not None:
            return layout
    return None


def _mobilefacenet(state: Mapping[str, Tensor]) -> Layout | None:
    """Xiaoccer's MobileFaceNet: the kernel of the global depthwise convolution tells the size of the pictures."""
    kernel, last = state.get("linear7.conv.weight"), state.get("linear1.conv.weight")
    if kernel is None or last is None or "dw_conv1.conv.weight" not in state:
        return None
    std = (128.0, 128.0, 128.0)
    images: dict[tuple[int, ...], ImageSpec] = {
        (7, 6): ImageSpec(size=112, width=96, template="arcface_112x96", std=std),
        (7, 7): ImageSpec(size=112, template="arcface", std=std),
    }
    image = images.get(tuple(kernel.shape[2:]))
    return Layout("mobilefacenet", last.shape[0], image, WHOLE_CONTRACT if image else frozenset())


def _iresnet(state: Mapping[str, Tensor]) -> Layout | None:
    """InsightFace's IResNet: 7 x 7 cells before the last layer are pictures of 112 x 112."""
    last = state.get("fc.weight")
    depths: dict[tuple[int, ...], str] = {counts: name for name, counts in iresnet.DEPTHS.items()}
    name = depths.get(_block_counts(state))
    if last is None or name is None or not {"layer1.0.prelu.weight", "features.weight"} <= set(state):
        return None
    if last.shape[1] != 512 * 7 * 7:
        return Layout(name, last.shape[0])
    return Layout(name, last.shape[0], ImageSpec(size=112, template="arcface"), WHOLE_CONTRACT)


def _resnet(state: Mapping[str, Tensor]) -> Layout | None:
    """torchvision's ResNet. One with another head than ImageNet's has seen other pictures, we cannot know which."""
    first = state.get("layer1.0.conv2.weight")
    name = RESNET_DEPTHS.get(("layer1.0.conv3.weight" in state, _block_counts(state)))
    if name is None or first is None or tuple(first.shape) != (64, 64, 3, 3) or "bn1.weight" not in state:
        return None
    if "layer1.0.prelu.weight" in state:
        return None
    head = state.get("fc.weight")
    if head is not None and head.shape[0] != IMAGENET_CLASSES:
        return Layout(name)
    return Layout(name, image=ImageSpec(size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD), fixed=NORMALISATION)


def _block_counts(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks in layer1 to layer4."""
    blocks = {tuple(key.split(".")[:2]) for key in state if key.startswith("layer")}
    return tuple(sum(block[0] == f"layer{k}" for block in blocks) for k in range(1, 5))
