"""Static quantisation of an exported face model by ONNX Runtime: 8-bit activations, 7-bit weights per channel.

The graph is first rewritten by `onnx_graph`, which costs nothing and brings most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

from facefast.deploy import onnx_graph

Array = NDArray[np.float32]
BATCH = 32
OPERATORS = ["Conv", "Gemm", "MatMul", "Add", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool"]
"""What becomes int8; the rest, such as the division by an embedding's length, is little work."""
OUTSIDE = 1e-4
"""Part of a tensor's values cut off at each end by the method "percentile".

Measured on MobileFaceNet and CelebA, before channels were equalised: cosine 0.966 with extremes, 0.970 with entropy,
0.985 with this, 0.948 with ten times as much."""
# Weights get 7 bits on every machine. Without VNNI, x86 adds pairs of u8 x s8 products in 16 bits and saturates: with
# 8 bits MobileFaceNet's cosine fell from 0.966 to 0.941 on AVX2, while 8 bits without saturation (u8 x u8) brought no
# more than 7 did. A file may move to another machine than it was made on, so this machine's VNNI decides nothing.
WEIGHT_BITS = 7


@dataclass(frozen=True)
class Quantised:
    """An int8 model and how it came about."""

    model: onnx.ModelProto
    method: str
    """minmax or percentile: how far an activation's range reaches."""
    cosine: float
    """Mean cosine to the float32 model on pictures that gave no ranges."""
    in_float: tuple[str, ...]
    """Layers left in float32."""


def quantise(parent: onnx.ModelProto, pictures: Array, target: float, threads: int = 1) -> Quantised:
    """An int8 version of a float32 model as `deploy.package.export` writes it.

    Ranges come from the first three quarters of the pictures; the rest choose between two ways of setting them and,
    where no layer left in float32 would leave the cosine below `target`, which layers stay in float32: the worst ones,
    in doubling numbers, up to half of all.

    Args:
        pictures: [N, 3, H, W] as the model takes them, in random order.
    """
    first_check = len(pictures) * 3 // 4
    used, checked = pictures[:first_check], pictures[first_check:]
    # In this order: a slope above 1 takes two convolutions to split, and channels are equalised across whole PReLUs,
    # which are no link between two convolutions any more once they are split.
    graph = onnx_graph.Graph(onnx_graph.copied(parent))
    onnx_graph.flatten_slopes(graph)
    onnx_graph.equalise(graph, used[:64], threads)
    onnx_graph.split_prelus(graph)
    graph.drop_unused_constants()
    # Against the parent, not the rewritten graph: whatever the rewriting costs counts too.
    expected = run(onnx_graph.session(parent, threads), checked)
    ranges = _ranges(graph.model, used, threads)

    def attempt(method: str, in_float: Sequence[str]) -> Quantised:
        model = _insert_int8(graph.model, ranges[method], in_float)
        cosine = float((run(onnx_graph.session(model, threads), checked) * expected).sum(1).mean())
        return Quantised(model, method, cosine, tuple(in_float))

    best = max((attempt(method, ()) for method in ranges), key=lambda found: np.nan_to_num(found.cosine, nan=-1))
    if best.cosine >= target:
        return best
    layers = layers_of(graph.model)
    everything = [name for members in layers.values() for name in members]
    harm = {}
    for layer, members in layers.items():  # by itself in int8
        harm[layer] = attempt(best.method, [name for name in everything if name not in members]).cosine
    worst = sorted(layers, key=lambda layer: harm[layer])
    # An attempt takes a session and a pass over the pictures: doubling finds in few of them how many layers it takes.
    number = 1
    while best.cosine < target and number <= len(worst) // 2:
        found = attempt(best.method, [name for layer in worst[:number] for name in layers[layer]])
        best = max(best, found, key=lambda one: one.cosine)
        number *= 2
    return best


def _ranges(model: onnx.ModelProto, pictures: Array, threads: int) -> dict[str, dict[str, tuple[Array, Array]]]:
    """Method -> tensor -> (lowest, highest), by one pass.

    ONNX Runtime's own calibration by histograms holds every activation of every picture at once.
    """
    constants = {tensor.name for tensor in model.graph.initializer} | {""}
    names = list(
        dict.fromkeys(
            name
            for node in model.graph.node
            if node.op_type in OPERATORS
            for name in (*node.input, *node.output)
            if name not in constants
        )
    )
    extremes, percentiles = [], []
    for tensors in onnx_graph.observe(model, names, pictures, threads=threads):
        extremes.append([(tensor.min(), tensor.max()) for tensor in tensors])
        percentiles.append([np.quantile(tensor, (OUTSIDE, 1 - OUTSIDE)) for tensor in tensors])
    lowest, highest = np.array(extremes, np.float32).transpose(2, 1, 0)  # [tensors, batches]
    ends = np.array(percentiles, np.float32).mean(0)  # [tensors, 2], the mean over batches: no pass holds all values
    return {
        "minmax": {name: (lowest[i].min(), highest[i].max()) for i, name in enumerate(names)},
        "percentile": {name: (ends[i, 0], ends[i, 1]) for i, name in enumerate(names)},
    }


def _insert_int8(
    model: onnx.ModelProto, ranges: dict[str, tuple[Array, Array]], in_float: Sequence[str]
) -> onnx.ModelProto:
    """QuantizeLinear and DequantizeLinear around the layers, which ONNX Runtime fuses into integer kernels."""
    quantizer = QDQQuantizer(
        onnx.shape_inference.infer_shapes(model),
        per_channel=True,
        reduce_range=WEIGHT_BITS == 7,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, dict(ranges)),
        nodes_to_quantize=[],
        nodes_to_exclude=list(in_float),
        op_types_to_quantize=OPERATORS,
        extra_options={},
    )
    quantizer.quantize_model()
    found: onnx.ModelProto = quantizer.model.model
    return found


def layers_of(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Layer -> names of its nodes: one with weights and what follows it up to the next one."""
    layers: dict[str, list[str]] = {}
    for node in model.graph.node:
        starts = node.op_type in ("Conv", "Gemm", "MatMul") and "_slope" not in node.name
        if node.op_type in OPERATORS and (starts or layers):
            name = node.name if starts else next(reversed(layers))
            layers.setdefault(name, []).append(node.name)
    return layers


def run(session: Any, pictures: Array) -> Array:
    """Embeddings [N, D] of [N, 3, H, W]."""
    parts = [session.run(None, {"images": pictures[i : i + BATCH]})[0] for i in range(0, len(pictures), BATCH)]
    return np.concatenate(parts)
