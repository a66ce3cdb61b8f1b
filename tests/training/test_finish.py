"""How runs end: done, stopped by a signal and taken up again, broken; and what status.json says of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from facefast import train
from facefast.data import make_sampler
from facefast.data import prepare as prepare_module
from facefast.models import checkpoint
from facefast.recipe import DataConfig, Phase, Recipe
from facefast.runtime import files, log
from facefast.runtime.lines import read_lines
from facefast.training import finish
from tests.support import small
from tests.support.beginning import TWO, at_end
from tests.support.pictures import encode, smooth_picture
from tests.support.ranks import run_ranks

TINY = (
    "scratch",
    "--data.format=celeba",
    "--data.test-fraction=0.5",
    "--image.size=32",
    "--model.embedding=16",
    "--model.dropout=0.2",
    "--eval.pairs=12",
    "--eval.folds=2",
    "--eval.batch-size=8",
    "--eval.every=100",
    "--phases.scratch.steps=6",
    "--phases.scratch.batch-size=4",
    "--precision=fp32",
    "--ema=0.5",
    "--log-every=1",
    "--save-every=100",
)
EVERYTHING = (  # that a resume has to bring back
    "sampler=pk",
    "pictures-per-identity=2",
    "optimizer=lamb",
    "lr=0.01",
    "layer-decay=0.9",
    "schedule=onecycle",
    "clip-grad=0.5",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("data") / "drawn")


def train_rank(rank: int, arguments: list[str], stop: list[int] | None = None) -> int:
    """One process of a run; `stop` is the rank that a SIGTERM reaches, and the step during which it does."""
    original = log.RunLog.step

    def step(self: log.RunLog, at: log.Position, *rest: Any, **named: Any) -> None:
        original(self, at, *rest, **named)
        if [rank, at.step] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    log.RunLog.step = step  # type: ignore[method-assign]
    return train.main(arguments)


def test_a_run_that_a_signal_to_one_rank_stopped_goes_on_to_the_same_bits(drawn: Path, tmp_path: Path) -> None:
    flags = [*TINY, f"--data.root={drawn}", *(f"--phases.scratch.{setting}" for setting in EVERYTHING)]
    whole, out = tmp_path / "undisturbed", tmp_path / "stopped"
    assert run_ranks(train_rank, 2, [*flags, f"--out={whole}", "--projector"]) == [0, 0]

    flags.append(f"--out={out}")
    assert run_ranks(train_rank, 2, flags, [1, 3]) == [75, 75]  # rank 1 is not the one that writes
    assert files.read_json(out / "status.json") == {"state": "preempted", "exit_code": 75, "step": 3, "best": None}
    assert checkpoint.newest(out) == out / "checkpoints" / "step-0000003"
    assert not (out / "report.html").exists()

    assert run_ranks(train_rank, 2, flags) == [0, 0]
    for run in (whole, out):
        assert files.read_json(run / "status.json")["state"] == "done"
        assert (run / "report.html").exists()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6, 6]  # the last are the two evaluations
    one, two = (run / "checkpoints" / "step-0000006" for run in (whole, out))
    for stem in ("model", "ema", "optimizer"):
        expected = safetensors.torch.load_file(one / f"{stem}.safetensors")
        found = safetensors.torch.load_file(two / f"{stem}.safetensors")
        assert expected.keys() == found.keys()
        for name in expected:
            assert torch.equal(expected[name], found[name]), (stem, name)
    expected, found = (files.read_json(path / "state.json") for path in (one, two))
    assert expected == found
    assert len(next(whole.rglob("metadata.tsv")).read_text().splitlines()) == 8  # the test pictures, for the projector
    assert not list(out.rglob("metadata.tsv"))
    assert len(list(whole.rglob("sprite.png"))) == 1  # with small pictures of them
    one, two = (files.read_json(run / "evaluation.json") for run in (whole, out))
    assert one == two and (one["row"], one["step"], one["closed_set"]["pictures"]) == ("scratch", 6, 8)


def spoil(path: Path) -> None:
    path.write_bytes(encode(smooth_picture(40, 40, 99), "PNG"))  # a sound picture, of nobody who was asked


@pytest.mark.parametrize("how", [spoil, Path.unlink, lambda path: path.write_bytes(b"no picture")])
def test_a_picture_that_changed_while_a_run_was_stopped_counts_like_one_that_changes_while_it_runs(
    tmp_path: Path, how: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = small.draw(tmp_path / "drawn")
    flags = [*TINY, f"--data.root={root}", "--threads=1"]
    prepared, real = [], prepare_module.prepare

    def prepare(*arguments: Any) -> Any:
        prepared.append(real(*arguments))
        return prepared[-1]

    monkeypatch.setattr(train, "prepare", prepare)
    out = tmp_path / "stopped"
    assert train_stopped([*flags, f"--out={out}"], 1) == 75
    data = prepared[0][0].train
    seed = files.read_json(out / "plan.json")["phases"][0]["seed"]
    sampler = make_sampler("epoch", labels=data.labels, batch_size=4, seed=seed, rows=np.arange(len(data)))
    changed = int(sampler.batch(0, 1)[0])  # of the second update: no read-ahead of the first run has used it
    path, whole = Path(data.path(changed)), tmp_path / "whole"
    content = path.read_bytes()
    how(path)
    assert train.main([*flags, f"--out={out}"]) == 0
    assert (
        f"note: 1 of 16 pictures changed or went since the run began ({data.name(changed)})" in capsys.readouterr().out
    )

    path.write_bytes(content)

    def prepare_and_change(*arguments: Any) -> Any:
        found = real(*arguments)
        how(path)
        return found

    monkeypatch.setattr(train, "prepare", prepare_and_change)
    assert train.main([*flags, f"--out={whole}"]) == 0
    for stem in ("model", "ema", "optimizer"):
        one, two = (
            safetensors.torch.load_file(folder / "checkpoints" / "last" / f"{stem}.safetensors")
            for folder in (out, whole)
        )
        assert all(torch.equal(one[name], two[name]) for name in one), stem
    lost = [
        [line["unreadable_rows"] for line in read_lines(folder / "metrics.jsonl") if line["split"] == "train"]
        for folder in (out, whole)
    ]
    assert lost[0] == lost[1] and sum(lost[0]) == 3  # once an epoch


def train_stopped(arguments: list[str], at: int) -> int:
    """A run that a signal stops after the update `at`."""
    original = log.RunLog.step
    try:
        return train_rank(0, arguments, [0, at])
    finally:
        log.RunLog.step = original  # type: ignore[method-assign]


@pytest.mark.parametrize("what", ["a picture more", "another name", "another landmark", "too many changed"])
def test_other_photographs_are_refused_and_the_runs_own_files_stay(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = small.draw(tmp_path / "drawn"), tmp_path / "run"
    flags = [*TINY, f"--data.root={root}", f"--out={out}", "--threads=1"]
    assert train_stopped(flags, 1) == 75
    before = (out / "checkpoints" / "last" / "manifest.json").read_bytes()
    pictures, names = sorted((root / "img_align_celeba").iterdir()), root / "identity_CelebA.txt"
    points = root / "list_landmarks_align_celeba.txt"
    if what == "a picture more":
        (pictures[0].parent / "000017.jpg").write_bytes(pictures[3].read_bytes())
        for path in (names, root / "list_eval_partition.txt"):
            path.write_text(path.read_text() + "000017.jpg 1\n")
        for path in (points, root / "list_attr_celeba.txt"):
            last = path.read_text().splitlines()[-1].split()
            text = path.read_text().replace("16\n", "17\n", 1)
            path.write_text(text + " ".join(["000017.jpg", *last[1:]]) + "\n")
    elif what == "another name":
        names.write_text(names.read_text().replace("000001.jpg 1", "000001.jpg 2"))
    elif what == "another landmark":
        count, names_of_points, *lines = points.read_text().splitlines()
        lines = [f"{name} {int(first) + 1} {rest}" for name, first, rest in (line.split(None, 2) for line in lines)]
        points.write_text("\n".join([count, names_of_points, *lines]) + "\n")
    else:
        for path in pictures[:10]:
            path.write_bytes(b"no picture")
    assert train.main(flags) == (65 if what == "too many changed" else 64)
    said = capsys.readouterr().err
    assert ("10 of 16 pictures changed or went" if what == "too many changed" else "belongs to another run") in said
    assert (out / "checkpoints" / "last" / "manifest.json").read_bytes() == before


def test_gradients_that_stay_non_finite_end_the_run_with_70(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--phases.scratch.lr=1e30", "--phases.scratch.warmup=0", "--phases.scratch.steps=40"]
    assert train.main([*TINY, f"--data.root={drawn}", f"--out={tmp_path}", *flags]) == 70
    status = files.read_json(tmp_path / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 70)
    assert "non-finite gradients" in status["error"]
    assert "lower the learning rate" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_74(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    assert train.main([*TINY, f"--data.root={drawn}", f"--out={tmp_path}", "--phases.scratch.steps=1"]) == 74
    assert files.read_json(tmp_path / "status.json")["exit_code"] == 74
    assert "cannot write" in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_written_ends_the_run_with_74(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train.main([*TINY, f"--data.root={drawn}", f"--out={tmp_path / 'file' / 'run'}"]) == 74
    assert "choose another --out" in capsys.readouterr().err
    (tmp_path / "run" / "status.json" / "x").mkdir(parents=True)  # like a full disk: not even the failure can be noted
    assert train.main([*TINY, f"--data.root={drawn}", f"--out={tmp_path / 'run'}"]) == 74
    assert "Traceback" not in capsys.readouterr().err


def test_a_failure_is_noted_only_where_there_is_a_run_folder(tmp_path: Path) -> None:
    finish.fail(None, 64, "no folder yet")
    finish.fail(tmp_path / "gone", 64, "never made")
    assert list(tmp_path.iterdir()) == []
    finish.fail(tmp_path, 65, "bad pictures")
    assert files.read_json(tmp_path / "status.json") == {"state": "failed", "exit_code": 65, "error": "bad pictures"}


def test_a_rank_that_lost_its_connection_leaves_the_reason_of_the_one_that_failed(tmp_path: Path) -> None:
    finish.write_status(tmp_path, "running")
    finish.fail(tmp_path, 1, "connection closed by peer")
    assert files.read_json(tmp_path / "status.json")["exit_code"] == 1
    finish.fail(tmp_path, 65, "bad pictures")
    finish.fail(tmp_path, 1, "connection closed by peer")
    assert files.read_json(tmp_path / "status.json") == {"state": "failed", "exit_code": 65, "error": "bad pictures"}


BOUND = {"images_per_second": 166.4, "bound_by": "compute", "data_wait_fraction": 0.014, "advice": "use bf16"}


def test_the_summary_compares_with_training_from_scratch_where_both_were_done() -> None:
    phases = (Phase(name="scratch", start="scratch"), Phase(name="finetune", start="scratch"))
    recipe = Recipe(data=DataConfig(root="people", format="folder"), phases=phases)
    state = at_end(recipe, reported={"scratch": {"top1": 0.7}, "finetune": {"top1": 0.956}})
    text = finish.summary(Path("run"), state, TWO, BOUND)
    assert "transfer against training from scratch on the same budget: +25.6 points top1" in text
    assert "166 images/s, bound by compute (data wait 1.4%); to change that: use bf16" in text
    assert "images/s" not in finish.summary(Path("run"), state, TWO, BOUND | {"images_per_second": 0.0})
    assert "drawn" not in text
    assert text.endswith("the model: run/checkpoints/best    the report: run/report.html")


def test_the_summary_of_drawn_faces_says_so_and_compares_nothing_with_itself() -> None:
    recipe = Recipe(data=DataConfig(root="drawn", format="synthetic"), phases=(Phase(name="scratch", start="scratch"),))
    text = finish.summary(Path("run"), at_end(recipe, reported={"scratch": {"top1": 0.7}}), TWO, BOUND)
    assert "These faces are drawn" in text
    assert "against training from scratch" not in text
