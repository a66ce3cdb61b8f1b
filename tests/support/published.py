"""Published face models as others describe them: the names and shapes in their files, and their forward passes.

`test_published_models` makes checkpoints from the one and compares what facefast computes with the other. Nothing here
is taken from facefast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]
VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_NAMES = tuple(f"conv{b}_{k}" for b, count in enumerate((2, 2, 3, 3, 3), 1) for k in range(1, count + 1))
IR18, IR50, IR101 = (2, 2, 2, 2), (3, 4, 14, 3), (3, 13, 30, 3)


# Names and shapes, the classifier of the original included.


def norm(name: str, size: int, affine: bool = True) -> Shapes:
    learnt = ("weight", "bias") if affine else ()
    return {f"{name}.{k}": (size,) for k in (*learnt, "running_mean", "running_var")}


def vgg_torch(cells: int = 49) -> Shapes:
    shapes: Shapes = {}
    for name, channels, out in zip(VGG_NAMES, (3, *VGG), VGG, strict=False):
        shapes |= {f"{name}.weight": (out, channels, 3, 3), f"{name}.bias": (out,)}
    for name, channels, out in (("fc6", 512 * cells, 4096), ("fc7", 4096, 4096), ("fc8", 4096, 2622)):
        shapes |= {f"{name}.weight": (out, channels), f"{name}.bias": (out,)}
    return shapes


def vgg_caffe(cells: int = 49) -> Shapes:
    """Blobs as older Caffe wrote them, four axes each."""
    shapes: Shapes = {}
    for key, shape in vgg_torch(cells).items():
        blob = key.replace(".weight", "/0").replace(".bias", "/1")
        shapes[blob] = (1,) * (4 - len(shape)) + shape
    return shapes


TORCH7_PLACES = (1, 3, 6, 8, 11, 13, 15, 18, 20, 22, 25, 27, 29, 33, 36, 39)
"""Of the layers with weights in the nn.Sequential of VGG_FACE.t7; ReLU, pooling, View and dropout lie between."""


def vgg_torch7(cells: int = 49) -> Shapes:
    """Kernels with two axes, as nn.SpatialConvolutionMM keeps them."""
    shapes: Shapes = {}
    for k, (key, shape) in enumerate(vgg_torch(cells).items()):
        flat = shape if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
        shapes[f"modules.{TORCH7_PLACES[k // 2]}.{key.split('.')[1]}"] = flat
    return shapes


def vgg_keras(cells: int = 49, numbered: bool = False) -> Shapes:
    """keras-vggface's, or DeepFace's whose layers have numbers for names and are convolutions to the end."""
    shapes: Shapes = {}
    for k, (key, shape) in enumerate(vgg_torch(cells).items()):
        layer = f"conv2d_{k // 2 + 1}" if numbered else key.split(".")[0]
        if key.endswith("bias"):
            shapes[f"{layer}/bias"] = shape
        elif len(shape) == 4:
            shapes[f"{layer}/kernel"] = (*shape[2:], shape[1], shape[0])
        elif not numbered:
            shapes[f"{layer}/kernel"] = (shape[1], shape[0])
        else:
            side = math.isqrt(shape[1] // 512) if key.startswith("fc6") else 1
            shapes[f"{layer}/kernel"] = (side, side, shape[1] // side**2, shape[0])
    return shapes


def vggface2_torch(squeeze: bool) -> Shapes:
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    channels = 64
    for stage, (count, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(count):
            at, out = f"layer{stage}.{block}", width * 4
            shapes |= {f"{at}.conv1.weight": (width, channels, 1, 1), **norm(f"{at}.bn1", width)}
            shapes |= {f"{at}.conv2.weight": (width, width, 3, 3), **norm(f"{at}.bn2", width)}
            shapes |= {f"{at}.conv3.weight": (out, width, 1, 1), **norm(f"{at}.bn3", out)}
            if squeeze:
                shapes |= {f"{at}.conv4.weight": (out // 16, out, 1, 1), f"{at}.conv4.bias": (out // 16,)}
                shapes |= {f"{at}.conv5.weight": (out, out // 16, 1, 1), f"{at}.conv5.bias": (out,)}
            if block == 0:
                shapes |= {f"{at}.downsample.0.weight": (out, channels, 1, 1), **norm(f"{at}.downsample.1", out)}
            channels = out
    return shapes | {"fc.weight": (8631, 2048), "fc.bias": (8631,)}


OXFORD = {
    "conv1": "1x1_reduce",
    "conv2": "3x3",
    "conv3": "1x1_increase",
    "conv4": "1x1_down",
    "conv5": "1x1_up",
    "downsample.0": "1x1_proj",
}


def oxford_name(key: str, bn: str) -> str:
    """The authors' name of a layer of VGGFace2-pytorch."""
    if key.startswith(("conv1", "bn1")):
        return "conv1/7x7_s2".replace("/", "/" if bn == "/bn" else "_") + (bn if key.startswith("bn") else "")
    if key.startswith("fc"):
        return "classifier"
    stage, block, layer = key.removeprefix("layer").split(".", 2)
    is_norm = layer.startswith("bn") or layer == "downsample.1"
    conv = {"bn1": "conv1", "bn2": "conv2", "bn3": "conv3", "downsample.1": "downsample.0"}.get(layer, layer)
    return f"conv{int(stage) + 1}_{int(block) + 1}_{OXFORD[conv]}{bn if is_norm else ''}"


def vggface2_dag(squeeze: bool) -> Shapes:
    found = {}
    for key, shape in vggface2_torch(squeeze).items():
        layer, _, variable = key.rpartition(".")
        full = (*shape, 1, 1) if key == "fc.weight" else shape
        found[f"{oxford_name(layer, '_bn')}.{variable}"] = full
    return found


def vggface2_caffe(state: State, factor: float = 1.0) -> State:
    """Blobs of the weights `state` of VGGFace2-pytorch: statistics times `factor`, which stands beside them."""
    found = {}
    for key, tensor in state.items():
        layer, _, variable = key.rpartition(".")
        name = oxford_name(layer, "/bn")
        if variable in ("weight", "bias"):
            name += "/scale" * name.endswith("/bn")
            found[f"{name}/{('weight', 'bias').index(variable)}"] = tensor
        else:
            found[f"{name}/{('running_mean', 'running_var').index(variable)}"] = tensor * factor
            found[f"{name}/2"] = torch.full((1,), factor, device=tensor.device)
    return found


def vggface2_keras(squeeze: bool) -> Shapes:
    variables = {"running_mean": "moving_mean", "running_var": "moving_variance", "bias": "bias", "weight": "kernel"}
    found = {}
    for key, shape in vggface2_torch(squeeze).items():
        layer, _, variable = key.rpartition(".")
        is_norm = "bn" in layer or layer.endswith("downsample.1")
        name = variables[variable]
        if is_norm:
            name = {"weight": "gamma", "bias": "beta"}.get(variable, name)
        turned = (*shape[2:], shape[1], shape[0]) if name == "kernel" else shape
        found[f"{oxford_name(layer, '/bn')}/{name}"] = turned
    return found


def adaface(depths: tuple[int, ...]) -> Shapes:
    shapes: Shapes = {"input_layer.0.weight": (64, 3, 3, 3), **norm("input_layer.1", 64), "input_layer.2.weight": (64,)}
    channels, place = 64, 0
    for count, out in zip(depths, (64, 128, 256, 512), strict=True):
        for _ in range(count):
            at = f"body.{place}.res_layer"
            shapes |= {**norm(f"{at}.0", channels), f"{at}.1.weight": (out, channels, 3, 3), **norm(f"{at}.2", out)}
            shapes |= {f"{at}.3.weight": (out,), f"{at}.4.weight": (out, out, 3, 3), **norm(f"{at}.5", out)}
            if channels != out:
                short = f"body.{place}.shortcut_layer"
                shapes |= {f"{short}.0.weight": (out, channels, 1, 1), **norm(f"{short}.1", out)}
            channels, place = out, place + 1
    shapes |= {**norm("output_layer.0", 512), "output_layer.3.weight": (512, 512 * 49), "output_layer.3.bias": (512,)}
    return shapes | {**norm("output_layer.4", 512, affine=False), "head.kernel": (512, 100)}


def unit(name: str, channels: int, out: int, kernel: int = 1, groups: int = 1, linear: bool = False) -> Shapes:
    shapes = {f"{name}.layers.0.weight": (out, channels // groups, kernel, kernel), **norm(f"{name}.layers.1", out)}
    return shapes if linear else {**shapes, f"{name}.layers.2.weight": (out,)}


def mbf() -> Shapes:
    shapes = {**unit("layers.0", 3, 128, 3), **unit("layers.1", 128, 128, 3, groups=64)}
    rows = ((2, 128, 128, 1), (3, 128, 128, 4), (4, 256, 256, 1), (5, 256, 256, 6), (6, 256, 512, 1), (7, 256, 256, 2))
    channels = 128
    for place, out, wide, count in rows:
        for block in range(count):
            at = f"layers.{place}" if place % 2 == 0 else f"layers.{place}.layers.{block}"
            shapes |= unit(f"{at}.layers.0", channels, wide) | unit(f"{at}.layers.1", wide, wide, 3, groups=wide)
            shapes |= unit(f"{at}.layers.2", wide, out, linear=True)
            channels = out
    shapes |= unit("conv_sep", 256, 512) | unit("features.layers.0", 512, 512, 7, groups=512, linear=True)
    return shapes | {"features.layers.2.weight": (512, 512), **norm("features.layers.3", 512)}


def conv_bn(name: str, channels: int, out: int, *kernel: int) -> Shapes:
    return {f"{name}.conv.weight": (out, channels, *kernel), **norm(f"{name}.bn", out)}


def facenet() -> Shapes:
    shapes: Shapes = {}
    stem = ((3, 32, 3), (32, 32, 3), (32, 64, 3), (64, 80, 1), (80, 192, 3), (192, 256, 3))
    for name, (channels, out, k) in zip(("1a", "2a", "2b", "3b", "4a", "4b"), stem, strict=True):
        shapes |= conv_bn(f"conv2d_{name}", channels, out, k, k)
    blocks = [(f"repeat_1.{i}", 256, 96, 0) for i in range(5)] + [(f"repeat_2.{i}", 896, 256, 7) for i in range(10)]
    blocks += [(f"repeat_3.{i}", 1792, 384, 3) for i in range(5)] + [("block8", 1792, 384, 3)]
    for at, channels, joined, k in blocks:
        width = joined // (2 if k else 3)
        shapes |= conv_bn(f"{at}.branch0", channels, width, 1, 1) | conv_bn(f"{at}.branch1.0", channels, width, 1, 1)
        if k:
            shapes |= conv_bn(f"{at}.branch1.1", width, width, 1, k) | conv_bn(f"{at}.branch1.2", width, width, k, 1)
        else:
            shapes |= conv_bn(f"{at}.branch1.1", 32, 32, 3, 3) | conv_bn(f"{at}.branch2.0", 256, 32, 1, 1)
            shapes |= conv_bn(f"{at}.branch2.1", 32, 32, 3, 3) | conv_bn(f"{at}.branch2.2", 32, 32, 3, 3)
        shapes |= {f"{at}.conv2d.weight": (channels, joined, 1, 1), f"{at}.conv2d.bias": (channels,)}
    shapes |= conv_bn("mixed_6a.branch0", 256, 384, 3, 3) | conv_bn("mixed_6a.branch1.0", 256, 192, 1, 1)
    shapes |= conv_bn("mixed_6a.branch1.1", 192, 192, 3, 3) | conv_bn("mixed_6a.branch1.2", 192, 256, 3, 3)
    for branch, outs in enumerate(((384,), (256,), (256, 256))):
        shapes |= conv_bn(f"mixed_7a.branch{branch}.0", 896, 256, 1, 1)
        for k, out in enumerate(outs, 1):
            shapes |= conv_bn(f"mixed_7a.branch{branch}.{k}", 256, out, 3, 3)
    shapes |= {"last_linear.weight": (512, 1792), **norm("last_bn", 512)}
    return shapes | {"logits.weight": (8631, 512), "logits.bias": (8631,)}


# Numbers.


def fill(shapes: Shapes, seed: int = 0) -> State:
    """Random weights that keep a signal's size through any depth."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        if key.endswith(("running_var", "moving_variance")) or (key.endswith(("weight", "gamma")) and len(shape) == 1):
            state[key] = torch.rand(shape, generator=generator) + 0.5
        elif len(shape) == 1:
            state[key] = torch.randn(shape, generator=generator) * 0.1
        else:
            # Keras' last axis is the outputs, the others' first is; Caffe's biases have four axes.
            outs = shape[-1] if key.endswith("kernel") else shape[0] if shape[:2] != (1, 1) else shape[2]
            fan = max(1, math.prod(shape) // max(1, outs))
            state[key] = torch.randn(shape, generator=generator) * fan**-0.5
    return state


def convolve(s: State, x: Tensor, key: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
    weight = s[f"{key}.weight"]
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, s.get(f"{key}.bias"), stride, padding, groups=groups)


def normalise(s: State, x: Tensor, key: str, eps: float = 1e-5) -> Tensor:
    mean, var = s[f"{key}.running_mean"], s[f"{key}.running_var"]
    return F.batch_norm(x, mean, var, s.get(f"{key}.weight"), s.get(f"{key}.bias"), eps=eps)


def keras_layer(s: State, x: Tensor, layer: str, padding: int) -> Tensor:
    """[B, H, W, in] to [B, H', W', out], or [B, in] to [B, out], as Keras defines a kernel's axes; no ReLU."""
    kernel, bias = s[f"{layer}/kernel"], s[f"{layer}/bias"]
    if kernel.ndim == 2:
        return x @ kernel + bias
    x = F.pad(x, (0, 0, padding, padding, padding, padding))
    height, width = x.shape[1] - kernel.shape[0] + 1, x.shape[2] - kernel.shape[1] + 1
    parts = [
        x[:, dy : dy + height, dx : dx + width] @ kernel[dy, dx]
        for dy in range(kernel.shape[0])
        for dx in range(kernel.shape[1])
    ]
    return torch.stack(parts).sum(0) + bias


def keras_vgg_forward(s: State, images: Tensor) -> Tensor:
    """Keras' VGG-16 up to fc7 on [B, 3, H, W], channels last inside."""
    layers = [key.removesuffix("/kernel") for key in s if key.endswith("/kernel")]
    x = images.permute(0, 2, 3, 1)
    for place, layer in enumerate(layers[:13]):
        x = F.relu(keras_layer(s, x, layer, 1))
        if place in (1, 3, 6, 9, 12):
            batch, height, width, channels = x.shape
            x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).amax((2, 4))
    if s[f"{layers[13]}/kernel"].ndim == 2:
        x = x.flatten(1)  # height, width, channel
    x = F.relu(keras_layer(s, x, layers[13], 0))
    return F.relu(keras_layer(s, x, layers[14], 0)).flatten(1)


def vggface2_forward(s: State, x: Tensor) -> Tensor:
    x = F.relu(normalise(s, convolve(s, x, "conv1", 2, 3), "bn1"))
    x = F.max_pool2d(x, 3, 2, 0, ceil_mode=True)
    for stage, count in enumerate((3, 4, 6, 3), 1):
        for block in range(count):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(normalise(s, convolve(s, x, f"{at}.conv1", stride), f"{at}.bn1"))
            y = F.relu(normalise(s, convolve(s, y, f"{at}.conv2", 1, 1), f"{at}.bn2"))
            y = normalise(s, convolve(s, y, f"{at}.conv3"), f"{at}.bn3")
            if f"{at}.conv4.weight" in s:
                z = F.avg_pool2d(y, tuple(y.shape[2:]))
                y = y * torch.sigmoid(convolve(s, F.relu(convolve(s, z, f"{at}.conv4")), f"{at}.conv5"))
            if block == 0:
                x = normalise(s, convolve(s, x, f"{at}.downsample.0", stride), f"{at}.downsample.1")
            x = F.relu(x + y)
    return F.avg_pool2d(x, tuple(x.shape[2:])).flatten(1)


def adaface_forward(s: State, x: Tensor, depths: tuple[int, ...] = IR18) -> Tensor:
    x = F.prelu(normalise(s, convolve(s, x, "input_layer.0", 1, 1), "input_layer.1"), s["input_layer.2.weight"])
    firsts = {sum(depths[:k]) for k in range(4)}
    for place in range(sum(depths)):
        at, stride = f"body.{place}.res_layer", 2 if place in firsts else 1
        y = normalise(s, convolve(s, normalise(s, x, f"{at}.0"), f"{at}.1", 1, 1), f"{at}.2")
        y = normalise(s, convolve(s, F.prelu(y, s[f"{at}.3.weight"]), f"{at}.4", stride, 1), f"{at}.5")
        short = f"body.{place}.shortcut_layer"
        if f"{short}.0.weight" in s:
            x = normalise(s, convolve(s, x, f"{short}.0", stride), f"{short}.1")
        else:
            x = x[:, :, ::stride, ::stride]
        x = x + y
    x = normalise(s, x, "output_layer.0").flatten(1)
    x = F.linear(x, s["output_layer.3.weight"], s["output_layer.3.bias"])
    return normalise(s, x, "output_layer.4")


def mbf_forward(s: State, x: Tensor) -> Tensor:
    def run(x: Tensor, at: str, stride: int = 1, padding: int = 0) -> Tensor:
        x = normalise(s, convolve(s, x, f"{at}.layers.0", stride, padding), f"{at}.layers.1")
        slope = s.get(f"{at}.layers.2.weight")
        return x if slope is None else F.prelu(x, slope)

    def bottleneck(x: Tensor, at: str, stride: int) -> Tensor:
        return run(run(run(x, f"{at}.layers.0"), f"{at}.layers.1", stride, 1), f"{at}.layers.2")

    x = run(run(x, "layers.0", 2, 1), "layers.1", 1, 1)
    for place, count in ((2, 0), (3, 4), (4, 0), (5, 6), (6, 0), (7, 2)):
        if count == 0:
            x = bottleneck(x, f"layers.{place}", 2)
        for block in range(count):
            x = x + bottleneck(x, f"layers.{place}.layers.{block}", 1)
    x = run(run(x, "conv_sep"), "features.layers.0").flatten(1)
    return normalise(s, F.linear(x, s["features.layers.2.weight"]), "features.layers.3")


def facenet_forward(s: State, x: Tensor) -> Tensor:
    def run(x: Tensor, at: str, stride: int = 1, same: bool = False) -> Tensor:
        height, width = s[f"{at}.conv.weight"].shape[2:]
        padding = (height // 2, width // 2) if same else 0
        return F.relu(normalise(s, convolve(s, x, f"{at}.conv", stride, padding), f"{at}.bn", 1e-3))

    def chain(x: Tensor, at: str) -> Tensor:
        for k in range(3):
            x = run(x, f"{at}.{k}", same=True) if f"{at}.{k}.conv.weight" in s else x
        return x

    def block(x: Tensor, at: str, scale: float) -> Tensor:
        parts = [run(x, f"{at}.branch0"), chain(x, f"{at}.branch1")]
        if f"{at}.branch2.0.conv.weight" in s:
            parts.append(chain(x, f"{at}.branch2"))
        return x + scale * convolve(s, torch.cat(parts, 1), f"{at}.conv2d")

    x = run(run(run(x, "conv2d_1a", 2), "conv2d_2a"), "conv2d_2b", same=True)
    x = run(run(run(F.max_pool2d(x, 3, 2), "conv2d_3b"), "conv2d_4a"), "conv2d_4b", 2)
    for k in range(5):
        x = F.relu(block(x, f"repeat_1.{k}", 0.17))
    long = run(run(run(x, "mixed_6a.branch1.0"), "mixed_6a.branch1.1", same=True), "mixed_6a.branch1.2", 2)
    x = torch.cat([run(x, "mixed_6a.branch0", 2), long, F.max_pool2d(x, 3, 2)], 1)
    for k in range(10):
        x = F.relu(block(x, f"repeat_2.{k}", 0.1))
    parts = [run(run(x, f"mixed_7a.branch{k}.0"), f"mixed_7a.branch{k}.1", 2) for k in range(2)]
    long = run(run(run(x, "mixed_7a.branch2.0"), "mixed_7a.branch2.1", same=True), "mixed_7a.branch2.2", 2)
    x = torch.cat([*parts, long, F.max_pool2d(x, 3, 2)], 1)
    for k in range(5):
        x = F.relu(block(x, f"repeat_3.{k}", 0.2))
    x = block(x, "block8", 1.0).mean((2, 3))
    return normalise(s, F.linear(x, s["last_linear.weight"]), "last_bn", 1e-3)
