"""Whole runs in which validation pictures choose: the test part is asked once, class means are handed on by name, what
a model may say is in its model.json, and a finished run that is started again changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from facefast import evaluate, predict, train
from facefast.data import FaceIndex
from facefast.data.divide import divide
from facefast.data.drawn import synthetic
from facefast.evaluation import baselines, measure
from facefast.evaluation.baselines import class_means, linear_probe
from facefast.evaluation.embed import embed_rows
from facefast.models import checkpoint
from facefast.models.heads import START_SCALE
from facefast.models.precision import Precision
from facefast.recipe import Reading, Recipe, from_json
from facefast.runtime import files, manifest
from facefast.runtime.lines import read_lines
from facefast.runtime.log import RunLog
from facefast.training import choice
from facefast.training.prune import sparsity_of
from facefast.training.step import TrainState, train_step
from tests.support import small
from tests.support.beginning import RUN
from tests.support.ranks import run_ranks

PEOPLE, PICTURES = 8, 10
TINY = (
    "finetune",
    "--data.format=celeba",
    "--data.validation-fraction=0.5",  # four of eight training pictures of each person
    "--phases.last.steps=3",
    "--phases.all.steps=3",
    "--phases.last.batch-size=8",
    "--phases.all.batch-size=8",
    "--phases.last.lr=1e-9",  # which moves nothing: what took no update is not beaten
    "--phases.all.lr=1e-9",
    "--eval.pairs=20",
    "--eval.folds=2",
    "--precision=fp32",
    "--log-every=1",
    "--pictures=0",
    "--threads=1",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(PEOPLE, 0, 0), pictures=PICTURES, seed=5)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


@pytest.fixture(scope="module")
def words(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    source = small.save_run(tmp_path_factory.mktemp("source") / "run", small.make_model(), drawn)
    return [*TINY, f"--data.root={drawn}", f"--model.source={source}"]


@pytest.fixture(scope="module")
def probed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ends with a probe, which names more of these faces than class means."""
    out = tmp_path_factory.mktemp("runs") / "probed"
    assert train.main([*words, f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def means(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ends with class means, than which no probe is better."""
    out = tmp_path_factory.mktemp("runs") / "means"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(baselines, "linear_probe", class_means)
        assert train.main([*words, f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def tuned(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ends with a phase's model, since nobody asked what class means do."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    assert train.main([*words, f"--out={out}", "--eval.no-baselines"]) == 0
    return out


def lines(run: Path, split: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["split"] == split]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_test_part_is_asked_once_for_each_row_and_never_before_its_phase_is_done(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = measure.evaluate, []

    def listen(model: Any, on: Any, *rest: Any) -> Any:
        assert on.test is not None
        asked.append((len(on.test), state[0].step))
        return real(model, on, *rest)

    state: list[Any] = []
    entered = TrainState.enter

    def enter(self: Any, *rest: Any) -> None:
        state[:] = [self]
        entered(self, *rest)

    monkeypatch.setattr(choice, "evaluate", listen)
    monkeypatch.setattr(TrainState, "enter", enter)
    assert train.main([*words, f"--out={tmp_path}", "--eval.no-baselines", "--save-every=1"]) == 0
    test = PEOPLE * 2
    assert [step for count, step in asked if count == test] == [3, 6]  # after the last update of each phase
    assert {count for count, _ in asked} == {test, PEOPLE * 4} and len(asked) > 2


@pytest.mark.parametrize(("which", "name"), [("means", "class means"), ("probed", "linear probe")])
def test_what_fine_tuning_does_not_beat_is_handed_on_by_name(
    which: str, name: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(which)
    best = run / "checkpoints" / "best"
    assert best.readlink() == Path(name.replace(" ", "-"))
    manifest.verify(best)
    status = files.read_json(run / "status.json")["best"]
    (*_, row) = (line for line in lines(run, "test") if line["phase"] == name)
    means = next(line for line in lines(run, "test") if line["phase"] == "class means")
    first = lines(run, "validation")[0]
    assert first["top1"] == pytest.approx(means["validation"])  # the head starts from them
    assert status["phase"] == name and status["value"] == row["top1"]
    assert status["validation"] == row["validation"] >= first["top1"] - 1e-6
    assert f'{name}</bdi> <span class="tag">handed on' in (run / "report.html").read_text()
    assert not (best / "state.json").exists() and checkpoint.newest(run) == run / "checkpoints" / "step-0000006"


@pytest.mark.parametrize(("which", "fitted"), [("means", class_means), ("probed", linear_probe)])
def test_they_are_of_training_and_validation_pictures_together(
    which: str, fitted: Any, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(which)
    model = checkpoint.load_model(run)
    recipe = from_json(Recipe, files.read_json(run / "recipe.json"))
    data = divide(FaceIndex.load(run / "index.npz"), recipe, recipe.phases[-1])
    precision = Precision.choose("fp32", "mobilefacenet", True, RUN.device)

    def head_of(*parts: FaceIndex | None) -> torch.Tensor:
        found = [embed_rows(model, part, RUN, precision, Reading(1), batch_size=16)[0] for part in parts if part]
        labels = torch.cat([torch.tensor(part.labels, dtype=torch.long) for part in parts if part])
        head: torch.Tensor = fitted(torch.cat(found), labels, PEOPLE)
        return head

    assert model.head is not None
    torch.testing.assert_close(model.head.weight.data, head_of(data.train, data.validation.test), rtol=0, atol=1e-4)
    assert float((model.head.weight.data - head_of(data.train)).abs().max()) > 1e-3


def test_the_commands_read_what_was_handed_on(probed: Path, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(probed), f"--data.root={drawn}", "--data.format=celeba", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    best = files.read_json(probed / "status.json")["best"]
    assert (found["top1"], found["test_rows"]) == (pytest.approx(best["value"]), PEOPLE * 2)
    photo = next((drawn / "img_align_celeba").iterdir())
    assert predict.main([str(probed), str(photo), "--json", "--detect=none", "--threshold=none"]) == 0
    (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert answer["names"][0] in checkpoint.load_model(probed).class_names


@pytest.mark.parametrize("which", ["probed", "tuned"])
def test_the_model_handed_on_says_what_it_may_and_its_scale_holds_the_temperature(
    which: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(which)
    document = files.read_json(run / "checkpoints" / "best" / "model.json")
    before = START_SCALE if which == "probed" else files.read_json(run / "recipe.json")["phases"][-1]["loss"]["scale"]
    assert document["calibration"]["rows"] == PEOPLE * 4
    assert document["scale"] == pytest.approx(before / document["calibration"]["temperature"])
    assert [threshold["fpir"] for threshold in document["thresholds"]["naming"]] == [0.1, 0.05, 0.01, 0.001]
    assert document["thresholds"]["naming"][0]["threshold"] is not None  # 64 pictures show a rate of 10 %
    assert "300 are needed" in document["thresholds"]["naming"][2]["why"]
    assert document["thresholds"]["measured_on"].startswith("32 training pictures and 32 kept out of it")


def test_a_phases_model_gets_its_thresholds_and_keeps_every_other_byte(tuned: Path) -> None:
    checkpoints = tuned / "checkpoints"
    best = (checkpoints / "best").resolve()
    assert best.name.startswith("step-")
    manifest.verify(best)
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= content(best).keys()
    checkpoint.load_model(tuned)
    status = files.read_json(tuned / "status.json")["best"]
    assert status["phase"] in ("last", "all") and status["value"] is not None


@pytest.mark.parametrize("which", ["probed", "tuned"])
def test_a_finished_run_started_again_hands_on_the_same(
    which: str, words: list[str], request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(which)
    best = run / "checkpoints" / "best"
    before, status, link = content(best), files.read_json(run / "status.json")["best"], best.readlink()
    rows = lines(run, "test")
    assert train.main([*words, f"--out={run}", *(["--eval.no-baselines"] if which == "tuned" else [])]) == 0
    assert content(best) == before and best.readlink() == link
    assert files.read_json(run / "status.json")["best"] == status
    assert lines(run, "test") == rows  # each is there once


def test_a_checkpoint_taken_over_into_another_folder_is_handed_on_from_there(
    tuned: Path, words: list[str], tmp_path: Path
) -> None:
    flags = ["--eval.no-baselines", f"--out={tmp_path}", f"--resume={tuned / 'checkpoints' / 'step-0000006'}"]
    assert train.main([*words, *flags]) == 0
    manifest.verify(tmp_path / "checkpoints" / "best")
    assert checkpoint.load_model(tmp_path).thresholds is not None
    best = files.read_json(tmp_path / "status.json")["best"]
    assert best["phase"] == "all" and best["value"] is not None


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        # verifies as well as before any update
        ("fixed", ["--data.validation-fraction=0", "--phases.fixed.lr=0.1"]),
        # names fewer
        ("cosface", ["--data.validation-fraction=0.5", "--eval.no-baselines", "--phases.cosface.lr=2"]),
    ],
)
def test_what_is_told_is_of_the_checkpoint_that_is_handed_on(
    recipe: str, flags: list[str], words: list[str], drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [word for word in words[1:] if not word.startswith(("--phases.", "--data.validation-fraction"))]
    flags = [*flags, f"--phases.{recipe}.steps=4", f"--phases.{recipe}.batch-size=8", f"--out={tmp_path}"]
    assert train.main([recipe, *common, *flags]) == 0
    best = (tmp_path / "checkpoints" / "best").resolve().name
    assert best == ("step-0000004" if recipe == "fixed" else "step-0000000")
    (told,) = (line for line in lines(tmp_path, "test") if line["phase"] == recipe)
    assert files.read_json(tmp_path / "status.json")["best"]["phase"] == recipe
    capsys.readouterr()
    assert evaluate.main([str(tmp_path), f"--data.root={drawn}", "--data.format=celeba", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("top1", "known_auc"):
        assert found[name] == pytest.approx(told[name]), name


def test_what_is_handed_on_is_as_sparse_as_was_asked_whatever_names_more(words: list[str], tmp_path: Path) -> None:
    common = [word for word in words[1:] if not word.startswith("--phases.")]
    flags = [f"--phases.prune.{field}" for field in ("steps=8", "batch-size=16", "lr=1e-9")]
    assert train.main(["prune", *common, *flags, f"--out={tmp_path}"]) == 0
    assert sparsity_of(checkpoint.load_model(tmp_path)) == pytest.approx(0.5, abs=1e-3)
    assert files.read_json(tmp_path / "status.json")["best"]["phase"] == "prune"


UNTRAINED = ["class means", "5 nearest neighbours", "linear probe"]


@pytest.mark.parametrize("step", [0, 3])
def test_a_run_stopped_before_it_measured_the_source_untrained_ends_with_the_same_table(
    probed: Path, words: list[str], tmp_path: Path, step: int
) -> None:
    """Stopped before its first update, and between the last update of the phase that starts from the source and the
    rows of what that does untrained."""
    (tmp_path / "checkpoints").mkdir()
    name = f"step-{step:07d}"
    before = Path(shutil.copytree(probed / "checkpoints" / name, tmp_path / "checkpoints" / name))
    if step:  # it holds the choice, and what was chosen
        shutil.copytree(probed / "checkpoints" / "step-0000000", tmp_path / "checkpoints" / "step-0000000")
    assert files.read_json(before / "state.json")["reported"] == {}
    assert train.main([*words, f"--out={tmp_path}"]) == 0
    assert content(tmp_path / "checkpoints" / "best") == content(probed / "checkpoints" / "best")
    after = [files.read_json(run / "checkpoints" / "step-0000006" / "state.json") for run in (probed, tmp_path)]
    assert after[0] == after[1]
    assert list(after[0]["reported"]) == [*UNTRAINED, "last"] and set(UNTRAINED) <= after[0]["validated"].keys()
    assert lines(tmp_path, "test") == lines(probed, "test")


def test_no_update_waits_for_what_the_source_does_untrained(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    report = RunLog.report

    def update(*rest: Any) -> Any:
        happened.append("update")
        return train_step(*rest)

    def listen(self: RunLog, at: Any, row: str, results: Any) -> None:
        happened.append(row)
        report(self, at, row, results)

    monkeypatch.setattr(RunLog, "report", listen)
    monkeypatch.setattr(train, "train_step", update)
    assert train.main([*words, f"--out={tmp_path}"]) == 0
    updates = ["update"] * 3
    assert happened[:11] == [*updates, "last", *UNTRAINED, *updates, "all"]


def rank(number: int, arguments: list[str]) -> int:
    return train.main(arguments)


def test_two_processes_choose_and_hand_on_what_one_does(probed: Path, words: list[str], tmp_path: Path) -> None:
    assert run_ranks(rank, 2, [*words, f"--out={tmp_path / 'two'}"]) == [0, 0]
    one, two = (files.read_json(run / "status.json")["best"] for run in (probed, tmp_path / "two"))
    assert one == two
    alone, together = (checkpoint.load_model(run) for run in (probed, tmp_path / "two"))
    assert alone.head is not None and together.head is not None
    torch.testing.assert_close(alone.head.weight, together.head.weight, rtol=0, atol=1e-4)
    assert together.scale == pytest.approx(alone.scale, rel=1e-2)
    values = [
        [threshold["threshold"] for threshold in (model.thresholds or {})["naming"]] for model in (alone, together)
    ]
    assert values[1] == pytest.approx(values[0], abs=1e-3)
