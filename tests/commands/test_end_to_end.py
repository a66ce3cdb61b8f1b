"""Whole runs on a few drawn faces: what a run folder holds, two ranks, exact resume, exit codes, the other commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from facefast import evaluate, export, predict, train
from facefast.data.drawn import synthetic
from facefast.models import checkpoint
from facefast.runtime import files, manifest

TINY = (
    "drawn",
    "--image.size=32",
    "--eval.pairs=40",
    "--eval.folds=2",
    "--phases.scratch.steps=3",
    "--phases.pretrain.steps=4",
    "--phases.finetune.steps=5",
    "--phases.scratch.batch-size=8",
    "--phases.pretrain.batch-size=8",
    "--phases.finetune.batch-size=8",
    "--log-every=1",
    "--save-every=2",
    "--keep=20",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(4, 3, 3), pictures=5, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


def run_tiny(drawn: Path, out: Path, *more: str) -> int:
    return train.main([*TINY, f"--data.root={drawn}", f"--out={out}", *more])


@pytest.fixture(scope="module")
def finished(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert run_tiny(drawn, out) == 0
    return out


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "checkpoints" / f"step-{step:07d}" / "model.safetensors")


def test_a_run_folder_holds_everything_that_is_promised_of_it(finished: Path) -> None:
    for name in ("recipe.json", "plan.json", "environment.json", "status.json", "metrics.jsonl", "report.html"):
        assert (finished / name).stat().st_size > 0
    assert list((finished / "tensorboard").iterdir())
    for name in ("last", "best", "step-0000012"):
        manifest.verify(finished / "checkpoints" / name)
    status = files.read_json(finished / "status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 12)
    assert status["best"]["phase"] == "finetune"


def test_every_metric_line_has_the_promised_fields_and_the_phases_come_in_order(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in training] == list(range(1, 13))
    assert [line["phase"] for line in training] == ["scratch"] * 3 + ["pretrain"] * 4 + ["finetune"] * 5
    for line in training:
        assert {"epoch", "loss", "lr", "accuracy", "images_per_second", "data_wait_fraction"} <= line.keys()
    for split in ("validation", "test"):
        evaluations = [line for line in lines if line["split"] == split]
        assert {line["phase"] for line in evaluations} == {"scratch", "pretrain", "finetune"}
    assert [line["phase"] for line in evaluations] == ["scratch", "pretrain", "finetune"]  # asked once each
    assert {"top1", "top5", "per_class", "verification_accuracy", "tar@1e-2", "auc"} <= evaluations[-1].keys()
    assert evaluations[-1]["test_rows"] == 3  # one of five pictures of three people


def test_the_report_and_the_summary_name_the_phases(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data-chart=") > 8
    assert "finetune" in page and "this part cannot be shown" not in page.lower()
    found = files.read_json(finished / "evaluation.json")
    assert (found["row"], found["step"]) == ("finetune", 12)
    assert found["closed_set"]["pictures"] == 3 and found["photographs"]["left_out"] == {}


def test_the_same_seed_gives_the_same_bits_twice(finished: Path, drawn: Path, tmp_path: Path) -> None:
    assert run_tiny(drawn, tmp_path / "again") == 0
    one, two = weights(finished, 12), weights(tmp_path / "again", 12)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("step", [2, 3, 6, 10])
def test_a_run_cut_off_at_any_step_ends_with_the_same_bits(
    finished: Path, drawn: Path, tmp_path: Path, step: int
) -> None:
    out = tmp_path / "resumed"
    (out / "checkpoints").mkdir(parents=True)
    name = f"step-{step:07d}"
    os.symlink(finished / "checkpoints" / name, out / "checkpoints" / name)
    assert run_tiny(drawn, out) == 0
    one, two = weights(finished, 12), weights(out, 12)
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert min(line["step"] for line in lines if line["split"] == "train") > step
    reported = [
        [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["split"] == "test"]
        for run in (finished, out)
    ]
    assert reported[1] == [line for line in reported[0] if line["step"] >= step]


def test_another_recipe_in_the_same_folder_is_refused_with_both_values(
    finished: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tiny(drawn, finished, "--phases.finetune.lr=0.5") == 64
    assert "phases.2.lr: 0.02 there, 0.5 now" in capsys.readouterr().err
    files.write_json(
        finished / "status.json", {"state": "done", "exit_code": 0, "step": 12, "best": {"phase": "finetune"}}
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nonsense",), 64, "there is no recipe 'nonsense'"),
        (("scratch", "--data.root=/nowhere/at/all"), 64, "/nowhere/at/all"),
        (("drawn", "--model.backbone=resnet9000"), 64, "resnet9000"),
        (("drawn", "--phases.finetune.momentum=fast"), 64, ""),
    ],
)
def test_wrong_use_ends_with_64_and_says_why(
    drawn: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = () if any("data.root" in word for word in arguments) else (f"--data.root={drawn}",)
    assert train.main([*arguments, *root, f"--out={tmp_path}"]) == code
    assert message in capsys.readouterr().err


def test_too_many_broken_files_end_with_65_and_their_names(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "broken"
    for person in ("ann", "bo"):
        (root / person).mkdir(parents=True)
        for number, picture in enumerate(sorted((drawn / "img_align_celeba").iterdir())[:5]):
            (root / person / f"{person}{number}.jpg").write_bytes(picture.read_bytes() + person.encode())
    (root / "bo" / "bo0.jpg").write_bytes(b"<html>not a picture</html>")
    assert train.main(["scratch", f"--data.root={root}", f"--out={tmp_path / 'run'}"]) == 65
    assert "bo0.jpg" in capsys.readouterr().err
    assert files.read_json(tmp_path / "run" / "status.json")["exit_code"] == 65
    asked = files.read_json(tmp_path / "run" / "recipe.json")["data"]["root"]  # the folder explains itself
    assert asked == str(root) and (tmp_path / "run" / "environment.json").exists()


def test_one_photograph_a_person_is_refused_before_anything_is_trained(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, picture in enumerate(sorted((drawn / "img_align_celeba").iterdir())[:4]):
        (tmp_path / "people" / f"p{number}").mkdir(parents=True)
        (tmp_path / "people" / f"p{number}" / "1.jpg").write_bytes(picture.read_bytes())
    run = tmp_path / "run"
    assert train.main(["scratch", f"--data.root={tmp_path / 'people'}", f"--out={run}"]) == 64
    error = capsys.readouterr().err
    assert "no photograph is left to measure the model on: 4 pictures of 4 identities, at most 1 of one" in error
    assert "give people more photographs" in error
    assert not (run / "metrics.jsonl").exists()


def test_the_finished_model_evaluates_predicts_and_exports(
    finished: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(finished), f"--data.root={drawn}", "--json"]) == 0
    results = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert results["test_rows"] == 3
    pictures = sorted((drawn / "img_align_celeba").iterdir())[20:24]
    vectors = tmp_path / "vectors.npz"
    assert predict.main([str(finished), *map(str, pictures), "--json", f"--embeddings={vectors}"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.strip().splitlines()]
    assert [answer["path"] for answer in answers] == list(map(str, pictures))
    assert all(answer["names"][0] in checkpoint.load_model(finished).class_names for answer in answers)
    with np.load(vectors) as stored:
        np.testing.assert_allclose(np.linalg.norm(stored["embeddings"], axis=1), 1, rtol=1e-5)
    assert export.main([str(finished), str(tmp_path / "package"), "--to", "safetensors"]) == 0
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    one, two = (checkpoint.load_model(path).embed(images) for path in (finished, tmp_path / "package"))
    assert torch.equal(one, two)


def test_two_gloo_ranks_train_the_same_batches_and_agree_on_every_number(
    finished: Path, drawn: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ranks"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "facefast.train", *TINY, f"--data.root={drawn}", f"--out={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files.read_json(out / "plan.json")["world_size"] == 2
    lines = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in (finished, out)]
    first = [next(line for line in run if line["split"] == "train") for run in lines]
    assert first[0]["rows"] == first[1]["rows"] == 8
    # BatchNorm sees half of the batch on each rank, so only the loss of the first step is comparable, and loosely.
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=0.2)


def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_leaves_no_lock(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        files.write_json(tmp_path / "status.json", {"state": "running"})
        assert train.main([*TINY, f"--data.root={drawn}", f"--out={tmp_path}"]) == 64
        assert f"another run is writing to {tmp_path}" in capsys.readouterr().err
        assert files.read_json(tmp_path / "status.json") == {"state": "running"}  # it is the other one's
        holder.kill()
    with files.locked(tmp_path):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from facefast.runtime import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
