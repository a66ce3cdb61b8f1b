"""Quantisation: what becomes integers, where ranges come from, which layers stay in float, and what judges that."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from facefast.deploy import int8, onnx_graph
from facefast.deploy.int8 import Quantised, quantise
from tests.support.graphs import Array, Builder, face_network, random_pictures

PICTURES = random_pictures(40)
STRANGERS = random_pictures(24, seed=77)
"""Pictures that no range was taken from."""


@pytest.fixture(scope="module")
def plain() -> onnx.ModelProto:
    return face_network()


@pytest.fixture(scope="module")
def found(plain: onnx.ModelProto) -> Quantised:
    return quantise(plain, PICTURES, -1)


def embeddings(model: onnx.ModelProto, pictures: Array) -> Array:
    return int8.run(onnx_graph.session(model), pictures)


def weights_of(model: onnx.ModelProto) -> dict[str, Array]:
    """The convolutions' weights as they are stored."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) == 4}


def test_an_int8_model_gives_nearly_its_parents_embeddings_of_pictures_it_never_saw(
    plain: onnx.ModelProto, found: Quantised
) -> None:
    expected, given = embeddings(plain, STRANGERS), embeddings(found.model, STRANGERS)
    assert (expected @ expected.T).min() < 0.8  # pictures that are told apart
    assert (expected * given).sum(1).min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(given, axis=1), 1, atol=1e-5)
    assert found.cosine == pytest.approx(float((expected * given).sum(1).mean()), abs=5e-3)
    assert found.in_float == ()
    assert found.method in ("minmax", "percentile")


def test_weights_have_seven_bits_on_every_machine(found: Quantised) -> None:
    stored = weights_of(found.model)
    assert len(stored) >= 7
    for name, values in stored.items():
        assert values.dtype == np.int8, name
        assert np.abs(values.astype(int)).max() <= 64, name  # else pairs of products saturate without VNNI


def test_every_channel_of_a_convolution_has_a_scale_of_its_own(found: Quantised) -> None:
    scales = {t.name: numpy_helper.to_array(t) for t in found.model.graph.initializer if t.name.endswith("_scale")}
    by_weight = {
        node.input[0]: scales[node.input[1]]
        for node in found.model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights_of(found.model)
    }
    assert len(by_weight) >= 7
    for name, values in by_weight.items():
        assert values.shape == (weights_of(found.model)[name].shape[0],)


def test_the_parent_stays_as_it_is_and_the_same_pictures_give_the_same_model(
    plain: onnx.ModelProto, found: Quantised
) -> None:
    before, pictures = plain.SerializeToString(), PICTURES.copy()
    again = quantise(plain, PICTURES, -1)
    assert plain.SerializeToString() == before
    np.testing.assert_array_equal(PICTURES, pictures)
    assert again.model == found.model
    assert (again.method, again.cosine) == (found.method, found.cosine)


def test_an_outlier_is_cut_off_where_that_is_the_better_way(plain: onnx.ModelProto) -> None:
    glaring = PICTURES.copy()
    glaring[0, :, 0, 0] = 300  # one pixel that would take nearly all of the 256 steps
    chosen = quantise(plain, glaring, -1)
    assert chosen.method == "percentile"
    assert chosen.cosine > 0.95


def test_layers_stay_in_float_where_the_cosine_asks_for_it_and_never_more_than_half(plain: onnx.ModelProto) -> None:
    careful, everything = quantise(plain, PICTURES, -1), quantise(plain, PICTURES, 2.0)  # which nothing reaches
    assert everything.in_float
    assert everything.cosine > careful.cosine
    layers = int8.layers_of(_rewritten(plain))
    kept = {layer for layer, members in layers.items() if set(members) <= set(everything.in_float)}
    assert 0 < len(kept) <= len(layers) // 2
    assert set(everything.in_float) == {name for layer in kept for name in layers[layer]}
    stored = {t.data_type for t in everything.model.graph.initializer if len(t.dims) == 4}
    assert stored == {TensorProto.INT8, TensorProto.FLOAT}


def test_no_more_layers_stay_in_float_than_the_cosine_asks_for(plain: onnx.ModelProto) -> None:
    none, most = quantise(plain, PICTURES, -1), quantise(plain, PICTURES, 2.0)
    some = quantise(plain, PICTURES, (none.cosine + most.cosine) / 2)
    assert 0 < len(some.in_float) <= len(most.in_float)
    assert some.cosine >= (none.cosine + most.cosine) / 2


def test_the_layer_that_harms_most_is_the_first_to_stay_in_float_and_the_only_one_where_that_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_graph, "equalise", lambda *_: None)  # it would mend this
    graph = onnx_graph.Graph(face_network())
    bad = next(node for node in graph.model.graph.node if node.op_type == "Conv" and node.name == "conv9")
    before = next(node for node in graph.model.graph.node if node.name == "conv7")  # depthwise
    weight, own, bias = graph.constant(bad, 1), graph.constant(before, 1), graph.constant(before, 2)
    assert weight is not None and own is not None and bias is not None
    dead = (np.arange(16) != 0).astype(np.float32)
    graph.replace_constant(before, 1, own * dead.reshape(-1, 1, 1, 1))
    graph.replace_constant(before, 2, bias * dead)
    # A channel that is always 0, with weights that leave the others' hardly a step of the scale.
    graph.replace_constant(bad, 1, np.where(np.arange(16).reshape(1, -1, 1, 1) == 0, 100, weight))
    none, most = quantise(graph.model, PICTURES, -1), quantise(graph.model, PICTURES, 2.0)
    one = quantise(graph.model, PICTURES, (none.cosine + most.cosine) / 2)
    assert one.in_float[0] == "conv9"
    assert set(one.in_float) == set(int8.layers_of(_rewritten(graph.model))["conv9"])
    assert len(one.in_float) < len(most.in_float)


def _rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as it is quantised."""
    graph = onnx_graph.Graph(onnx_graph.copied(model))
    onnx_graph.flatten_slopes(graph)
    onnx_graph.split_prelus(graph)
    return graph.model


def test_a_layer_is_what_has_weights_and_what_follows_it(plain: onnx.ModelProto) -> None:
    model = _rewritten(plain)
    layers = int8.layers_of(model)
    assert len(layers) == 8
    nodes = {node.name: node.op_type for node in model.graph.node}
    for layer, members in layers.items():
        assert members[0] == layer and nodes[layer] in ("Conv", "Gemm") and "_slope" not in layer
        assert all(nodes[name] in int8.OPERATORS for name in members)
        assert sum(nodes[name] in ("Conv", "Gemm") and "_slope" not in name for name in members) == 1
    named = [name for members in layers.values() for name in members]
    assert named == [node.name for node in model.graph.node if node.op_type in int8.OPERATORS]  # each once, in order


def test_what_comes_before_the_first_weights_belongs_to_no_layer() -> None:
    build = Builder(3)
    tensor = build.conv(build.node("Relu", "images"), 4)
    assert list(int8.layers_of(build.model(tensor)).values()) == [["conv1"]]


def test_ranges_are_the_extremes_of_all_pictures_or_what_is_left_without_the_outermost(plain: onnx.ModelProto) -> None:
    ranges = int8._ranges(plain, PICTURES, 1)
    assert ranges.keys() == {"minmax", "percentile"}
    assert ranges["minmax"].keys() == ranges["percentile"].keys()
    assert not any(name.startswith("constant") for name in ranges["minmax"])
    names = ["images", plain.graph.node[0].output[0]]
    (whole,) = onnx_graph.observe(plain, names, PICTURES, batch_size=len(PICTURES))
    for name, values in zip(names, whole, strict=True):
        lowest, highest = ranges["minmax"][name]
        assert float(lowest) == pytest.approx(float(values.min()))
        assert float(highest) == pytest.approx(float(values.max()))
    for name, (lowest, highest) in ranges["percentile"].items():
        extreme = ranges["minmax"][name]
        assert extreme[0] <= lowest <= highest <= extreme[1]


def test_pictures_that_judge_give_no_range(plain: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    ranges = int8._ranges

    def spy(model: onnx.ModelProto, pictures: Array, threads: int) -> object:
        seen.append(pictures)
        return ranges(model, pictures, threads)

    monkeypatch.setattr(int8, "_ranges", spy)
    quantise(plain, PICTURES, -1)
    (used,) = seen
    np.testing.assert_array_equal(used, PICTURES[:30])


def test_pictures_are_run_in_parts_and_come_back_in_order(plain: onnx.ModelProto) -> None:
    many = random_pictures(2 * int8.BATCH + 5, seed=9)
    whole = embeddings(plain, many)
    assert whole.shape == (len(many), 16)
    for row in (0, int8.BATCH - 1, int8.BATCH, len(many) - 1):
        np.testing.assert_allclose(whole[row], embeddings(plain, many[row : row + 1])[0], atol=1e-6)


def test_equalising_makes_int8_better_where_channels_differ(
    plain: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    uneven = onnx_graph.Graph(onnx_graph.copied(plain))
    for link in list(uneven.links()):
        channels = uneven.channels(link.first.output[0])
        factor = np.geomspace(0.05, 20, channels).astype(np.float32)
        uneven.scale_link(link, factor, np.float32(1) / factor)
    equalised = quantise(uneven.model, PICTURES, -1)
    monkeypatch.setattr(onnx_graph, "equalise", lambda *_: None)
    assert equalised.cosine > 0.99
    assert quantise(uneven.model, PICTURES, -1).cosine < equalised.cosine - 0.02


def test_a_model_that_gives_no_number_is_never_the_better_one(
    plain: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = int8.run, []

    def broken(session: object, pictures: Array) -> Array:
        calls.append(session)
        return run(session, pictures) * (np.nan if len(calls) == 2 else 1)  # 1: the parent, 2: minmax, 3: percentile

    monkeypatch.setattr(int8, "run", broken)
    assert quantise(plain, PICTURES, -1).method == "percentile"
    assert len(calls) == 3
