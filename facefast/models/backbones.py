"""Backbones by name: ours, torchvision's ResNets, any timm model. `FaceModel` is built on one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from facefast.models import adaface, inception_resnet, insightface_mbf, iresnet, mobilefacenet, vggface, vggface2

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
DEPTHWISE = ("mobilefacenet", "mobilefacenet_short", "mobilefacenet_half", "insightface_mbf")
"""Backbones of ours that are made of depthwise convolutions."""
NAMES = (
    *DEPTHWISE,
    *iresnet.DEPTHS,
    *adaface.DEPTHS,
    "vggface",
    *vggface2.NAMES,
    "inception_resnet_v1",
    *RESNETS,
)
DROPPING = (*DEPTHWISE, *iresnet.DEPTHS, *adaface.DEPTHS)
"""Backbones of ours that have stochastic depth."""
STUDENTS = {
    "mobilefacenet": "mobilefacenet_short",
    "iresnet200": "iresnet100",
    "iresnet100": "iresnet50",
    "iresnet50": "iresnet34",
    "iresnet34": "iresnet18",
    "adaface_ir101": "adaface_ir50",
    "adaface_ir50": "adaface_ir18",
    "resnet152": "resnet50",
    "resnet101": "resnet50",
    "resnet34": "resnet18",
}
"""The next shallower network of the same kind, which can start from the layers of the larger one."""


class Backbone(NamedTuple):
    """A network from pictures [B, 3, H, W] to [B, size]."""

    module: nn.Module
    size: int
    """Numbers it gives for a picture."""
    stages: Mapping[str, Sequence[str]]
    """Stage name -> names of parameters or of modules that hold them, from the picture to the embedding."""
    embeds: bool
    """Whether it ends in an embedding layer of its own."""


def build_backbone(name: str, shape: tuple[int, int], embedding: int = 0, drop_path: float = 0.0) -> Backbone:
    """Builds a backbone with random weights.

    Args:
        name: one of `NAMES`, or timm/NAME for any model that timm knows.
        shape: (height, width) of the pictures.
        embedding: size of the embedding layer of backbones that have one; 0 is their usual size. The others end in
            features, whose size is given.
        drop_path: stochastic depth of the last residual block, see `residual.drop_paths`; without effect on the names
            of a state dict.

    Raises:
        ValueError: an unknown name, a model that cannot take pictures of this shape, or `drop_path` for one that has no
            stochastic depth.
    """
    if name.startswith(TIMM):
        return _build_timm(name, shape, drop_path)
    if name not in NAMES:
        raise ValueError(
            f"backbone {name!r} is unknown; it must be one of {', '.join(NAMES)} or timm/NAME with "
            "a name that timm.list_models() gives"
        )
    if drop_path and name not in DROPPING:
        raise _no_drop_path(name, drop_path)
    if name in RESNETS:
        return _build_resnet(name)
    if name == "vggface":
        return Backbone(vggface.VGGFace(shape), vggface.DESCRIPTOR, vggface.STAGES, embeds=False)
    if name in vggface2.NAMES:
        network = vggface2.VGGFace2Net(squeeze=name == "vggface2_senet50")
        return Backbone(network, vggface2.FEATURES, vggface2.STAGES, embeds=False)
    return _build_embedding(name, shape, embedding or (128 if name.startswith("mobilefacenet") else 512), drop_path)


def _build_embedding(name: str, shape: tuple[int, int], size: int, drop_path: float) -> Backbone:
    """The backbones that end in an embedding layer of their own."""
    network: nn.Module
    stages: Mapping[str, Sequence[str]]
    if name.startswith("mobilefacenet"):
        blocks = mobilefacenet.SHORT if name == "mobilefacenet_short" else mobilefacenet.BLOCKS
        half: dict[str, Any] = {"width": 0.5, "activation": mobilefacenet.relu} if name == "mobilefacenet_half" else {}
        network = mobilefacenet.MobileFaceNet(shape, size, blocks=blocks, drop_path=drop_path, **half)
        stages = mobilefacenet.stages(blocks)
    elif name == "insightface_mbf":
        network = insightface_mbf.InsightFaceMobileFaceNet(shape, size, drop_path)
        stages = insightface_mbf.STAGES
    elif name in iresnet.DEPTHS:
        network, stages = iresnet.IResNet(iresnet.DEPTHS[name], shape, size, drop_path), iresnet.STAGES
    elif name in adaface.DEPTHS:
        depths = adaface.DEPTHS[name]
        network, stages = adaface.AdaFaceIR(depths, shape, size, drop_path), adaface.stages(depths)
    else:
        assert name == "inception_resnet_v1"
        network, stages = inception_resnet.InceptionResNetV1(shape, size), inception_resnet.STAGES
    return Backbone(network, size, stages, embeds=True)


def _no_drop_path(name: str, drop_path: float) -> ValueError:
    return ValueError(
        f"model.drop_path {drop_path} has no effect on {name}; choose one of {', '.join(DROPPING)} or a timm model "
        "with residual blocks, or leave model.drop_path out"
    )


def _build_resnet(name: str) -> Backbone:
    from facefast.models import torchvision_resnet

    network = torchvision_resnet.build(name)
    classifier = network.get_submodule("fc")
    assert isinstance(classifier, nn.Linear)
    network.register_module("fc", nn.Identity())
    return Backbone(network, classifier.in_features, RESNET_STAGES, embeds=False)


def _build_timm(name: str, shape: tuple[int, int], drop_path: float) -> Backbone:
    import timm

    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=4)
        raise ValueError(
            f"timm has no model {model!r}"
            + (f"; close to it: {', '.join(close)}" if close else "; see timm.list_models()")
        )
    # Models without stochastic depth know no such argument, or take it and leave it alone.
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        network: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        if not drop_path:
            raise
        raise _no_drop_path(name, drop_path) from error
    if drop_path and not any(getattr(module, "drop_prob", None) for module in network.modules()):
        raise _no_drop_path(name, drop_path)
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
