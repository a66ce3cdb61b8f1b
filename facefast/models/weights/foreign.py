"""Names and axes of other frameworks' weights, turned into ours: VGGFace's and VGGFace2's.

What these functions do not know keeps its name, so that it is counted as unused instead of being lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from facefast.models import vggface

# Keras' name of a variable -> ours; gamma and beta belong to a BatchNorm, whose layer has a name of its own.
KERAS_VARIABLES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
CAFFE_BLOBS = {"0": "weight", "1": "bias"}
CAFFE_STATISTICS = {"0": "running_mean", "1": "running_var"}
VGG_LAYERS = (*vggface.LAYERS, "fc6", "fc7", "fc8")
FLAT = ("fc6", "fc7", "fc8", "classifier")
"""Layers that are linear here and sometimes convolutions elsewhere."""
RESNET_LAYERS = {
    "1x1_reduce": ("conv1", "bn1"),
    "3x3": ("conv2", "bn2"),
    "1x1_increase": ("conv3", "bn3"),
    "1x1_down": ("conv4", ""),
    "1x1_up": ("conv5", ""),
    "1x1_proj": ("downsample.0", "downsample.1"),
}
RESNET_BLOCK = re.compile(r"conv(\d)_(\d+)_(1x1_reduce|3x3|1x1_increase|1x1_down|1x1_up|1x1_proj)([/_]bn)?")
RESNET_STEM = re.compile(r"conv1[/_]7x7_s2([/_]bn)?")


def resnet_layer(name: str) -> str:
    """VGGFace2's name of a layer, with / or _ before bn, as it is called in `vggface2`; others stay as they are."""
    if stem := RESNET_STEM.fullmatch(name):
        return "bn1" if stem[1] else "conv1"
    if block := RESNET_BLOCK.fullmatch(name):
        layer = RESNET_LAYERS[block[3]][bool(block[4])]
        return f"layer{int(block[1]) - 1}.{int(block[2]) - 1}.{layer}"
    return name


def from_dag(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VGGFace2 as MatConvNet's and Caffe's converters to PyTorch name it: conv2_1_1x1_reduce_bn.weight and so on."""
    found = {}
    for key, tensor in state.items():
        layer, _, variable = key.rpartition(".")
        found[f"{resnet_layer(layer)}.{variable}"] = tensor
    return found


def from_caffe(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VGGFace or VGGFace2 as Caffe numbers blobs: LAYER/0 the weight, LAYER/1 the bias.

    Old files have four axes for each blob, [1, 1, out, in] for a linear layer's weight. A BatchNorm is two layers:
    LAYER/bn has mean and variance, both multiplied by its third blob, LAYER/bn/scale weight and bias.
    """
    found = {}
    for key, tensor in state.items():
        layer, _, blob = key.rpartition("/")
        factor = state.get(f"{layer}/2")
        names = CAFFE_BLOBS if factor is None else CAFFE_STATISTICS
        if factor is not None and blob == "2":
            continue
        # Everything but a kernel has one axis here, whatever axes of 1 the file gives it.
        if layer.endswith(("/bn", "/scale")) or blob == "1":
            tensor = tensor.flatten()
        elif layer in FLAT:
            tensor = tensor.flatten(0, 2) if tensor.ndim == 4 and tensor.shape[:2] == (1, 1) else tensor.flatten(1)
        if factor is not None:
            tensor = torch.where(factor.flatten() == 0, 0, tensor / factor.flatten())  # Caffe takes 1 / 0 for 0
        ours = f"{resnet_layer(layer.removesuffix('/scale'))}.{names.get(blob)}"
        found[ours if blob in names else key] = tensor
    return found


def from_torch7(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VGGFace as `torch7` reads it: its layers have numbers for names and are recognised by their order. A
    convolution's kernel may have two axes, [out, in * 3 * 3]."""
    channels = dict(zip(VGG_LAYERS, _vgg_channels(), strict=False))
    names = dict(zip(torch7_kernels(state), VGG_LAYERS, strict=False))
    found = {}
    for key, tensor in state.items():
        layer, _, variable = key.rpartition(".")
        name = names.get(layer, layer)
        if variable == "weight" and name in channels:
            tensor = tensor.reshape(channels[name][1], channels[name][0], 3, 3)
        elif variable == "weight" and name in FLAT:
            tensor = tensor.flatten(1)
        found[f"{name}.{variable}"] = tensor
    return found


def torch7_kernels(state: Mapping[str, Tensor]) -> list[str]:
    """Modules of a Torch7 network that have a weight, in their order."""
    return [k.removesuffix(".weight") for k in state if k.startswith("modules.") and k.endswith(".weight")]


def is_torch7_vgg(state: Mapping[str, Tensor]) -> bool:
    """Whether the modules with a weight are a VGG-16's convolutions, in order, whatever comes after them."""
    kernels = torch7_kernels(state)
    wanted = [(out, channels * 9) for channels, out in _vgg_channels()]
    shapes = [tuple(state[f"{kernel}.weight"].flatten(1).shape) for kernel in kernels[: len(wanted)]]
    return shapes == wanted and len(kernels) <= len(VGG_LAYERS)


def from_keras(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VGGFace or VGGFace2 as `readers` takes it from Keras: layer/variable, channels last.

    Keras numbers layers without a name through (DeepFace's vgg_face_weights.h5): those of a VGG-16 are recognised by
    their order.

    `vggface2` keeps the paper's network: Keras' version of it pads the first convolution and pooling otherwise and, in
    its ResNet-50, adds a hundred times as much to a variance, so its numbers for a picture differ a little.
    """
    names = dict(zip(keras_kernels(state), VGG_LAYERS, strict=False)) if is_keras_vgg(state) else {}
    found = {}
    for key, tensor in state.items():
        layer, _, variable = key.rpartition("/")
        layer = names.get(layer, layer)
        if variable == "kernel":
            tensor = _torch_kernel(tensor, layer)
        known = KERAS_VARIABLES.get(variable)
        found[f"{resnet_layer(layer)}.{known}" if known else key] = tensor
    return found


def keras_kernels(state: Mapping[str, Tensor]) -> list[str]:
    """Layers that have a kernel, in the file's order."""
    return [key.removesuffix("/kernel") for key in state if key.endswith("/kernel")]


def is_keras_vgg(state: Mapping[str, Tensor]) -> bool:
    """Whether the kernels are a VGG-16's convolutions, in order, whatever comes after them."""
    shapes = [tuple(tensor.shape) for key, tensor in state.items() if key.endswith("/kernel")]
    wanted = [(3, 3, channels, out) for channels, out in _vgg_channels()]
    return shapes[: len(wanted)] == wanted and len(shapes) <= len(VGG_LAYERS)


def _vgg_channels() -> list[tuple[int, int]]:
    """(in, out) of a VGG-16's convolutions."""
    outs = [out for count, out in vggface.BLOCKS for _ in range(count)]
    return list(zip([3, *outs], outs, strict=False))


def _torch_kernel(kernel: Tensor, layer: str) -> Tensor:
    """Keras' [H, W, in, out] or [in, out] as torch's [out, in, H, W] or [out, in]."""
    if layer == "fc6" and kernel.ndim == 2:
        # Keras flattens a map by height, width, channel, torch by channel, height, width.
        channels = vggface.BLOCKS[-1][1]
        side = math.isqrt(kernel.shape[0] // channels)
        kernel = kernel.reshape(side, side, channels, kernel.shape[1])
    if kernel.ndim == 2:
        return kernel.T
    kernel = kernel.permute(3, 2, 0, 1)
    return kernel.flatten(1) if layer in FLAT else kernel
