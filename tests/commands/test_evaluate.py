"""Evaluations: embeddings row by row, numbers over what could be read, and which questions a command line asks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from facefast import evaluate
from facefast.data import FaceIndex, PairSet, oracle, read_index
from facefast.data.prepare import EvaluationSet
from facefast.evaluation import measure
from facefast.evaluation.embed import embed_rows
from facefast.evaluation.measure import verification
from facefast.evaluation.sets import find_evaluation_set
from facefast.models.precision import Precision
from facefast.recipe import DataConfig, EvalConfig, Reading
from facefast.runtime import process
from tests.support import small
from tests.support.pictures import encode, garbled_png, smooth_picture

RUN = process.Runtime(process.World(), torch.device("cpu"))
FP32 = Precision.choose("fp32", "mobilefacenet", True, RUN.device)
EVERYTHING = Reading(max_bad_fraction=1.0)
PEOPLE = ("ann", "bo", "cy")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three people with three pictures each, named as in LFW; bo's second one cannot be decoded."""
    root = tmp_path_factory.mktemp("data") / "people"
    for who, name in enumerate(PEOPLE):
        (root / name).mkdir(parents=True)
        for number in (1, 2, 3):
            picture = encode(smooth_picture(small.SIZE, small.SIZE, 10 * who + number), "PNG")
            (root / name / f"{name}_{number:04}.png").write_bytes(picture)
    (root / "bo" / "bo_0002.png").write_bytes(garbled_png())
    return root


@pytest.fixture(scope="module")
def index(root: Path) -> FaceIndex:
    index = read_index(root, "folder").scanned()
    assert not index.faults.any()  # all headers are sound
    return index


BROKEN = 4


@pytest.mark.parametrize("mirror", [False, True])
def test_embeddings_are_the_models_in_the_indexs_order(index: FaceIndex, mirror: bool) -> None:
    model = small.make_model(classes=PEOPLE)
    embeddings, seen = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=4, mirror=mirror)
    assert seen.tolist() == [row != BROKEN for row in range(9)]
    rows = np.flatnonzero(seen.numpy())
    pictures = np.stack([oracle.decode(index.path(int(row))) for row in rows])
    expected = model.embed(torch.from_numpy(pictures).permute(0, 3, 1, 2), mirror=mirror)
    torch.testing.assert_close(torch.nn.functional.normalize(embeddings[rows]), expected, rtol=0, atol=2e-3)


def test_pairs_with_a_picture_that_cannot_be_read_are_left_out_and_counted() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0], [1.0, 1.0]])
    same = np.array([True, True, True, False, False, False])
    pairs = PairSet(np.array([0, 2, 4, 0, 1, 4]), np.array([1, 3, 0, 2, 3, 1]), same, np.arange(6, dtype=np.int16) % 2)
    seen = torch.tensor([True, True, True, True, False])
    found = verification(embeddings, seen, pairs)
    assert found["pairs"] == 4
    assert (found["verification_accuracy"], found["auc"]) == (1.0, 1.0)
    assert np.isnan(found["tar@1e-2"])  # two pairs of two people cannot show one in a hundred
    with pytest.raises(ValueError, match="verification needs both"):
        verification(embeddings, torch.tensor([True, True, False, False, False]), pairs)


def test_an_evaluation_counts_what_could_be_read_and_puts_the_model_back_as_it_was(index: FaceIndex) -> None:
    model = small.make_model(classes=PEOPLE).train()
    evaluation = EvaluationSet(test=index, verification=index, pairs=PairSet.random(index, 18, 2), held_out=False)
    found = measure.evaluate(model, evaluation, EvalConfig(batch_size=4), RUN, FP32, EVERYTHING)
    assert model.training
    assert found["test_rows"] == 8
    assert evaluation.pairs is not None and found["known_pairs"] < len(evaluation.pairs.same)
    assert "verification_accuracy" not in found  # these people are known
    model.eval()
    embeddings, seen = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=9)
    logits = model.classify(embeddings[seen]).detach() * model.scale
    labels = torch.tensor(index.labels, dtype=torch.long)[seen]
    assert found["top1"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert found["top5"] == 1.0  # of three


def test_a_list_of_pairs_is_asked_as_it_is(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small.save_run(tmp_path / "run", small.make_model(), root)  # of other people
    pairs = tmp_path / "pairs.txt"
    rows = ["2\t2", "ann\t1\t2", "ann\t1\t3", "ann\t1\tcy\t1", "ann\t2\tcy\t2"]
    rows += ["cy\t1\t2", "cy\t1\t3", "ann\t1\tcy\t3", "ann\t3\tcy\t1"]
    pairs.write_text("\n".join(rows) + "\n")
    flags = [f"--data.root={root}", f"--pairs={pairs}", "--data.max-bad-fraction=1", "--eval.batch-size=4"]
    assert evaluate.main([str(run), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["pairs"] == 8
    assert "top1" not in found
    assert evaluate.main([str(run), *flags]) == 0
    assert "verification_accuracy  " in capsys.readouterr().out


def test_strangers_are_asked_about_in_random_pairs_of_everybody(root: Path, tmp_path: Path) -> None:
    model = small.make_model()
    run = small.save_run(tmp_path / "run", model, root)
    evaluation = find_evaluation_set(
        run, model, DataConfig(root=str(root)), EvalConfig(pairs=8, folds=2), seed=0, threads=1
    )
    assert evaluation.test is None and evaluation.held_out
    assert evaluation.verification is not None and evaluation.pairs is not None
    assert (len(evaluation.verification), len(evaluation.pairs.same)) == (9, 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "evaluate needs photographs: --data.root DIR, or --bin SET"),
        (("--pairs=pairs.txt", "--bin=set.bin"), "give --pairs or --bin, not both"),
        (("--data.root=/nowhere/at/all",), "/nowhere/at/all"),
    ],
)
def test_a_question_without_an_answer_ends_with_64(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small.save_run(tmp_path / "run", small.make_model(), tmp_path)
    assert evaluate.main([str(run), *flags]) == 64
    assert message in capsys.readouterr().err
