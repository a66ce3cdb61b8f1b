"""A network for measuring alone: every BatchNorm that follows a convolution is folded into it.

A pass over the activations that computes next to nothing takes a processor as long as a convolution: MobileFaceNet
embeds in two thirds of the time without them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from facefast.models.face import FaceModel

AGREES = 1e-4
"""Part of the largest number of the embeddings by which folded ones may differ: rounding is a hundredth of it. A
convolution whose output somebody else reads too misses by far."""
ENCODES = ("backbone", "embedding", "linear_map")
"""The parts of a model that `encode` runs; no other is copied, for a head may be far larger."""


class _Folded(nn.BatchNorm2d):
    """What a folded BatchNorm leaves: of its kind still, for networks that ask before they add to it."""

    def forward(self, input: Tensor) -> Tensor:
        return input


@torch.inference_mode()
def folded(model: FaceModel, images: Tensor) -> FaceModel:
    """A model whose `encode` gives the same embeddings sooner, or the model itself where that cannot be had.

    Args:
        model: in evaluation mode, unchanged afterwards.
        images: [B, 3, H, W], some that it is to encode: by them it is seen which layers follow each other, and whether
            the answers are the same.
    """
    network = copy.copy(model)
    parts = {name: copy.deepcopy(part) for name, part in model._modules.items() if name in ENCODES}
    network._modules = model._modules | parts
    pairs, expected = _pairs(network, images)
    if not pairs:
        return model
    for conv, norm in pairs:
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        norm.__class__ = _Folded
    found = network.encode(images)
    if not float((found - expected).abs().max()) <= AGREES * float(expected.abs().max()):
        return model
    return network


def _pairs(network: FaceModel, images: Tensor) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], Tensor]:
    """Convolutions and the BatchNorm that takes what they give, as `images` pass; and what comes out in the end."""
    given: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    passes: dict[nn.Module, int] = {}

    def passed(conv: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        passes[conv] = passes.get(conv, 0) + 1
        given[id(out)] = conv, out  # the tensor too, or another could take its place in memory

    def taken(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        passes[norm] = passes.get(norm, 0) + 1
        if id(inputs[0]) in given:
            pairs.append((given.pop(id(inputs[0]))[0], norm))

    hooks = []
    for module in network.modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(passed))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and not module.training:
            hooks.append(module.register_forward_pre_hook(taken))
    out = network.encode(images)
    for hook in hooks:
        hook.remove()
    return [pair for pair in pairs if passes[pair[0]] == passes[pair[1]] == 1], out
