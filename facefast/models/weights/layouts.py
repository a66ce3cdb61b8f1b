"""What a published state dict is: its backbone and the pictures it was trained on, read off its keys and shapes.

A further published layout is one function here, and a place in `KNOWN`. The pictures of VGGFace, VGGFace2 and FaceNet
were cropped, not aligned: their contracts leave `template` open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from facefast.models import adaface, iresnet, vggface, vggface2
from facefast.models.weights import foreign
from facefast.recipe import ImageSpec

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
IMAGENET_CLASSES = 1000
VGGFACE2_CLASSES = 8631
WHOLE_CONTRACT = frozenset({"size", "width", "template", "mean", "std", "color"})
NORMALISATION = frozenset({"mean", "std", "color"})
SIZE = frozenset({"size", "width"})
UNSCALED = (1.0, 1.0, 1.0)

IMAGENET_IMAGE = ImageSpec(size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
INCEPTION_IMAGE = ImageSpec(size=299)
RESNETV2_IMAGE = ImageSpec(size=224)
ARCFACE_IMAGE = ImageSpec(size=112, template="arcface")
ADAFACE_IMAGE = ImageSpec(size=112, template="arcface", color="bgr")
FACENET_IMAGE = ImageSpec(size=160, std=(128.0, 128.0, 128.0))
# Means of the two data sets. Caffe, Torch7 and Keras order channels blue first, MatConvNet and its converters red.
VGGFACE_BGR = ImageSpec(size=224, mean=(93.5940, 104.7624, 129.1863), std=UNSCALED, color="bgr")
VGGFACE_RGB = ImageSpec(size=224, mean=(129.1863, 104.7624, 93.5940), std=UNSCALED)
VGGFACE2_BGR = ImageSpec(size=224, mean=(91.4953, 103.8827, 131.0912), std=UNSCALED, color="bgr")
VGGFACE2_RGB = ImageSpec(size=224, mean=(131.0912, 103.8827, 91.4953), std=UNSCALED)

# (bottleneck blocks, blocks per stage), as torchvision builds them.
RESNET_DEPTHS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
BLOCK_LAYERS = frozenset({"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample"})
Translate = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def keep(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a layout that has our names already."""
    return dict(state)


class Layout(NamedTuple):
    """What is known of a source model beside its numbers."""

    backbone: str
    embedding: int = 0
    """Numbers in an embedding; 0 is the backbone's own."""
    image: ImageSpec | None = None
    """The pictures it was trained on; None where nothing in the file shows it."""
    fixed: frozenset[str] = frozenset()
    """Fields of `image` that the weights depend on; the others are only usual."""
    translate: Translate = keep
    """Gives the tensors the backbone's names and axes."""


def recognise(state: Mapping[str, Tensor], wanted: str = "auto") -> Layout | None:
    """The layout of a state dict whose prefixes are stripped, or None where it is not one we know.

    Args:
        state: tensors by name.
        wanted: the backbone that the user named: some layouts are those of two networks with the same names and shapes
            (VGGFace2's ResNet-50 and torchvision's).
    """
    # All of them, not the first that fits: the user's word decides between two that nothing in the file tells apart.
    found = [layout for known in KNOWN if (layout := known(state)) is not None]
    return next((layout for layout in found if layout.backbone == wanted), found[0] if found else None)


def _mobilefacenet(state: Mapping[str, Tensor]) -> Layout | None:
    """Xiaoccer's MobileFaceNet: the kernel of the global depthwise convolution shows the size of the pictures."""
    kernel, last = state.get("linear7.conv.weight"), state.get("linear1.conv.weight")
    if kernel is None or last is None or "dw_conv1.conv.weight" not in state:
        return None
    # No files of our smaller ones are published: nothing shows their pictures.
    if "conv1.prelu.weight" not in state:
        return Layout("mobilefacenet_half", last.shape[0]) if kernel.shape[0] == 256 else None
    if "blocks.14.conv.0.weight" not in state:
        return Layout("mobilefacenet_short", last.shape[0]) if "blocks.8.conv.0.weight" in state else None
    std = (128.0, 128.0, 128.0)
    images: dict[tuple[int, ...], ImageSpec] = {
        (7, 6): ImageSpec(size=112, width=96, template="arcface_112x96", std=std),
        (7, 7): ImageSpec(size=112, template="arcface", std=std),
    }
    image = images.get(tuple(kernel.shape[2:]))
    return Layout("mobilefacenet", last.shape[0], image, WHOLE_CONTRACT if image else frozenset())


def _insightface_mbf(state: Mapping[str, Tensor]) -> Layout | None:
    """InsightFace's MobileFaceNet; the larger one, mbf_large, is another network."""
    first, last = state.get("layers.1.layers.0.weight"), state.get("features.layers.2.weight")
    kernel = state.get("features.layers.0.layers.0.weight")
    if first is None or last is None or kernel is None or tuple(first.shape) != (128, 2, 3, 3):
        return None
    if tuple(kernel.shape[2:]) != (7, 7):
        return Layout("insightface_mbf", last.shape[0])
    return Layout("insightface_mbf", last.shape[0], ARCFACE_IMAGE, WHOLE_CONTRACT)


def _iresnet(state: Mapping[str, Tensor]) -> Layout | None:
    """InsightFace's IResNet: 7 x 7 cells before the last layer are pictures of 112 x 112."""
    last = state.get("fc.weight")
    depths: dict[tuple[int, ...], str] = {counts: name for name, counts in iresnet.DEPTHS.items()}
    name = depths.get(_block_counts(state))
    if last is None or name is None or not {"layer1.0.prelu.weight", "features.weight"} <= set(state):
        return None
    if last.shape[1] != 512 * 7 * 7:
        return Layout(name, last.shape[0])
    return Layout(name, last.shape[0], ARCFACE_IMAGE, WHOLE_CONTRACT)


def _adaface(state: Mapping[str, Tensor]) -> Layout | None:
    """AdaFace's IR networks, by their number of blocks; those with squeeze and excitation are others."""
    last = state.get("output_layer.3.weight")
    blocks = {key.split(".")[1] for key in state if key.startswith("body.")}
    name = {sum(counts): name for name, counts in adaface.DEPTHS.items()}.get(len(blocks))
    if last is None or name is None or "body.0.res_layer.3.weight" not in state or "input_layer.0.weight" not in state:
        return None
    if any(".se_block." in key for key in state):
        return None
    if last.shape[1] != 512 * 7 * 7:
        return Layout(name, last.shape[0])
    return Layout(name, last.shape[0], ADAFACE_IMAGE, WHOLE_CONTRACT)


def _vggface(state: Mapping[str, Tensor]) -> Layout | None:
    """VGGFace with PyTorch's names, as in vgg_face_dag.pth, which takes red first.

    A port of Caffe's weights that has the same names takes blue first, and nothing in it shows that: mean and color are
    not fixed here.
    """
    first, last = state.get("conv1_1.weight"), state.get("conv5_3.weight")
    if first is None or last is None or (tuple(first.shape), last.shape[0]) != ((64, 3, 3, 3), 512):
        return None
    return _vgg("fc6.weight", state, VGGFACE_RGB, frozenset({"std"}), _flatten_linear)


def _vggface_caffe(state: Mapping[str, Tensor]) -> Layout | None:
    """VGGFace with Caffe's numbers of blobs, which takes blue first."""
    if "conv1_1/0" not in state or "conv5_3/0" not in state:
        return None
    return _vgg("fc6/0", state, VGGFACE_BGR, NORMALISATION, foreign.from_caffe)


def _vggface_torch7(state: Mapping[str, Tensor]) -> Layout | None:
    """Oxford's VGG_FACE.t7, which takes blue first. The mean is that of the training pictures; the demo that comes with
    the file takes red's from blue and blue's from red, so that it is not fixed here."""
    if not foreign.is_torch7_vgg(state):
        return None
    fc6 = _after_convolutions(foreign.torch7_kernels(state), ".weight")
    return _vgg(fc6, state, VGGFACE_BGR, frozenset({"std", "color"}), foreign.from_torch7)


def _vggface_keras(state: Mapping[str, Tensor]) -> Layout | None:
    """VGGFace with Keras' axes: keras-vggface's takes blue first; one whose layers have no names may take either."""
    if not foreign.is_keras_vgg(state):
        return None
    kernels = foreign.keras_kernels(state)
    named = kernels[0] == "conv1_1"
    fc6 = _after_convolutions(kernels, "/kernel")
    image, fixed = (VGGFACE_BGR, NORMALISATION) if named else (VGGFACE_RGB, frozenset({"std"}))
    return _vgg(fc6, state, image, fixed, foreign.from_keras)


def _after_convolutions(kernels: list[str], variable: str) -> str:
    """The name of fc6's kernel in a VGG-16 whose layers are known by their order; empty without one."""
    return f"{kernels[len(vggface.LAYERS)]}{variable}" if len(kernels) > len(vggface.LAYERS) else ""


def _vgg(
    fc6: str, state: Mapping[str, Tensor], image: ImageSpec, fixed: frozenset[str], translate: Translate
) -> Layout:
    """A VGGFace: 7 x 7 cells before fc6 are pictures of 224 x 224; without fc6 it takes any."""
    weight = state.get(fc6)
    if weight is None:
        return Layout("vggface", image=image, fixed=fixed, translate=translate)
    if weight.numel() != 512 * 7 * 7 * vggface.DESCRIPTOR:
        return Layout("vggface", translate=translate)
    return Layout("vggface", image=image, fixed=fixed | SIZE, translate=translate)


def _flatten_linear(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fully connected layers that were saved as convolutions [out, in, H, W] become linear."""
    return {k: v.flatten(1) if v.ndim == 4 and k.split(".")[0] in foreign.FLAT else v for k, v in state.items()}


def _vggface2(state: Mapping[str, Tensor]) -> Layout | None:
    """VGGFace2-pytorch's names: SE-ResNet-50 by its own layers, ResNet-50 by the number of its classes."""
    head = state.get("fc.weight")
    if "layer1.0.conv4.weight" in state:
        return _vggface2_by_names(state, "vggface2_senet50")
    if head is None or head.shape[0] != VGGFACE2_CLASSES:
        return None
    return _vggface2_by_names(state, "vggface2_resnet50")


def _vggface2_without_classes(state: Mapping[str, Tensor]) -> Layout | None:
    """VGGFace2's ResNet-50 by the names that it shares with torchvision's: taken where the user says so."""
    return _vggface2_by_names(state, "vggface2_resnet50")


def _vggface2_by_names(state: Mapping[str, Tensor], name: str) -> Layout | None:
    layers = BLOCK_LAYERS | ({"conv4", "conv5"} if name == "vggface2_senet50" else set())
    if _block_counts(state) != vggface2.DEPTHS or "layer1.0.conv3.weight" not in state:
        return None
    if not _is_resnet(state, layers):
        return None
    return Layout(name, image=VGGFACE2_BGR, fixed=NORMALISATION)


def _vggface2_foreign(state: Mapping[str, Tensor]) -> Layout | None:
    """The authors' names: Caffe's blobs and Keras' variables blue first, PyTorch's, from MatConvNet, red first."""
    name = "vggface2_senet50" if any("_1x1_down" in key for key in state) else "vggface2_resnet50"
    if "conv1/7x7_s2/0" in state and "conv5_3_3x3/0" in state:
        return Layout(name, image=VGGFACE2_BGR, fixed=NORMALISATION, translate=foreign.from_caffe)
    if "conv1/7x7_s2/kernel" in state and "conv5_3_3x3/kernel" in state:
        return Layout(name, image=VGGFACE2_BGR, fixed=NORMALISATION, translate=foreign.from_keras)
    if "conv1_7x7_s2.weight" in state and "conv5_3_3x3.weight" in state:
        return Layout(name, image=VGGFACE2_RGB, fixed=NORMALISATION, translate=foreign.from_dag)
    return None


def _inception_resnet_v1(state: Mapping[str, Tensor]) -> Layout | None:
    """facenet-pytorch's Inception-ResNet v1."""
    last = state.get("last_linear.weight")
    if last is None or last.shape[1] != 1792 or "conv2d_4b.conv.weight" not in state or "last_bn.weight" not in state:
        return None
    return Layout("inception_resnet_v1", last.shape[0], FACENET_IMAGE, NORMALISATION)


def _inception_resnet_v2(state: Mapping[str, Tensor]) -> Layout | None:
    """timm's Inception-ResNet v2; as for `_resnet`, its classes show whether it was trained on ImageNet's pictures."""
    if "mixed_5b.branch0.conv.weight" not in state or "conv2d_7b.conv.weight" not in state:
        return None
    return _imagenet("timm/inception_resnet_v2", state.get("classif.weight"), INCEPTION_IMAGE)


def _resnetv2(state: Mapping[str, Tensor]) -> Layout | None:
    """timm's pre-activation ResNets with BatchNorm, with one convolution before the blocks or with three ("d")."""
    blocks = {tuple(key.split(".")[1:4:2]) for key in state if key.startswith("stages.")}
    counts = tuple(sum(stage == str(k) for stage, _ in blocks) for k in range(4))
    deep = "stages.0.blocks.0.conv3.weight" in state
    name = RESNET_DEPTHS.get((deep, counts))
    first, last = state.get("stages.0.blocks.0.conv1.weight"), state.get("norm.running_mean")
    if name is None or first is None or last is None or first.shape[0] != 64:
        return None
    one, three = state.get("stem.conv.weight"), state.get("stem.conv1.weight")
    if one is None and (three is None or three.shape[0] != 32):
        return None
    suffix = "d" if one is None else ""
    return _imagenet(
        f"timm/resnetv2_{name.removeprefix('resnet')}{suffix}", state.get("head.fc.weight"), RESNETV2_IMAGE
    )


def _resnet(state: Mapping[str, Tensor]) -> Layout | None:
    """torchvision's ResNet. One with another head than ImageNet's was trained on other pictures, unknown which."""
    name = RESNET_DEPTHS.get(("layer1.0.conv3.weight" in state, _block_counts(state)))
    if name is None or not _is_resnet(state, BLOCK_LAYERS):
        return None
    return _imagenet(name, state.get("fc.weight"), IMAGENET_IMAGE)


def _is_resnet(state: Mapping[str, Tensor], layers: frozenset[str]) -> bool:
    """Whether the stem and the first block are a ResNet's of the usual width, with no other layers than these."""
    stem, first = state.get("conv1.weight"), state.get("layer1.0.conv2.weight")
    if stem is None or first is None or (tuple(stem.shape), tuple(first.shape)) != ((64, 3, 7, 7), (64, 64, 3, 3)):
        return False
    return {key.split(".")[2] for key in state if key.startswith("layer1.0.")} <= layers


def _imagenet(name: str, head: Tensor | None, image: ImageSpec) -> Layout:
    if head is not None and head.shape[0] != IMAGENET_CLASSES:
        return Layout(name)
    return Layout(name, image=image, fixed=NORMALISATION)


def _block_counts(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks in layer1 to layer4."""
    blocks = {tuple(key.split(".")[:2]) for key in state if key.startswith("layer")}
    return tuple(sum(block[0] == f"layer{k}" for block in blocks) for k in range(1, 5))


# The surest first: where two layouts fit, the first is taken unless the user names the other.
KNOWN = (
    _mobilefacenet,
    _insightface_mbf,
    _iresnet,
    _adaface,
    _vggface,
    _vggface_caffe,
    _vggface_torch7,
    _vggface_keras,
    _vggface2,
    _vggface2_foreign,
    _inception_resnet_v1,
    _inception_resnet_v2,
    _resnetv2,
    _resnet,
    _vggface2_without_classes,
)
