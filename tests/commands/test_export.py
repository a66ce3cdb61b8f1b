"""Exports: the file that leaves gives the embeddings of the model that stays, in other programs' hands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

import facefast
from facefast import evaluate, export, predict, train
from facefast.data.drawn import synthetic
from facefast.deploy import package as packages
from facefast.runtime import files, manifest
from tests.support import small

BATCHES = (1, 2, 5)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", small.make_model(), drawn)


def pictures(batch: int) -> torch.Tensor:
    """Normalised pictures, none like those that `export` itself compares with."""
    return torch.randn(batch, 3, small.SIZE, small.SIZE, generator=torch.Generator().manual_seed(batch))


def test_the_models_under_test_tell_pictures_apart(run: Path) -> None:
    similarity = facefast.load(run).embed(pictures(5), mirror=False)
    similarity = similarity @ similarity.T
    assert float((similarity - torch.eye(5)).max()) < 0.9  # else every comparison below would pass


def test_an_onnx_file_gives_the_models_embeddings_in_onnxruntime_at_any_batch_size(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.onnx"
    assert export.main([str(run), "--to", "onnx", str(out)]) == 0
    # Weights inside: one file is enough.
    assert sorted(file.name for file in out.parent.iterdir()) == ["model.json", "model.onnx"]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    said, beside = session.get_modelmeta().custom_metadata_map, files.read_json(out.parent / "model.json")
    assert said.keys() == beside.keys()
    assert all((json.loads(said[name]) if said[name] != text else text) == text for name, text in beside.items())
    assert beside["mean"] == [127.5] * 3 and beside["color"] == "rgb" and len(beside["class_names"]) > 1
    (given,), (taken, *_) = session.get_inputs(), session.get_outputs()
    assert (given.name, taken.name) == ("images", "embeddings")
    assert given.shape[1:] == [3, small.SIZE, small.SIZE]
    assert isinstance(given.shape[0], str)  # a name: any number
    model = facefast.load(run)
    for batch in BATCHES:
        images = pictures(batch)
        (found,) = session.run(["embeddings"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model.embed(images, mirror=False), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def package(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "package"
    assert export.main([str(run), str(out), "--to", "safetensors"]) == 0
    return out


def test_a_package_reads_back_as_the_same_model(run: Path, package: Path) -> None:
    assert sorted(file.name for file in package.iterdir()) == sorted(packages.PACKAGE)
    manifest.verify(package)
    one, two = facefast.load(run), facefast.load(package)
    assert two.to_config() == one.to_config()
    assert two.class_names == small.NAMES
    assert not two.training
    images = torch.randint(0, 256, (3, 3, small.SIZE, small.SIZE), dtype=torch.uint8)
    assert torch.equal(one.embed(images), two.embed(images))
    assert one.predict(images).names == two.predict(images).names


def test_a_package_evaluates_on_the_pictures_that_its_run_kept_for_testing(
    run: Path, package: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for model in (run, package):
        assert evaluate.main([str(model), f"--data.root={drawn}", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))
    assert results[0]["test_rows"] == 8  # two pictures of each person
    assert results[0] == results[1]


def test_a_package_predicts_what_its_run_predicts(
    run: Path, package: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = [str(path) for path in sorted((drawn / "img_align_celeba").iterdir())[:3]]
    printed = []
    for model in (run, package):
        assert predict.main([str(model), *photographs, "--json"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].count('"names"') == 2 * 3  # of a picture, and of the one face on it
    assert printed[0] == printed[1]


def test_a_package_does_not_tell_where_its_owners_photographs_lie(package: Path, drawn: Path) -> None:
    assert str(drawn) not in (package / "recipe.json").read_text()
    assert files.read_json(package / "recipe.json")["data"]["root"] == ""


def test_a_package_never_takes_a_folder_that_holds_something_else(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    (tmp_path / "figures").mkdir()
    assert export.main([str(run), str(tmp_path), "--to", "safetensors"]) == 64
    assert "figures, which is no part of a model; choose an empty folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "thesis.tex"]


def test_without_onnxs_packages_the_error_says_how_to_get_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export.main([str(run), str(tmp_path / "model.onnx")]) == 64
    assert "pip install 'facefast[onnx]'" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["torch", "safetensors"])
def test_a_place_that_cannot_be_written_ends_with_74(
    run: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)  # slow, and comes to nothing here
    assert export.main([str(run), str(tmp_path / "file" / "out"), "--to", to]) == 74
    assert f"cannot write {tmp_path / 'file' / 'out'}" in capsys.readouterr().err


def test_wrong_use_ends_with_64(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 64
    assert "holds no model" in capsys.readouterr().err
    assert export.main([str(run), str(tmp_path / "out"), "--to", "tensorflow"]) == 64


def test_a_trained_model_takes_its_licence_its_measurements_and_what_chose_it_along(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = synthetic.DrawnSpec(identities=(6, 0, 0), pictures=12, seed=4)
    data = synthetic.write(tmp_path / "faces", spec, processes=1, progress=False)
    words = (f"--data.root={data}", f"--model.source={run}", "--model.source-licence=CC BY 4.0", "--pictures=0")
    small_phase = ("--phases.0.steps=1", "--phases.0.batch-size=8", "--eval.pairs=12", "--eval.folds=2")
    assert train.main(["fixed", *words, *small_phase, f"--out={tmp_path / 'run'}"]) == 0
    assert export.main([str(tmp_path / "run"), str(tmp_path / "package"), "--to", "safetensors"]) == 0
    assert "licence CC BY 4.0" in capsys.readouterr().out
    document = files.read_json(tmp_path / "package" / "model.json")
    metrics, origin = document["metrics"], document["provenance"]
    assert (origin["source"], origin["licence"], origin["before"]["source"]) == ("run", "CC BY 4.0", None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (reported,) = [line for line in lines if line["split"] == "test" and line["phase"] == metrics["row"]]
    assert metrics["results"]["top1"] == reported["top1"] and metrics["results"]["top1_low"] == reported["top1_low"]
    asked, selected = metrics["evaluation_set"], metrics["selected"]
    assert asked["name"] == "faces" and asked["test"]["pictures"] == reported["test_rows"]
    best = files.read_json(tmp_path / "run" / "status.json")["best"]
    assert (metrics["row"], selected["metric"]) == (best["phase"], best["metric"])
    assert selected["pictures"] > 0 and selected["part"] in ("training", "validation")
