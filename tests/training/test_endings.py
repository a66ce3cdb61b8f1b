"""What a run leaves behind when it ends or is stopped: its status for a scheduler, its summary, and who writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from facefast.data import FaceIndex, read_index
from facefast.data.divide import EvaluationSet, PhaseData
from facefast.evaluation import findings, report
from facefast.models import checkpoint
from facefast.recipe import DataConfig, ImageSpec, ModelConfig, Phase, Recipe, resolve, to_json
from facefast.runtime import files
from facefast.runtime.log import STATS, Position, RunLog, Speed
from facefast.runtime.process import Runtime, World
from facefast.training import finish
from facefast.training.step import TrainState
from tests.support import small
from tests.support.beginning import NOBODY, TWO, at_end

RUN = Runtime(World(), torch.device("cpu"))


class Second(Runtime):
    """A process that does not write, without the one that does."""

    is_main = False


SECOND_RANK = Second(World(), torch.device("cpu"))
BOUND = {"images_per_second": 166.4, "bound_by": "compute", "data_wait_fraction": 0.014, "advice": "use bf16"}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FaceIndex:
    return read_index(small.photographs(tmp_path_factory.mktemp("data") / "people"), "folder").scanned()


def make_state(index: FaceIndex, run: Runtime = RUN, **fields: Any) -> TrainState:
    """The end of a run of one phase that was evaluated once."""
    recipe = Recipe(
        data=DataConfig(root="people", max_bad_fraction=1.0),
        image=ImageSpec(size=small.SIZE, template="none"),
        model=ModelConfig(backbone="mobilefacenet", embedding=16),
        phases=(Phase(name="scratch", start="scratch", batch_size=4, steps=4),),
        precision="fp32",
        **fields,
    )
    state = TrainState(recipe, resolve(recipe, (index.facts(),), 1), run)
    state.enter(0, small.make_model(classes=small.PEOPLE, template="none"))
    state.step = state.phase_step = 4
    state.best, state.chosen, state.validated = 0.75, (0, 4), {"scratch": {"top1": 0.75}}
    return state


def open_log(folder: Path, state: TrainState, enabled: bool = True) -> RunLog:
    """The log of a run whose folder has its documents and its checkpoint, after one update of 8 pictures."""
    for name, value in (("recipe", to_json(state.recipe)), ("plan", to_json(state.plan)), ("environment", {})):
        files.write_json(folder / f"{name}.json", value)
    tensors, documents = state.tensors(), state.documents()
    checkpoint.save(folder, state.step, tensors=tensors, documents=documents, best=True, keep=1)
    log = RunLog(folder, enabled=enabled, total_steps=4, first_step=None, every=1)
    log.step(Position(4, "scratch", 1.0, 0.1, True), torch.tensor([8.0, 4, 8, 0, 8, 8, 8, 0]), 8, 0.0)
    log.speeds[:] = [Speed(updates=1, pictures=8, seconds=2.0, waited=0.5)]
    assert len(STATS) == 6
    return log


def data_of(index: FaceIndex) -> PhaseData:
    return PhaseData(index, NOBODY, EvaluationSet(test=index, verification=None, pairs=None, held_out=False))


def test_a_stopped_run_says_so_to_the_scheduler_and_to_whoever_looks_on(
    index: FaceIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = make_state(index)
    log = open_log(tmp_path, state)
    assert finish.leave(tmp_path, state, log) == 75
    assert files.read_json(tmp_path / "status.json") == {
        "state": "preempted",
        "exit_code": 75,
        "step": 4,
        "best": {
            "phase": "scratch",
            "metric": "top1",
            "value": None,
            "validation": 0.75,
        },  # the test part was not asked
    }
    assert "stopped at step 4; the same command goes on from there" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()  # it is not done
    log.say("too late")
    assert "too late" not in capsys.readouterr().out


def test_a_finished_run_tells_the_scheduler_what_bound_it_and_prints_its_summary(
    index: FaceIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = make_state(index)
    state.reported = {"scratch": {"top1": 0.5}}
    assert finish.finish(tmp_path, state, None, (data_of(index),), open_log(tmp_path, state)) == 0
    status = files.read_json(tmp_path / "status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 4)
    assert status["best"] == {"phase": "scratch", "metric": "top1", "value": 0.5, "validation": 0.75}
    assert (status["bound_by"], status["images_per_second"], status["data_wait_fraction"]) == ("decode", 4.0, 0.25)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1><bdi" in page and ">done</span>" in page and "bound by decode" in page
    found = files.read_json(tmp_path / "evaluation.json")
    assert (found["row"], found["step"], found["closed_set"]["pictures"]) == ("scratch", 4, 8)  # one cannot be decoded
    assert "4 images/s, bound by decode (data wait 25.0%)" in capsys.readouterr().out


def test_a_run_that_was_done_before_is_not_examined_again(
    index: FaceIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(index)
    state.reported = {"scratch": {"top1": 0.5}}
    assert finish.finish(tmp_path, state, None, (data_of(index),), open_log(tmp_path, state)) == 0
    before = (tmp_path / "evaluation.json").read_bytes()
    monkeypatch.setattr(findings, "ask", lambda *_: pytest.fail("it was asked again"))
    assert finish.finish(tmp_path, state, None, (data_of(index),), open_log(tmp_path, state)) == 0
    assert (tmp_path / "evaluation.json").read_bytes() == before


def test_a_report_that_cannot_be_drawn_ends_no_run_and_is_said_once(
    index: FaceIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such luck")

    state = make_state(index)
    state.reported = {"scratch": {"top1": 0.5}}
    monkeypatch.setattr(findings, "document", broken)
    monkeypatch.setattr(report, "write", broken)
    assert finish.finish(tmp_path, state, None, (data_of(index),), open_log(tmp_path, state)) == 0
    status = files.read_json(tmp_path / "status.json")
    assert status["state"] == "done" and status["log_failures"] == 2
    said = capsys.readouterr().out
    assert said.count("warning: evaluation.json cannot be written") == 1
    assert said.count("warning: report.html cannot be written") == 1


@pytest.mark.parametrize("stopped", [True, False])
def test_ranks_that_do_not_write_give_the_same_exit_code_and_no_file(
    index: FaceIndex, tmp_path: Path, stopped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    state = make_state(index, SECOND_RANK)
    log = open_log(tmp_path, state, enabled=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    if stopped:
        assert finish.leave(tmp_path, state, log) == 75
    else:
        assert finish.finish(tmp_path, state, None, (data_of(index),), log) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert capsys.readouterr().out == ""


def test_the_projector_shows_test_pictures_that_could_be_read_under_their_own_names(
    index: FaceIndex, tmp_path: Path
) -> None:
    rows = [0, small.BROKEN, 8]
    for wanted in (False, True):
        folder = tmp_path / str(wanted)
        folder.mkdir()
        state = make_state(index, projector=wanted)
        assert finish.finish(folder, state, None, (data_of(index.select(rows)),), open_log(folder, state)) == 0
        found = [path.read_text().splitlines() for path in folder.rglob("metadata.tsv")]
        assert found == ([["ann", "cy"]] if wanted else [])


def test_status_is_replaced_as_a_whole_and_running_has_no_exit_code_yet(tmp_path: Path) -> None:
    finish.write_status(tmp_path, "running", step=3, best={"phase": "a"})
    finish.write_status(tmp_path, "running")
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "running", "exit_code": None}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_failed_run_still_says_how_far_it_came_and_what_was_best(tmp_path: Path) -> None:
    best = {"phase": "scratch", "metric": "top1", "value": None, "validation": 0.5}
    finish.write_status(tmp_path, "running", step=3, best=best)
    finish.fail(tmp_path, 74, "no room")
    expected = {"state": "failed", "exit_code": 74, "step": 3, "best": best, "error": "no room"}
    assert files.read_json(tmp_path / "status.json") == expected
    for damaged in ("[]", "{", "null"):
        (tmp_path / "status.json").write_text(damaged)
        finish.fail(tmp_path, 74, "no room")
        assert files.read_json(tmp_path / "status.json")["exit_code"] == 74


def test_a_finished_run_that_is_started_again_keeps_its_speed(index: FaceIndex, tmp_path: Path) -> None:
    state = make_state(index)
    first = open_log(tmp_path, state)
    finish.finish(tmp_path, state, None, (data_of(index),), first)
    again = RunLog(tmp_path, enabled=True, total_steps=4, first_step=4, every=1)
    finish.finish(tmp_path, state, None, (data_of(index),), again)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    status = files.read_json(tmp_path / "status.json")
    assert status["images_per_second"] == pytest.approx(line["images_per_second"]) and status["images_per_second"] > 0


def test_a_reason_with_bytes_that_are_no_text_is_noted_all_the_same(tmp_path: Path) -> None:
    reason = "cannot read " + b"photo\xff.jpg".decode("utf-8", "surrogateescape")
    finish.fail(tmp_path, 65, reason)
    assert files.read_json(tmp_path / "status.json")["error"] == reason


# The summary, over several phases.


def of_phases(phases: tuple[Phase, ...], reported: dict[str, dict[str, float]]) -> TrainState:
    return at_end(Recipe(data=DataConfig(root="people"), phases=phases), reported=reported)


def test_transfer_is_held_against_scratch_by_its_best_phase_on_the_same_people_and_may_lose() -> None:
    phases = (
        Phase(name="scratch", start="scratch", split="val"),
        Phase(name="pretrain", start="scratch", split="train"),
        Phase(name="last", split="val"),
        Phase(name="all", split="val"),
    )
    results = {
        "scratch": {"top1": 0.75},
        "pretrain": {"top1": 0.99},  # of other people
        "last": {"top1": 0.625},
        "all": {"top1": 0.5},
    }
    text = finish.summary(Path("run"), of_phases(phases, results), TWO, BOUND)
    assert "transfer against training from scratch on the same budget: -12.5 points top1" in text


def test_rows_of_baselines_stand_in_the_summary_and_are_no_phases() -> None:
    phases = (Phase(name="scratch", start="scratch"), Phase(name="tune", start="scratch"))
    results = {"class means": {"top1": 0.99}, "scratch": {"top1": 0.5}, "tune": {"top1": 0.75}}
    text = finish.summary(Path("run"), of_phases(phases, results), TWO, BOUND)
    assert "+25.0 points" in text
    (line,) = (line for line in text.splitlines() if line.startswith("class means"))
    assert line.split() == ["class", "means", "99.00%"]


def test_what_the_evaluation_could_not_tell_is_a_dash_in_the_summary() -> None:
    phases = (Phase(name="only", start="scratch"),)
    results = {"only": {"top1": 0.5, "verification_accuracy": 0.75, "tar@1e-3": float("nan")}}
    text = finish.summary(Path("run"), of_phases(phases, results), TWO, BOUND)
    (line,) = (line for line in text.splitlines() if line.startswith("only"))
    assert line.split() == ["only", "*", "50.00%", "75.00%", "-"]
