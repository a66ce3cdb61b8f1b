"""Rewritten ONNX graphs: each rewrite keeps what the graph computes, and leaves alone what it could not keep."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
from numpy.typing import ArrayLike
from onnx import helper

from facefast.deploy import onnx_graph
from facefast.deploy.onnx_graph import Graph
from tests.support.graphs import Array, Builder, face_network, random_pictures

PICTURES = random_pictures(6)


def answers(model: onnx.ModelProto) -> list[Array]:
    """What a model gives for `PICTURES`, by ONNX Runtime."""
    return [np.asarray(out) for out in onnx_graph.session(model).run(None, {"images": PICTURES})]


def assert_same(model: onnx.ModelProto, other: onnx.ModelProto, atol: float = 2e-6) -> None:
    for one, two in zip(answers(model), answers(other), strict=True):
        assert np.abs(one).max() > 0.1  # or everything would be the same
        np.testing.assert_allclose(two, one, rtol=0, atol=atol * np.abs(one).max())


def graph_of(model: onnx.ModelProto) -> Graph:
    return Graph(onnx_graph.copied(model))


def kinds(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.model.graph.node]


def chain(activation: str, second: str = "full", bias: bool = True, slopes: ArrayLike = (0.2, 1.5, -0.3, 1.0)) -> Graph:
    """Convolution, activation, convolution."""
    build = Builder(1)
    tensor = build.conv("images", 4, bias=bias)
    if activation == "PRelu":
        tensor = build.prelu(tensor, slopes)
    elif activation:
        tensor = build.node(activation, tensor)
    tensor = build.depthwise(tensor, bias) if second == "depthwise" else build.conv(tensor, 5, bias=bias)
    return Graph(build.model(tensor))


# Which convolutions may share their range.


@pytest.mark.parametrize("second", ["full", "depthwise"])
@pytest.mark.parametrize("activation", ["", "Relu", "PRelu"])
def test_convolutions_are_linked_through_nothing_or_one_activation(activation: str, second: str) -> None:
    graph = chain(activation, second)
    (link,) = graph.links()
    assert (link.activation.op_type if link.activation is not None else "") == activation
    assert graph.is_depthwise(link.second) == (second == "depthwise")
    assert link.tensor == link.second.input[0]
    assert graph.channels(link.first.output[0]) == 4
    assert graph.channels(link.tensor) == (0 if activation else 4)  # only a convolution's own output tells


@pytest.mark.parametrize("activation", ["Sigmoid", "Tanh", "LeakyRelu", "HardSwish", "Softplus", "Clip"])
def test_what_lets_no_factor_through_links_nothing(activation: str) -> None:
    assert list(chain(activation).links()) == []


def test_a_tensor_that_somebody_else_reads_too_links_nothing() -> None:
    def build(where: str) -> Graph:
        made = Builder(2)
        first = made.conv("images", 4)
        activated = made.prelu(first, [0.2] * 4)
        last = made.conv(activated, 4)
        if where == "before the activation":
            last = made.node("Add", last, first)
        if where == "after the activation":
            last = made.node("Add", last, activated)
        outputs = {"the output, before": [last, first], "the output, after": [last, activated]}.get(where, [last])
        return Graph(made.model(*outputs))

    assert len(list(build("nowhere").links())) == 1
    for where in ("before the activation", "after the activation", "the output, before", "the output, after"):
        assert list(build(where).links()) == [], where


def test_grouped_convolutions_that_are_not_depthwise_link_nothing() -> None:
    for channels, groups in ((4, 2), (8, 4)):  # groups of two; a depthwise one with two filters a channel
        build = Builder(3)
        last = build.conv(build.conv("images", 4), channels, groups=groups)
        assert list(Graph(build.model(last)).links()) == []


def test_weights_that_are_computed_link_nothing() -> None:
    build = Builder(4)
    first = build.conv("images", 4)
    weight = build.node("Abs", build.constant(np.ones((5, 4, 1, 1))), channels=5)
    last = build.node("Conv", first, weight, channels=5, kernel_shape=[1, 1])
    assert list(Graph(build.model(last)).links()) == []


# Constants.


def test_a_constant_that_two_nodes_share_is_replaced_for_one_of_them() -> None:
    build = Builder(5)
    shared = build.constant(np.full((4, 1, 1), 0.5))
    first = build.node("PRelu", build.conv("images", 4), shared)
    second = build.node("PRelu", build.conv(first, 4), shared)
    graph = Graph(build.model(second))
    one, two = (node for node in graph.model.graph.node if node.op_type == "PRelu")
    for value in (0.25, 0.125):  # a second time too
        graph.replace_constant(one, 1, np.full((4, 1, 1), value))
        np.testing.assert_array_equal(graph.constant(one, 1), np.full((4, 1, 1), value, np.float32))
    np.testing.assert_array_equal(graph.constant(two, 1), np.full((4, 1, 1), 0.5, np.float32))
    assert graph.constant(one, 0) is None  # computed
    assert graph.constant(one, 2) is None  # not there
    onnx.checker.check_model(graph.model)
    assert len(answers(graph.model)) == 1


def test_only_constants_that_nobody_reads_are_dropped() -> None:
    graph = graph_of(face_network())
    before = {tensor.name for tensor in graph.model.graph.initializer}
    graph.drop_unused_constants()
    assert {tensor.name for tensor in graph.model.graph.initializer} == before
    prelu = next(node for node in graph.model.graph.node if node.op_type == "PRelu")
    old = prelu.input[1]
    graph.replace_constant(prelu, 1, np.full((8, 1, 1), 0.5))
    graph.drop_unused_constants()
    assert {tensor.name for tensor in graph.model.graph.initializer} == before - {old} | {prelu.input[1]}
    answers(graph.model)


def test_scaling_a_link_changes_what_stands_between_and_nothing_after() -> None:
    for activation in ("", "Relu", "PRelu"):
        for second in ("full", "depthwise"):
            for bias in (True, False):
                plain = chain(activation, second, bias)
                graph = graph_of(plain.model)
                (link,) = graph.links()
                factor = np.array([0.25, 1, 3, 8], np.float32)
                graph.scale_link(link, np.float32(1) / factor, factor)
                assert_same(plain.model, graph.model)
                (before,), (after,) = (
                    next(onnx_graph.observe(model, [link.tensor], PICTURES)) for model in (plain.model, graph.model)
                )
                np.testing.assert_allclose(after, before / factor.reshape(-1, 1, 1), rtol=1e-5, atol=1e-6)


# Looking inside.


def test_tensors_are_observed_a_batch_at_a_time_and_the_model_stays_as_it_is() -> None:
    model = face_network()
    before = model.SerializeToString()
    names = [model.graph.node[0].output[0], model.graph.node[3].output[0]]
    batches = list(onnx_graph.observe(model, names, PICTURES, batch_size=4))
    assert [[len(tensor) for tensor in tensors] for tensors in batches] == [[4, 4], [2, 2]]
    assert model.SerializeToString() == before
    (whole,) = onnx_graph.observe(model, names, PICTURES, batch_size=6)
    for place in (0, 1):
        found = np.concatenate([tensors[place] for tensors in batches])
        np.testing.assert_allclose(found, whole[place], rtol=1e-5, atol=1e-6)


def test_a_copy_is_nobody_elses() -> None:
    model = face_network()
    other = onnx_graph.copied(model)
    other.graph.node[0].name = "renamed"
    assert model.graph.node[0].name != "renamed"
    assert type(other) is type(model)


def test_a_model_is_opened_from_a_file_as_from_memory(tmp_path: object) -> None:
    path = f"{tmp_path}/model.onnx"
    onnx.save(face_network(), path)
    (found,) = onnx_graph.session(path).run(None, {"images": PICTURES})
    np.testing.assert_array_equal(found, answers(face_network())[0])


# Slopes above 1.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("second", ["full", "depthwise"])
def test_slopes_above_1_become_slopes_below_it_and_nothing_else_changes(second: str, bias: bool) -> None:
    plain = chain("PRelu", second, bias)
    graph = graph_of(plain.model)
    onnx_graph.flatten_slopes(graph)
    (link,) = graph.links()
    slopes = graph.constant(link.activation, 1)  # type: ignore[arg-type]
    np.testing.assert_allclose(np.ravel(slopes), [0.2, 1 / 1.5, -0.3, 1.0])  # type: ignore[arg-type]
    assert_same(plain.model, graph.model)


def test_one_slope_for_all_channels_is_flattened_too() -> None:
    plain = chain("PRelu", slopes=2.0)
    graph = graph_of(plain.model)
    onnx_graph.flatten_slopes(graph)
    (link,) = graph.links()
    np.testing.assert_array_equal(np.ravel(graph.constant(link.activation, 1)), [0.5] * 4)  # type: ignore[arg-type]
    assert_same(plain.model, graph.model)


def test_flat_slopes_and_other_activations_are_left_as_they_are() -> None:
    for graph in (chain("PRelu", slopes=[1.0, 0.5, 0, -2]), chain("Relu"), chain("")):
        before = graph.model.SerializeToString()
        onnx_graph.flatten_slopes(graph)
        assert graph.model.SerializeToString() == before


def test_a_steep_slope_in_front_of_no_convolution_stays() -> None:
    build = Builder(6)
    tensor = build.node("GlobalAveragePool", build.prelu(build.conv("images", 4), [1.5] * 4))
    graph = Graph(build.model(tensor))
    before = graph.model.SerializeToString()
    onnx_graph.flatten_slopes(graph)
    assert graph.model.SerializeToString() == before


# PReLUs as convolutions.


@pytest.mark.parametrize("slopes", [(0.2, 0.9, -0.3, 1.0), (0.2, 1.5, -0.3, 1.0), 0.25, 1.75, (0.0,) * 4])
def test_a_prelu_becomes_convolutions_relus_and_an_addition(slopes: ArrayLike) -> None:
    plain = chain("PRelu", slopes=slopes)
    graph = graph_of(plain.model)
    assert onnx_graph.split_prelus(graph) == 0
    steep = bool(np.max(np.asarray(slopes)) > 1)
    assert kinds(graph) == ["Conv", "Conv", "Relu", *(["Conv"] if steep else []), "Add", "Conv"]
    assert_same(plain.model, graph.model)
    onnx.checker.check_model(graph.model, full_check=True)


def test_a_prelu_at_the_end_keeps_the_outputs_name() -> None:
    build = Builder(7)
    plain = build.model(build.prelu(build.conv("images", 4), [0.2, 1.5, 0.5, 2.0]))
    graph = graph_of(plain)
    assert onnx_graph.split_prelus(graph) == 0
    assert graph.model.graph.output[0].name == plain.graph.output[0].name
    assert_same(plain, graph.model)


def test_prelus_that_share_their_slopes_are_split_each_by_itself() -> None:
    build = Builder(8)
    shared = build.constant(np.reshape([0.2, 0.4, 0.6, 0.8], (4, 1, 1)))
    tensor = build.node("PRelu", build.conv("images", 4), shared)
    tensor = build.node("PRelu", build.node("Add", tensor, build.conv("images", 4)), shared)  # after an addition
    plain = build.model(tensor)
    graph = graph_of(plain)
    assert onnx_graph.split_prelus(graph) == 0
    assert kinds(graph).count("Add") == 3
    names = [node.name for node in graph.model.graph.node]
    assert len(set(names)) == len(names)
    assert_same(plain, graph.model)


def test_a_prelu_whose_channels_are_unknown_is_left_and_counted() -> None:
    build = Builder(9)
    tensor = build.node("PRelu", "images", build.constant([[[0.25]]]))  # no convolution tells how many there are
    tensor = build.prelu(build.conv(tensor, 4), [0.5] * 4)
    learnt = build.node("Abs", build.conv("images", 4))
    tensor = build.node("PRelu", tensor, build.node("GlobalAveragePool", learnt))  # slopes that are computed
    plain = build.model(tensor)
    graph = graph_of(plain)
    assert onnx_graph.split_prelus(graph) == 2
    assert kinds(graph).count("PRelu") == 2
    assert_same(plain, graph.model)


def test_after_a_rewrite_links_are_found_anew() -> None:
    graph = chain("PRelu", slopes=[0.5] * 4)
    assert len(list(graph.links())) == 1
    onnx_graph.split_prelus(graph)
    assert list(graph.links()) == []  # the addition stands between
    relu = next(node for node in graph.model.graph.node if node.op_type == "Relu")
    slope, addition = graph._producers[relu.input[0]], graph._readers(relu.output[0])
    assert (slope.op_type, [node.op_type for node in addition]) == ("Conv", ["Add"])
    assert graph.channels(slope.output[0]) == 4


# Channels of equal range.


def uneven(second: str, activation: str = "PRelu") -> Graph:
    """A link whose channels differ in range by a factor of 400."""
    graph = chain(activation, second, slopes=[0.25] * 4)
    (link,) = graph.links()
    factor = np.geomspace(0.05, 20, 4).astype(np.float32)
    graph.scale_link(link, factor, np.float32(1) / factor)
    return graph


def ranges(graph: Graph) -> Array:
    """The greatest absolute value [4] of each channel of the link's tensor."""
    (link,) = graph.links()
    (tensors,) = onnx_graph.observe(graph.model, [link.tensor], PICTURES)
    return np.asarray(np.abs(tensors[0]).max((0, 2, 3)))


def spread(values: Array) -> float:
    return float(values.max() / values.min())


@pytest.mark.parametrize("activation", ["PRelu", "Relu", ""])
def test_in_front_of_a_depthwise_convolution_all_channels_get_the_same_range(activation: str) -> None:
    plain = uneven("depthwise", activation)
    graph = graph_of(plain.model)
    assert spread(ranges(graph)) > 100
    onnx_graph.equalise(graph, PICTURES)
    assert spread(ranges(graph)) == pytest.approx(1, rel=1e-4)
    assert ranges(graph).max() == pytest.approx(ranges(plain).max(), rel=1e-4)  # the loudest stays as it is
    assert_same(plain.model, graph.model)


def test_in_front_of_a_full_convolution_activations_and_weights_share_the_burden() -> None:
    plain = uneven("full")
    graph = graph_of(plain.model)
    onnx_graph.equalise(graph, PICTURES)
    (link,) = graph.links()
    weight = graph.constant(link.second, 1)
    assert weight is not None
    activations, weights = ranges(graph), np.abs(weight).max((0, 2, 3))
    assert spread(activations / weights) == pytest.approx(1, rel=1e-4)
    assert spread(activations) < spread(ranges(plain)) ** 0.75
    assert_same(plain.model, graph.model)


def test_the_loudest_picture_counts_whichever_batch_it_came_in() -> None:
    pictures = random_pictures(20)
    pictures[0] *= 50
    found = []
    for order in (pictures, pictures[::-1].copy()):
        graph = uneven("depthwise")
        onnx_graph.equalise(graph, order)
        (link,) = graph.links()
        found.append(graph.constant(link.first, 1))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)  # type: ignore[arg-type]


def test_a_dead_channel_is_not_raised_without_end() -> None:
    graph = chain("Relu", "depthwise")
    (link,) = graph.links()
    weight, bias = graph.constant(link.first, 1), graph.constant(link.first, 2)
    assert weight is not None and bias is not None
    alive = np.array([1, 1, 0, 1], np.float32)
    graph.replace_constant(link.first, 1, weight * alive.reshape(-1, 1, 1, 1))
    graph.replace_constant(link.first, 2, bias * alive)
    plain = graph_of(graph.model)
    onnx_graph.equalise(graph, PICTURES)
    (link,) = graph.links()
    for node in (link.first, link.second):
        found = graph.constant(node, 1)
        assert found is not None and np.isfinite(found).all()
        assert np.abs(found).max() < 1e4
    assert_same(plain.model, graph.model)


def test_where_nothing_ever_comes_through_nothing_is_changed() -> None:
    for place in (0, 1):
        graph = chain("Relu", "full", bias=False)
        (link,) = graph.links()
        node = (link.first, link.second)[place]
        weight = graph.constant(node, 1)
        assert weight is not None
        graph.replace_constant(node, 1, 0 * weight)
        graph.drop_unused_constants()
        before = graph.model.SerializeToString()
        onnx_graph.equalise(graph, PICTURES)
        assert graph.model.SerializeToString() == before


def test_a_graph_without_a_link_is_left_as_it_is() -> None:
    build = Builder(10)
    graph = Graph(build.model(build.node("Sigmoid", build.conv("images", 4))))
    before = graph.model.SerializeToString()
    onnx_graph.equalise(graph, PICTURES)
    assert graph.model.SerializeToString() == before


def test_links_that_follow_each_other_are_all_made_even() -> None:
    build = Builder(11)
    tensor = build.conv("images", 4)
    for _ in range(3):
        tensor = build.depthwise(build.prelu(tensor, [0.25] * 4))
    plain = build.model(build.conv(tensor, 4))
    graph = graph_of(plain)
    for link, low in zip(list(graph.links())[:3], (0.01, 0.1, 0.5), strict=True):
        factor = np.geomspace(low, 1, 4).astype(np.float32)
        graph.scale_link(link, factor, np.float32(1) / factor)
    onnx_graph.equalise(graph, PICTURES)
    names = [link.tensor for link in graph.links() if graph.is_depthwise(link.second)]
    assert len(names) == 3
    (tensors,) = onnx_graph.observe(graph.model, names, PICTURES)
    for values in tensors:
        assert spread(np.abs(values).max((0, 2, 3))) == pytest.approx(1, rel=1e-3)
    assert_same(plain, graph.model)


# All of it, on a face model.


def test_the_groups_of_a_convolution_are_1_where_nothing_is_said() -> None:
    assert onnx_graph.groups(helper.make_node("Conv", ["x", "w"], ["y"])) == 1
    assert onnx_graph.groups(helper.make_node("Conv", ["x", "w"], ["y"], group=8)) == 8


def test_rewritten_graphs_compute_the_same_without_a_prelu(parent: onnx.ModelProto) -> None:
    pictures = random_pictures(8, side=32)

    def embeddings(model: onnx.ModelProto) -> Array:
        return np.asarray(onnx_graph.session(model).run(None, {"images": pictures})[0])

    before, expected = copy.deepcopy(parent), embeddings(parent)
    graph = graph_of(parent)
    links = list(graph.links())
    assert len(links) > 30
    slopes = [graph.constant(link.activation, 1) for link in links if link.activation is not None]
    assert any(values is not None and values.max() > 1 for values in slopes)
    onnx_graph.split_prelus(graph)  # with slopes above 1: two convolutions each
    np.testing.assert_allclose(embeddings(graph.model), expected, atol=1e-5)

    graph = graph_of(parent)
    onnx_graph.flatten_slopes(graph)
    onnx_graph.equalise(graph, pictures)
    np.testing.assert_allclose(embeddings(graph.model), expected, atol=1e-4)
    assert onnx_graph.split_prelus(graph) == 0
    graph.drop_unused_constants()
    np.testing.assert_allclose(embeddings(graph.model), expected, atol=1e-4)
    assert "PRelu" not in kinds(graph)
    assert kinds(graph).count("Conv") == 50 + 33  # one for each PReLU
    assert parent == before  # the parent is as it was
