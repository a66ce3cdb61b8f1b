"""ONNX graphs of face models rewritten without changing what they compute: cheaper PReLUs, channels of equal range.

PReLU is slow in ONNX Runtime, more so beside integer kernels: 33 of them took more time than MobileFaceNet's 50
convolutions. And an activation has one scale for all its channels, of which the loudest leaves the others few of the
256 steps. Each rewriting below is an identity in real numbers; floats differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[np.float32]
QUIETEST = 1e-3
"""Channels below this part of the loudest are not raised further: dead ones would be raised without end."""


class Link(NamedTuple):
    """A convolution whose output, through at most one activation, only the next convolution reads."""

    first: onnx.NodeProto
    activation: onnx.NodeProto | None
    second: onnx.NodeProto
    tensor: str
    """What `second` reads."""


class Graph:
    """A model whose constants can be read and replaced by node and place."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self._index()

    def _index(self) -> None:
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        self._producers: dict[str, onnx.NodeProto] = {}
        for node in self.model.graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
            for name in node.output:
                self._producers[name] = node
        self._outputs = {output.name for output in self.model.graph.output}

    def constant(self, node: onnx.NodeProto, place: int) -> Array | None:
        """The constant that `node` takes as input number `place`, or None where there is none."""
        return self._constants.get(node.input[place]) if place < len(node.input) else None

    def replace_constant(self, node: onnx.NodeProto, place: int, value: Array) -> None:
        """Gives `node`, and no other that shares the constant, another one."""
        name = f"{node.name}_input{place}"  # exporters merge equal constants, such as slopes that never trained
        while name in self._constants:
            name += "_"
        self._constants[name] = value.astype(np.float32)
        self.model.graph.initializer.append(numpy_helper.from_array(self._constants[name], name))
        node.input[place] = name

    def channels(self, tensor: str) -> int:
        """Channels of a convolution's output; 0 where something else made it."""
        node = self._producers.get(tensor)
        weight = self.constant(node, 1) if node is not None and node.op_type == "Conv" else None
        return 0 if weight is None else weight.shape[0]

    def links(self) -> Iterator[Link]:
        """Pairs of convolutions between which a channel may be scaled."""
        # Exact only where the second convolution sees all of the change: no other node reads the tensor, nor the
        # caller. Its padding is 0, which no factor changes. With groups that are not channels, which weights read
        # which channel is another question: such pairs are left alone.
        for first in self.model.graph.node:
            if first.op_type != "Conv" or self.constant(first, 1) is None:
                continue
            activation, tensor = None, first.output[0]
            readers = self._readers(tensor)
            if len(readers) == 1 and readers[0].op_type in ("PRelu", "Relu"):
                activation, tensor = readers[0], readers[0].output[0]
                readers = self._readers(tensor)
            if len(readers) != 1 or readers[0].op_type != "Conv" or self.constant(readers[0], 1) is None:
                continue
            if groups(readers[0]) == 1 or self.is_depthwise(readers[0]):
                yield Link(first, activation, readers[0], tensor)

    def _readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [] if tensor in self._outputs else self._consumers.get(tensor, [])

    def is_depthwise(self, conv: onnx.NodeProto) -> bool:
        """Whether output channel c depends on input channel c alone."""
        weight = self.constant(conv, 1)
        return weight is not None and weight.shape[1] == 1 and groups(conv) == weight.shape[0] > 1

    def scale_link(self, link: Link, before: Array, after: Array) -> None:
        """Multiplies what `link.first` gives by `before` [C] and what `link.second` reads by `after` [C]."""
        # A convolution is linear: its output is scaled by scaling its kernels [out, in, H, W] along the first axis and
        # its bias [out]. What it reads is scaled along the second, in a depthwise one [C, 1, H, W] along the first.
        for place, shape in ((1, (-1, 1, 1, 1)), (2, (-1,))):
            constant = self.constant(link.first, place)
            if constant is not None:
                self.replace_constant(link.first, place, constant * before.reshape(shape))
        weight = self.constant(link.second, 1)
        assert weight is not None
        shape = (-1, 1, 1, 1) if self.is_depthwise(link.second) else (1, -1, 1, 1)
        self.replace_constant(link.second, 1, weight * after.reshape(shape))

    def replace_nodes(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Makes `nodes`, in the order of their execution, the whole graph."""
        kept = [copied(node) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        self._index()

    def drop_unused_constants(self) -> None:
        """Removes what no node reads any more: it would only make the file larger."""
        kept = [copied(t) for t in self.model.graph.initializer if t.name in self._consumers_now()]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(kept)

    def _consumers_now(self) -> set[str]:
        return {name for node in self.model.graph.node for name in node.input}


def copied(message: Any) -> Any:
    """A copy of a protocol buffer."""
    other = type(message)()
    other.CopyFrom(message)
    return other


def groups(conv: onnx.NodeProto) -> int:
    """The groups of a convolution."""
    return next((int(attribute.i) for attribute in conv.attribute if attribute.name == "group"), 1)


def session(model: onnx.ModelProto | str, threads: int = 1) -> onnxruntime.InferenceSession:
    """A model, or a file of one, ready to run on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors: its warnings are about the exporter's graph, not about the user's model
    given = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def observe(
    model: onnx.ModelProto, names: Sequence[str], pictures: Array, batch_size: int = 8, threads: int = 1
) -> Iterator[list[Array]]:
    """The tensors called `names` for [N, 3, H, W] pictures, a batch at a time: whole networks fit into memory so."""
    opened = copied(model)
    del opened.graph.output[:]
    opened.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    running = session(opened, threads)
    for start in range(0, len(pictures), batch_size):
        yield running.run(list(names), {model.graph.input[0].name: pictures[start : start + batch_size]})


def flatten_slopes(graph: Graph) -> None:
    """Makes slopes of PReLUs between convolutions at most 1, so that one convolution is enough to split them.

    Where slope a > 1, PReLU_a(x) = -a PReLU_{1/a}(-x): the convolution before gets the minus, the one after -a.
    """
    for link in graph.links():
        if link.activation is None or link.activation.op_type != "PRelu":
            continue
        slopes, channels = graph.constant(link.activation, 1), graph.channels(link.first.output[0])
        if slopes is None or not (slopes > 1).any():
            continue
        # Check: for x > 0 the right side is -a (-x / a) = x, for x < 0 it is -a (-x) = a x.
        slopes = np.broadcast_to(slopes.reshape(-1), channels)
        steep = slopes > 1
        sign = np.where(steep, -1, 1).astype(np.float32)
        graph.scale_link(link, sign, np.where(steep, -slopes, 1).astype(np.float32))
        inverse = np.where(steep, 1 / np.where(steep, slopes, 1), slopes)
        graph.replace_constant(link.activation, 1, inverse.reshape(-1, 1, 1))


def split_prelus(graph: Graph) -> int:
    """PReLU_a(x) = x + relu((a - 1) x) for a <= 1: a depthwise 1x1 convolution with ReLU, and an addition.

    Both have fast kernels in float32 and int8, and (a - 1), a channel's only weight, is exact in int8. A PReLU with a
    slope above 1 gets x + (1 - a) relu(-x), with a second such convolution.

    Returns:
        The PReLUs that are left, because their channels are unknown.
    """
    nodes: list[onnx.NodeProto] = []
    left = 0
    for node in list(graph.model.graph.node):
        slopes = graph.constant(node, 1) if node.op_type == "PRelu" else None
        channels = 0 if slopes is None else max(slopes.size, graph.channels(node.input[0]))
        if slopes is None or channels < 2 or slopes.reshape(-1).size not in (1, channels):
            left += node.op_type == "PRelu"
            nodes.append(node)
            continue
        slopes = np.broadcast_to(slopes.reshape(-1), channels)
        # For a <= 1, (a - 1) x is above 0 where x is below, so relu adds it there alone: x + (a - 1) x = a x. For a > 1
        # relu(-x) = -x where x is below 0, and x - (1 - a) x = a x.
        steep = bool((slopes > 1).any())
        tensor = node.input[0]
        factors = [np.full(channels, -1), 1 - slopes] if steep else [slopes - 1]
        for number, factor in enumerate(factors):
            name = f"{node.name}_slope{number}"
            conv = helper.make_node("Conv", [tensor, ""], [name], name=name, group=channels, kernel_shape=[1, 1])
            graph.replace_constant(conv, 1, factor.reshape(-1, 1, 1, 1))
            nodes.append(conv)
            tensor = name
            if number == 0:
                tensor = f"{node.name}_relu"
                nodes.append(helper.make_node("Relu", [name], [tensor], name=tensor))
        nodes.append(helper.make_node("Add", [node.input[0], tensor], [node.output[0]], name=f"{node.name}_add"))
    graph.replace_nodes(nodes)
    return left


def equalise(graph: Graph, pictures: Array, threads: int = 1) -> None:
    """Moves range between the channels of an activation and the weights that read them (Nagel et al. 2019,
    arXiv:1906.04721, with measured activations as in SmoothQuant, Xiao et al. 2022, arXiv:2211.10438).

    ReLU and PReLU let positive factors through. A depthwise convolution has a scale per channel: in front of it all
    channels get the same range for nothing. In front of a full one activations and weights share the burden. On
    MobileFaceNet and CelebA this raised the cosine of int8 embeddings from 0.957 to 0.985 with extremes as ranges and
    from 0.982 to 0.988 with percentiles.

    Args:
        pictures: [N, 3, H, W], as the model takes them.
    """
    links = list(graph.links())
    names = list(dict.fromkeys(link.tensor for link in links))
    if not names:
        return
    graph.drop_unused_constants()
    loudest: list[Array] = []
    for tensors in observe(graph.model, names, pictures, threads=threads):
        found = [np.abs(tensor).max((0, 2, 3)) for tensor in tensors]
        loudest = [np.maximum(a, b) for a, b in zip(loudest, found, strict=True)] if loudest else found
    ranges = dict(zip(names, loudest, strict=True))
    for link in links:
        # act(s x) = s act(x) for s > 0, so 1 / s before and s after cancel. Ranges of later links stay true: a link's
        # output is what it was.
        activation = np.maximum(ranges[link.tensor], QUIETEST * ranges[link.tensor].max())
        if not activation.all():
            continue  # nothing ever comes through
        factor = activation / activation.max()
        if not graph.is_depthwise(link.second):
            constant = graph.constant(link.second, 1)
            assert constant is not None
            weights = np.abs(constant).max((0, 2, 3))
            weights = np.maximum(weights, QUIETEST * weights.max())
            if not weights.all():
                continue
            # Afterwards activation and weights of a channel both reach to sqrt(activation * weights). With a geometric
            # mean of 1 the factors move range between channels only.
            factor = np.sqrt(activation / weights)
            factor /= np.exp(np.log(factor).mean())
        graph.scale_link(link, 1 / factor, factor)
