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
from facefast.data.drawn import synthetic
from facefast.deploy import int8
from facefast.models import checkpoint
from facefast.recipe import DataConfig, Reading
from facefast.runtime import manifest
from tests.support import small

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(8, 0, 0), pictures=6, seed=3)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", small.make_uneven_model(), drawn)


def command(run: Path, data: Path, out: Path, *more: str) -> int:
    """With a gate for weights that never trained: they magnify rounding, and verify little better than chance."""
    gate = ("--min-cosine", "0.93", "--max-loss", "0.1", "--photographs", "24")
    return compress.main([str(run), "--data.root", str(data), "--out", str(out), *gate, *more])


@pytest.fixture(scope="module")
def package(run: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "new" / "package"
    assert command(run, drawn, out) == 0
    return out


def test_a_package_says_what_it_takes_and_what_the_gate_found(package: Path, run: Path) -> None:
    assert sorted(file.name for file in package.iterdir()) == sorted(compress.PACKAGE)
    manifest.verify(package)
    document = json.loads((package / "int8.json").read_text())
    model = checkpoint.load_model(run)
    assert document["image"] == model.to_config()["image"]
    assert document["embedding_size"] == model.embedding_size
    gate = document["gate"]
    assert gate["min_cosine"] == 0.93 <= gate["cosine_mean"] < 1
    assert gate["cosine_p01"] <= gate["cosine_mean"]
    assert document["calibration"]["in_gate"] == 0
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
        (found,) = session.run(["embeddings"], {"images": images[:batch]})
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
    stranger = small.make_uneven_model()
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


def test_without_pairs_the_cosine_alone_decides(
    run: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(drawn / "img_align_celeba", tmp_path / "photographs" / "ann")
    assert command(run, tmp_path / "photographs", tmp_path / "out", "--data.format", "folder") == 0
    said = capsys.readouterr().out
    assert "the gate went by the cosine alone" in said and "on 24 photographs, none of which calibrated it" in said
    assert json.loads((tmp_path / "out" / "int8.json").read_text())["gate"]["verification_after"] is None


@pytest.mark.parametrize("people", [1, 4])
def test_the_gate_judges_by_no_photograph_that_calibrated(
    people: int, run: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 in all, by pairs of strangers to the model, which all of them are in, and without pairs."""
    for number, picture in enumerate(sorted((drawn / "img_align_celeba").iterdir())[:20]):
        folder = tmp_path / "photographs" / f"stranger {number % people}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder)
    data = DataConfig(root=str(tmp_path / "photographs"), format="folder")
    arguments = CompressArguments(run, tmp_path / "out", data)
    calibration, judged, pairs = compress.divide(arguments, checkpoint.load_model(run), Reading(1))
    assert not set(calibration.paths.tolist()) & set(judged.paths.tolist())
    assert len(calibration) == 10 and (people == 1) == (pairs is None)
    if pairs is not None:
        assert set(np.concatenate([pairs.left, pairs.right]).tolist()) == set(range(len(judged)))
        assert ((judged.labels[pairs.left] == judged.labels[pairs.right]) == pairs.same).all()
        assert 0 < pairs.same.sum() < len(pairs)


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
    refused("photographs is 3; it must lie in [16,", "--data.root", str(drawn), "--photographs", "3", *out)
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
        compress._write(tmp_path / "file" / "out", b"", {"int8": {}})


def test_a_model_with_layers_of_its_own_is_compressed_with_them(drawn: Path, tmp_path: Path) -> None:
    model = small.make_uneven_model()
    model.add_layers({"smoothing": {"luma": 3.0, "chroma": 6.0}, "linear_map": True})
    assert model.linear_map is not None
    with torch.no_grad():
        model.linear_map.weight.add_(0.2 * torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
    run = small.save_run(tmp_path / "run", model, drawn)
    assert command(run, drawn, tmp_path / "int8") == 0
    found = checkpoint.load_model(tmp_path / "int8")
    images = torch.randint(0, 256, (8, 3, small.SIZE, small.SIZE), dtype=torch.uint8)
    wanted = model.embed(images)
    assert (found.embed(images) * wanted).sum(1).mean() > 0.9
    assert (small.make_uneven_model().embed(images) * wanted).sum(1).mean() < 0.8
