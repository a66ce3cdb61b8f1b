"""Backbones by name: ours, torchvision's ResNets, any timm model. `FaceModel` is built on one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from facefast.models import iresnet, mobilefacenet

# torchvision and timm are imported where one of their models is built: they take seconds to load.
TIMM = "timm/"
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
RESNET_STAGES = {
    "stem": ("conv1", "bn1"),
    "stage1": ("layer1",),
    "stage2": ("layer2",),
    "stage3": ("layer3",),
    "stage4": ("layer4",),
}
NAMES = ("mobilefacenet", *iresnet.DEPTHS, *RESNETS)


class Backbone(NamedTuple):
    """A network from pictures [B, 3, H, W] to [B, size]."""

    module: nn.Module
    size: int
    """Numbers it gives for a picture."""
    stages: Mapping[str, Sequence[str]]
    """Stage name -> names of parameters or of modules that hold them, from the picture to the embedding."""
    embeds: bool
    """Whether it ends in an embedding layer of its own."""


def build_backbone(name: str, shape: tuple[int, int], embedding: int = 0) -> Backbone:
    """Builds a backbone with random weights.

    Args:
        name: one of `NAMES`, or timm/NAME for any model that timm knows.
        shape: (height, width) of the pictures.
        embedding: size of the embedding layer of backbones that have one; 0 is their usual size. The others end in
            pooled features, whose size is given.

    Raises:
        ValueError: an unknown name, or a model that cannot take pictures of this shape.
    """
    if name == "mobilefacenet":
        size = embedding or 128
        network = mobilefacenet.MobileFaceNet(shape, size)
        return Backbone(network, size, mobilefacenet.STAGES, embeds=True)
    if name in iresnet.DEPTHS:
        size = embedding or 512
        return Backbone(iresnet.IResNet(iresnet.DEPTHS[name], shape, size), size, iresnet.STAGES, embeds=True)
    if name in RESNETS:
        return _build_resnet(name)
    if name.startswith(TIMM):
        return _build_timm(name, shape)
    raise ValueError(
        f"backbone {name!r} is unknown; it must be one of {', '.join(NAMES)} or timm/NAME with "
        "a name that timm.list_models() gives"
    )


def _build_resnet(name: str) -> Backbone:
    import torchvision

    network: nn.Module = torchvision.models.get_model(name, weights=None)
    classifier = network.get_submodule("fc")
    assert isinstance(classifier, nn.Linear)
    network.register_module("fc", nn.Identity())
    return Backbone(network, classifier.in_features, RESNET_STAGES, embeds=False)


def _build_timm(name: str, shape: tuple[int, int]) -> Backbone:
    import timm

    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=4)
        raise ValueError(
            f"timm has no model {model!r}"
            + (f"; close to it: {', '.join(close)}" if close else "; see timm.list_models()")
        )
    network: nn.Module = timm.create_model(model, pretrained=False, num_classes=0)
    resize = getattr(network, "set_input_size", None)  # transformers with a position table
    if resize is not None:
        resize(img_size=shape)
    try:
        with torch.no_grad():  # what a model gives for a picture is not written down reliably
            out = network.eval()(torch.zeros(1, 3, *shape))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{name} cannot take pictures of {shape[0]}x{shape[1]} pixels ({error}); choose "
            "another image.size or backbone"
        ) from error
    if out.ndim != 2:
        raise ValueError(f"{name} gives {tuple(out.shape)} for one picture, not a vector")
    stages = _timm_stages(network)
    return Backbone(network.train(), out.shape[1], stages, embeds=False)


def _timm_stages(network: nn.Module) -> dict[str, list[str]]:
    """timm's own coarse groups of layers; a model without them is one stage."""
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        return {"stage1": [name for name, _ in network.named_parameters()]}
    from timm.models import group_parameters

    groups = group_parameters(network, matcher(coarse=True))
    return {f"stage{k}" if k else "stem": list(names) for k, names in sorted(groups.items())}
