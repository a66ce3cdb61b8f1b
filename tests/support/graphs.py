"""Small ONNX graphs, node by node, for what rewrites and quantises the graphs of face models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.float32]
SIDE = 8
"""Pixels of the pictures, [N, 3, SIDE, SIDE]."""


class Builder:
    """A graph in the making: each method adds a node and returns the name of what it gives."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._channels = {"images": 3}

    def constant(self, value: ArrayLike) -> str:
        """A constant of the graph."""
        name = f"constant{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, kind: str, *given: str, channels: int = 0, **attributes: Any) -> str:
        """Any node; it keeps the channels of its first input where nothing else is said."""
        name = f"{kind.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, given, [name], name=name, **attributes))
        self._channels[name] = channels or self._channels[given[0]]
        return name

    def conv(self, given: str, channels: int, kernel: int = 3, groups: int = 1, bias: bool = True) -> str:
        """A convolution with random weights, as large as what it takes."""
        inside = self._channels[given] // groups
        weight = self.generator.standard_normal((channels, inside, kernel, kernel)) / np.sqrt(inside * kernel * kernel)
        constants = [self.constant(weight)]
        if bias:
            constants.append(self.constant(0.2 * self.generator.standard_normal(channels)))
        return self.node(
            "Conv",
            given,
            *constants,
            channels=channels,
            group=groups,
            kernel_shape=[kernel, kernel],
            pads=[kernel // 2] * 4,
        )

    def depthwise(self, given: str, bias: bool = True) -> str:
        """A depthwise convolution."""
        return self.conv(given, self._channels[given], groups=self._channels[given], bias=bias)

    def prelu(self, given: str, slopes: ArrayLike) -> str:
        """A PReLU with a slope for each channel, or one for all."""
        return self.node("PRelu", given, self.constant(np.reshape(slopes, (-1, 1, 1))))

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The graph, whose outputs keep the names of what they are."""
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
        given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self._nodes, "small", [images], given, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        onnx.checker.check_model(model, full_check=True)
        return model


def random_pictures(number: int, seed: int = 5, side: int = SIDE) -> Array:
    """Normalised pictures [number, 3, side, side]."""
    return np.random.default_rng(seed).standard_normal((number, 3, side, side)).astype(np.float32)


def face_network(seed: int = 0, slopes: Sequence[float] = (0.25, 0.1, 1.5, 0.4)) -> onnx.ModelProto:
    """A network of a MobileFaceNet's kind: `images` to `embeddings` [N, 16] of length 1."""
    build = Builder(seed)
    tensor = build.prelu(build.conv("images", 8), np.resize(slopes, 8))
    tensor = build.prelu(build.depthwise(tensor), np.resize(slopes, 8))
    inside = build.conv(tensor, 8, kernel=1)
    tensor = build.prelu(build.conv(inside, 16, kernel=1), np.resize(slopes, 16))
    tensor = build.prelu(build.depthwise(tensor), np.resize(slopes, 16))
    tensor = build.node("Add", build.conv(tensor, 8, kernel=1), inside)
    flat = build.node("Flatten", build.conv(tensor, 16, kernel=1), axis=1)
    weight = build.constant(build.generator.standard_normal((16 * SIDE * SIDE, 16)) / SIDE)
    model = build.model(build.node("LpNormalization", build.node("Gemm", flat, weight), axis=1, p=2))
    model.graph.node[-1].output[0] = model.graph.output[0].name = "embeddings"
    return model
