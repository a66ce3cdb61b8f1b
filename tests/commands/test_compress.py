"""Int8 models: they compute in integers, give their parent's embeddings, and are refused where they do not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from facefast import compress
from facefast.compress import CompressArguments
from facefast.data import PairSet
from facefast.data.drawn import synthetic
from facefast.deploy import gate as gates
from facefast.deploy import int8, onnx_graph
from facefast.deploy.gate import Gate
from facefast.deploy.package import export
from facefast.models import FaceModel, checkpoint
from facefast.recipe import DataConfig, Reading
from tests.support import small

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(8, 0, 0), pictures=6, seed=3)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


def make_model() -> FaceModel:
    """A model none of whose PReLUs are alike, and some of whose slopes are above 1, as training leaves them."""
    model = small.make_model()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.PReLU):
                module.weight.copy_(0.25 + 0.1 * torch.randn(module.weight.shape, generator=generator))
                module.weight[3] = 1.5
    return model.eval()


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", make_model(), drawn)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    path = tmp_path_factory.mktemp("onnx") / "float.onnx"
    export(make_model(), "onnx", path)
    return onnx.load(path)


def command(run: Path, data: Path, out: Path, *more: str) -> int:
    """With a gate for weights that never trained: they magnify rounding, and verify little better than chance."""
    gate = ("--min-cosine", "0.93", "--max-loss", "0.1", "--photographs", "24")
    return compress.main([str(run), "--data.root", str(data), "--out", str(out), *gate, *more])


@pytest.fixture(scope="module")
def package(run: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "new" / "package"
    assert command(run, drawn, out) == 0
    return out


def random_pictures(number: int) -> Array:
    return np.random.default_rng(5).standard_normal((number, 3, small.SIZE, small.SIZE)).astype(np.float32)


def test_a_package_says_what_it_takes_and_what_the_gate_found(package: Path, run: Path) -> None:
    assert sorted(file.name for file in package.iterdir()) == sorted(compress.PACKAGE)
    checkpoint.verify(package)
    document = json.loads((package / "int8.json").read_text())
    model = checkpoint.load_model(run)
    assert document["image"] == model.to_config()["image"]
    assert document["embedding_size"] == model.embedding_size
    gate = document["gate"]
    assert gate["min_cosine"] == 0.93 <= gate["cosine_mean"] < 1
    assert gate["cosine_p01"] <= gate["cosine_mean"]
    before, after = gate["verification_before"], gate["verification_after"]
    assert before["pairs"] == after["pairs"] > 0
    assert before["verification_accuracy"] - after["verification_accuracy"] <= 0.1
    assert set(document["seconds_per_picture"]) == {"torch float32", "onnxruntime float32", "onnxruntime int8"}
    assert (package / "model-int8.onnx").stat().st_size == document["bytes_after"] < document["bytes_before"] / 2


def test_a_published_model_keeps_its_embeddings_and_its_accuracy(
    shared_weights: Path, celeba: Path, tmp_path: Path
) -> None:
    model = str(shared_weights / "mobilefacenet_casia_112x96.ckpt")
    arguments = ("--data.root", str(celeba), "--photographs", "64", "--pairs", "200", "--max-loss", "0.015")
    assert compress.main([model, *arguments, "--out", str(tmp_path / "out")]) == 0  # mean cosine at least 0.98
    document = json.loads((tmp_path / "out" / "int8.json").read_text())
    assert document["layers_in_float"] == []
    assert document["gate"]["cosine_p01"] > 0.95


def test_embeddings_come_from_integer_kernels(package: Path, tmp_path: Path) -> None:
    graph = onnx.load(package / "model-int8.onnx").graph
    kinds = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4}
    assert kinds == {TensorProto.INT8}  # every convolution's weights
    assert "QuantizeLinear" in {node.op_type for node in graph.node}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as_run.onnx")
    options.log_severity_level = 3  # it says that the file suits this machine only
    onnxruntime.InferenceSession(package / "model-int8.onnx", options, providers=["CPUExecutionProvider"])
    run = [node.op_type for node in onnx.load(tmp_path / "as_run.onnx").graph.node]
    assert run.count("QLinearConv") >= 50
    assert not {"Conv", "PRelu", "Relu", "FusedConv"} & set(run)


def test_any_number_of_pictures_gives_nearly_the_parents_embeddings(package: Path, run: Path, drawn: Path) -> None:
    model = checkpoint.load_model(run)
    arguments = CompressArguments(run, package, DataConfig(root=str(drawn)))
    _, judged, _ = compress.divide(arguments, model, Reading(1))
    images = next(compress.read_pictures(judged, model, Reading(1)))[0]
    session = onnxruntime.InferenceSession(package / "model-int8.onnx", providers=["CPUExecutionProvider"])
    expected = model.embed(torch.from_numpy(images), mirror=False).numpy()
    assert (expected @ expected.T).min() < 0.8  # pictures that are told apart
    for batch in (1, 2, 5):
        (found,) = session.run(None, {"images": images[:batch]})
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert ((found * expected[:batch]).sum(1) > 0.9).all()


def test_ranges_from_black_pictures_are_refused_and_nothing_is_written(
    run: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, calls = compress.read_pictures, []

    def black(*arguments: object) -> Iterator[tuple[Array, torch.Tensor]]:
        calls.append(arguments)
        for images, rows in read(*arguments):  # type: ignore[arg-type]
            yield np.full_like(images, -1) if len(calls) == 1 else images, rows

    monkeypatch.setattr(compress, "read_pictures", black)
    monkeypatch.setattr(int8, "layers_of", lambda model: {})  # the search for better layers is tested below
    assert command(run, drawn, tmp_path / "out") == 64
    assert len(calls) == 2
    assert "the int8 model gives other embeddings than its parent: mean cosine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_student_is_held_against_its_original_too(
    run: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = make_model()
    with torch.no_grad():
        stranger.backbone.get_parameter("linear1.conv.weight").mul_(-1)  # opposite embeddings
    other = small.save_run(tmp_path / "other", stranger, drawn)
    assert command(run, drawn, tmp_path / "out", "--original", str(other)) == 64
    assert f"the int8 model gives other embeddings than {other}: mean cosine -" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command(run, drawn, tmp_path / "out", "--original", str(run)) == 0
    document = json.loads((tmp_path / "out" / "int8.json").read_text())
    assert document["gate_original"]["cosine_mean"] == document["gate"]["cosine_mean"]
    assert "cosine to the original's embeddings: mean" in capsys.readouterr().out


def test_the_gate_refuses_lost_cosine_lost_verification_and_nan() -> None:
    def gate(cosine: float, after: float | None) -> Gate:
        found = [{"verification_accuracy": x, "pairs": 6000} for x in (0.95, after) if x is not None]
        return Gate(cosine, cosine, 100, *(found if after is not None else (None, None)))

    gate(0.98, 0.946).check(0.98, 0.005, "its parent")
    gate(0.98, None).check(0.98, 0.005, "its parent")
    with pytest.raises(ValueError, match="mean cosine 0.9790 .* at least 0.98 is asked for"):
        gate(0.979, 0.95).check(0.98, 0.005, "its parent")
    with pytest.raises(ValueError, match="accuracy 0.9440 after 0.9500 on 6000 pairs, a loss of at most 0.005"):
        gate(0.99, 0.944).check(0.98, 0.005, "its parent")
    with pytest.raises(ValueError, match="mean cosine nan"):
        gate(float("nan"), 0.95).check(0.98, 0.005, "its parent")


def test_a_model_that_mixes_people_up_loses_verification_accuracy() -> None:
    class Fake:
        def __init__(self, embeddings: Array) -> None:
            self.embeddings = embeddings

        def run(self, _: None, given: dict[str, Array]) -> list[Array]:
            return [self.embeddings[given["images"][:, 0].astype(int)]]

    people, rows = np.repeat(np.eye(4, dtype=np.float32), 4, 0), np.arange(16)
    left, right = np.triu_indices(16, 1)
    pairs = PairSet.of(left, right, left // 4 == right // 4)
    pictures = [(rows[i : i + 4, None].astype(np.float32), torch.from_numpy(rows[i : i + 4])) for i in (0, 4, 8, 12)]
    same = gates.compare(Fake(people), Fake(people), iter(pictures), 16, pairs)
    assert (same.cosine_mean, same.loss, same.photographs) == (1, 0, 16)
    mixed = gates.compare(Fake(people), Fake(people[rows % 4 * 4]), iter(pictures), 16, pairs)
    assert mixed.loss is not None and mixed.loss > 0.1
    with pytest.raises(ValueError, match="verifies worse"):
        mixed.check(-1, 0.005, "its parent")


def test_without_pairs_the_cosine_alone_decides(
    run: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(drawn / "img_align_celeba", tmp_path / "photographs" / "ann")
    assert command(run, tmp_path / "photographs", tmp_path / "out", "--data.format", "folder") == 0
    assert "the gate went by the cosine alone" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "int8.json").read_text())["gate"]["verification_after"] is None


def test_rewritten_graphs_compute_the_same_without_a_prelu(parent: onnx.ModelProto) -> None:
    pictures = random_pictures(8)
    expected = int8.run(onnx_graph.session(parent), pictures)
    graph = onnx_graph.Graph(onnx_graph.copied(parent))
    links = list(graph.links())
    assert len(links) > 30
    slopes = [graph.constant(link.activation, 1) for link in links if link.activation is not None]
    assert any(slope is not None and (slope > 1).any() for slope in slopes)
    onnx_graph.split_prelus(graph)  # with slopes above 1: two convolutions each
    np.testing.assert_allclose(int8.run(onnx_graph.session(graph.model), pictures), expected, atol=1e-5)

    graph = onnx_graph.Graph(onnx_graph.copied(parent))
    onnx_graph.flatten_slopes(graph)
    onnx_graph.equalise(graph, pictures)
    np.testing.assert_allclose(int8.run(onnx_graph.session(graph.model), pictures), expected, atol=1e-4)
    assert onnx_graph.split_prelus(graph) == 0
    graph.drop_unused_constants()
    np.testing.assert_allclose(int8.run(onnx_graph.session(graph.model), pictures), expected, atol=1e-4)
    operators = [node.op_type for node in graph.model.graph.node]
    assert "PRelu" not in operators
    assert operators.count("Conv") == 50 + 33  # one for each PReLU
    assert onnx.load_model_from_string(parent.SerializeToString()) == parent  # the parent is as it was


def test_equalising_makes_int8_better_where_channels_differ(parent: onnx.ModelProto) -> None:
    uneven = onnx_graph.Graph(onnx_graph.copied(parent))
    for link in list(uneven.links()):
        channels = uneven.channels(link.first.output[0])
        factor = np.geomspace(0.05, 20, channels).astype(np.float32)
        uneven.scale_link(link, factor, np.float32(1) / factor)
    pictures = random_pictures(16)
    equalised = int8.quantise(uneven.model, pictures, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "equalise", lambda *_: None)
        plain = int8.quantise(uneven.model, pictures, -1)
    assert equalised.cosine > 0.9
    assert plain.cosine < equalised.cosine - 0.02


def test_layers_stay_in_float_where_the_cosine_asks_for_it(parent: onnx.ModelProto) -> None:
    pictures = random_pictures(16)
    plain, careful = int8.quantise(parent, pictures, -1), int8.quantise(parent, pictures, 0.99999)
    assert plain.in_float == ()
    assert careful.in_float
    assert careful.cosine > plain.cosine
    kinds = {t.data_type for t in careful.model.graph.initializer if len(t.dims) == 4}
    assert kinds == {TensorProto.INT8, TensorProto.FLOAT}


def test_wrong_use_ends_with_a_message(
    run: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *arguments: str) -> None:
        assert compress.main([str(run), *arguments]) == 64
        assert message in capsys.readouterr().err

    out = ("--out", str(tmp_path / "out"))
    refused("compress needs photographs: --data.root DIR", *out)
    few = tmp_path / "few" / "ann"
    few.mkdir(parents=True)
    for photograph in sorted((drawn / "img_align_celeba").iterdir())[:5]:
        shutil.copy(photograph, few)
    refused("holds 5 readable photographs; int8 needs at least 16", "--data.root", str(few.parent), *out)
    refused("photographs is 3 and pairs 6000", "--data.root", str(drawn), "--photographs", "3", *out)
    refused("min_cosine is 2.0", "--data.root", str(drawn), "--min-cosine", "2", *out)
    refused("holds ann, which is no part of an int8 model", "--data.root", str(drawn), "--out", str(few.parent))
    refused("is a file; --out names a folder", "--data.root", str(drawn), "--out", str(next(few.iterdir())))
    assert not (tmp_path / "out").exists()


def test_without_onnxs_packages_the_error_says_how_to_get_them(
    run: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert command(run, drawn, tmp_path / "out") == 64
    assert "pip install 'facefast[onnx]'" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_ends_with_74(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="choose another --out"):
        compress._write(tmp_path / "file" / "out", b"", {})
