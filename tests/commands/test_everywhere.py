"""Every command with an int8 package and with an ONNX file as MODEL: it works, or says by name why it cannot."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import facefast
from facefast import audit, cli, compress, evaluate, export, gallery, label, predict, train
from facefast.data.drawn import synthetic
from facefast.evaluation.thresholds import NamingThreshold
from facefast.models import checkpoint, exported
from facefast.runtime import files
from facefast.runtime.exits import StorageError
from tests.support import small

AS_THEY_ARE = "--detect=none"
TOLERANCE = {"int8": 0.12, "onnx": 1e-4}
"""Of a cosine: int8 kernels round otherwise on AVX2, AVX-512 and AMX, and weights that never trained magnify that."""
LICENCE = "CC BY-NC 4.0"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(8, 0, 0), pictures=6, seed=3)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has all that a finished run gives it."""
    model = small.make_uneven_model()
    naming = [NamingThreshold(0.01, 0.1, 400, 400, why="").to_json()]
    model.thresholds = {"pairs": [], "naming": naming, "measured_on": "nothing"}
    model.calibration = {"temperature": 1.0, "ece": 0.1, "ece_before": 0.2, "rows": 9}
    model.metrics = {"row": "finetune", "results": {"top1": 0.75}, "evaluation_set": None, "selected": None}
    model.provenance = {"source": "w.pt", "sha256": "ab" * 32, "licence": LICENCE, "before": None, "teacher": None}
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", model, drawn)


@pytest.fixture(scope="module")
def exports(run: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    found = {"int8": folder / "int8", "onnx": folder / "model.onnx"}
    gate = ("--min-cosine", "0.93", "--max-loss", "0.1", "--photographs", "24")
    assert compress.main([str(run), "--data.root", str(drawn), "--out", str(found["int8"]), *gate]) == 0
    assert export.main([str(run), str(found["onnx"])]) == 0
    return found


@pytest.fixture(params=["int8", "onnx"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(exports: dict[str, Path], kind: str) -> Path:
    return exports[kind]


def photographs(drawn: Path, number: int = 3) -> list[str]:
    return [str(path) for path in sorted((drawn / "img_align_celeba").iterdir())[:number]]


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_commands_that_are_not_tried_here_take_no_model() -> None:
    tried = {"audit", "compress", "evaluate", "export", "gallery", "label", "predict", "train"}
    assert set(cli.COMMANDS) - tried == {"index", "report", "align", "submit", "doctor", "bench"}


def test_load_gives_the_same_model_but_for_rounding(run: Path, model: Path, kind: str, drawn: Path) -> None:
    one, two = facefast.load(run, detect="none"), facefast.load(model, detect="none")
    assert two.to_config() == one.to_config() and exported.is_exported(two)
    given = photographs(drawn, 12)
    expected, found = one.embed(given), two.embed(given)
    assert (expected * found).sum(1).mean() > 1 - TOLERANCE[kind]
    assert (expected @ expected.T).min() < 0.5  # pictures that are told apart
    assert found.norm(dim=1).numpy() == pytest.approx(np.ones(12), abs=1e-5)
    images = torch.randint(0, 256, (6, 3, small.SIZE, small.SIZE), generator=torch.Generator().manual_seed(1)).byte()
    torch.testing.assert_close(
        two.predict(images).probabilities, one.predict(images).probabilities, rtol=0, atol=TOLERANCE[kind]
    )


def test_evaluate_asks_the_pictures_that_the_run_kept_and_says_what_the_model_is(
    run: Path, model: Path, kind: str, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for path in (run, model):
        assert evaluate.main([str(path), f"--data.root={drawn}", "--json"]) == 0
        output = capsys.readouterr()
        found.append(json.loads(output.out))
        assert f"source weights w.pt (SHA-256 abababababab...), licence {LICENCE}" in output.err
        assert "top1 75.00%" in output.err
    assert ("in int8, with the thresholds of its float parent" in output.err) == (kind == "int8")
    assert found[0].keys() == found[1].keys() and found[0]["known_pairs"] == found[1]["known_pairs"]
    for name in ("known_auc", "known_verification_accuracy"):
        assert found[1][name] == pytest.approx(found[0][name], abs=TOLERANCE[kind])


def test_predict_names_by_the_thresholds_of_the_parent(
    run: Path, model: Path, kind: str, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for path in (run, model):
        assert predict.main([str(path), *photographs(drawn), "--json", AS_THEY_ARE, "--top=4"]) == 0
        answers.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for one, two in zip(*answers, strict=True):
        assert two["score"] == pytest.approx(one["score"], abs=3 * TOLERANCE[kind])
        assert two["names"] == (["unknown"] if two["score"] < 0.1 else two["names"])
        assert len(two["names"]) in (1, 4)
    if kind == "onnx":
        assert [answer["names"] for answer in answers[0]] == [answer["names"] for answer in answers[1]]


def test_gallery_enrolls_searches_and_verifies(
    run: Path, model: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, (ann, bo, _) = tmp_path / "g.gallery", photographs(drawn)
    assert gallery.main(["enroll", str(store), "ann", ann, "--model", str(model), AS_THEY_ARE]) == 0
    capsys.readouterr()
    assert gallery.main(["search", str(store), ann, AS_THEY_ARE, "--threshold=0.99", "--json"]) == 0
    assert last_line(capsys)["name"] == "ann"
    assert gallery.main(["verify", str(model), ann, bo, AS_THEY_ARE, "--threshold=0.99", "--json"]) == 0
    assert last_line(capsys)["same"] is False
    # Embeddings of another model mean something else, be it its own parent.
    assert gallery.main(["search", str(store), ann, AS_THEY_ARE, "--threshold=0.99", "--model", str(run)]) == 64
    assert "another model" in capsys.readouterr().err
    assert gallery.main(["enroll", str(store), "--from-run", "--model", str(model)]) == 64
    assert "does not say where its pictures are; enroll folders instead" in capsys.readouterr().err


def test_label_and_audit_look_through_photographs(model: Path, drawn: Path, tmp_path: Path) -> None:
    assert label.main([str(model), f"--data.root={drawn}", "--data.detect=none", f"--out={tmp_path / 'l.csv'}"]) == 0
    assert (tmp_path / "l.csv").read_text().startswith("path,")
    assert audit.main([str(model), f"--data.root={drawn}", "--data.detect=none", f"--out={tmp_path / 'audit'}"]) == 0
    assert (tmp_path / "audit" / "suspects.csv").exists()


@pytest.mark.parametrize("to", ["onnx", "torch", "safetensors", "insightface"])
def test_export_says_that_an_export_cannot_be_exported_further(
    model: Path, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(model), str(tmp_path / "out"), "--to", to]) == 64
    assert "cannot be exported: its weights are folded or whole numbers; give the run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_compress_takes_it_neither_as_model_nor_as_original(
    run: Path, model: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ([str(model)], [str(run), "--original", str(model)]):
        assert compress.main([*given, f"--data.root={drawn}", f"--out={tmp_path / 'out'}"]) == 64
        assert "an ONNX file or an int8 package cannot be" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_train_takes_it_as_a_teacher_whose_embeddings_are_learnt_and_never_as_a_source(
    model: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (f"--data.root={drawn}", "--data.detect=none", f"--out={tmp_path / 'run'}")
    assert train.main(["fixed", *data, f"--model.source={model}"]) == 64
    assert "whose numbers can no longer be trained; give the run" in capsys.readouterr().err
    distill = ("distill", *data, f"--model.teacher={model}", "--phases.0.steps=1", "--phases.0.batch_size=8")
    assert train.main([*distill]) == 64
    assert "was exported and has no stages any more, which start teacher takes over" in capsys.readouterr().err
    assert train.main([*distill, "--phases.0.start=scratch", "--phases.0.distill.features=1"]) == 64
    assert "no stages any more, which distill.features compares; use distill.embeddings" in capsys.readouterr().err
    assert not (tmp_path / "run" / "index.npz").exists()  # found out before any photograph was read
    scratch = ("--phases.0.start=scratch", "--model.backbone=mobilefacenet_short")
    assert train.main([*distill, *scratch, "--pictures=0"]) == 0
    student = checkpoint.load_model(tmp_path / "run")
    assert student.provenance is not None and student.provenance["teacher"]["licence"] == LICENCE


def test_an_int8_package_is_whole_or_no_model(exports: dict[str, Path], tmp_path: Path) -> None:
    for name in compress.PACKAGE[:-1]:
        out = tmp_path / name
        shutil.copytree(exports["int8"], out)
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)
        with pytest.raises(StorageError, match=f"{name} does not match the hash"):
            facefast.load(out)
    early = tmp_path / "early"
    shutil.copytree(exports["int8"], early)
    os.remove(early / "model.json")
    with pytest.raises(ValueError, match="an int8 package without model.json, as early versions wrote it; compress"):
        facefast.load(early)
    assert files.read_json(exports["int8"] / "recipe.json")["data"]["root"] == ""  # no paths of its owner's
