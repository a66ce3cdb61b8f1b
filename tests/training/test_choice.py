"""Which checkpoint is the best so far, which row of the table is handed on, and what status.json says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from facefast.data import FaceIndex
from facefast.data.divide import EvaluationSet, PhaseData
from facefast.evaluation.baselines import ADAPTED, ADAPTED_PROBE, CLASS_MEANS, PROBE
from facefast.models import checkpoint
from facefast.recipe import AdaptConfig, DataConfig, EvalConfig, Phase, Recipe, TaskConfig
from facefast.runtime.log import Position, RunLog
from facefast.training import choice
from facefast.training.step import TrainState
from tests.support import small
from tests.support.beginning import NOBODY, SCRATCH, TWO, Said, at_end, make_state

NAN = float("nan")
ONE = (Phase(name="only", start="scratch"),)


def of(phases: Sequence[Phase] = ONE, **fields: Any) -> Recipe:
    return Recipe(data=DataConfig(root="people"), phases=tuple(phases), **fields)


# The number that chooses.


@pytest.mark.parametrize(
    ("metric", "results", "expected"),
    [
        ("auto", {"auc": 0.9, "top1": 0.5, "verification_accuracy": 0.8}, (0.5, "top1")),
        ("auto", {"verification_accuracy": 0.8, "known_verification_accuracy": 0.9}, (0.8, "verification_accuracy")),
        ("auto", {"known_verification_accuracy": 0.9}, (0.9, "known_verification_accuracy")),
        ("auto", {"top1": NAN, "verification_accuracy": 0.9}, (0.9, "verification_accuracy")),
        ("auto", {"top1": 0.5, "verification_accuracy": NAN}, (0.5, "top1")),
        ("auc", {"top1": 0.5, "auc": 0.9}, (0.9, "auc")),
        ("tar@1e-2", {"top1": 0.5, "known_tar@1e-2": 0.7}, (0.7, "known_tar@1e-2")),
        ("tasks", {"tasks": 0.0}, (0.0, "tasks")),  # 0 is a number
    ],
)
def test_the_best_checkpoint_is_chosen_by_the_number_asked_for(
    metric: Any, results: dict[str, float], expected: tuple[float, str]
) -> None:
    assert choice.named_metric(EvalConfig(metric=metric), results) == expected


@pytest.mark.parametrize(
    ("metric", "results", "message"),
    [
        ("auc", {"top1": 0.5, "top5": 0.5}, "eval.metric is auc, but the evaluation gives only top1, top5"),
        ("auto", {}, "the evaluation gives only nothing"),
        ("auto", {"verification_accuracy": NAN}, "the evaluation gives only nothing"),
        ("auto", {"known_tasks": NAN}, "the evaluation gives only nothing"),
        # Nothing is ever greater than NaN: the first checkpoint would have stayed the best one without a word.
        ("tar@1e-3", {"top1": 0.5, "tar@1e-3": NAN}, "eval.metric is tar@1e-3, for which .* has too few pairs"),
        ("top1", {"top1": NAN, "verification_accuracy": 0.9}, "has too few pairs"),
    ],
)
def test_a_number_that_the_evaluation_cannot_give_is_refused(
    metric: Any, results: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choice.named_metric(EvalConfig(metric=metric), results)


# The best so far.


class Heard:
    """A log that notes what was measured."""

    def __init__(self) -> None:
        self.improved: list[bool] = []

    def evaluation(
        self, at: Position, results: dict[str, float], metric: str, best: float | None, improved: bool
    ) -> None:
        self.improved.append(improved)


@pytest.fixture
def measured(index: FaceIndex, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measures a state at updates of its phase, as if the evaluation had given these values."""
    chooses = EvaluationSet(test=index, verification=None, pairs=None, held_out=False)
    data = PhaseData(index, chooses, NOBODY)

    def measure(state: TrainState, *found: tuple[int, float]) -> list[bool]:
        log = Heard()
        for state.phase_step, value in found:
            monkeypatch.setattr(choice, "_evaluate", lambda *_, value=value, **__: {"top1": value})
            assert choice.measure(state, data, cast(RunLog, log)) == log.improved[-1]
        return log.improved

    return measure


@pytest.fixture
def state(index: FaceIndex) -> TrainState:
    state = make_state(dataclasses.replace(SCRATCH, steps=9), data=(PhaseData(index, NOBODY, NOBODY),))
    state.enter(0, small.make_model(classes=small.PEOPLE, template="none"))
    return state


def test_of_equals_the_later_is_the_best_but_what_was_not_trained_has_to_be_beaten(
    state: TrainState, measured: Any
) -> None:
    assert measured(state, (0, 0.5), (2, 0.5)) == [True, False]
    assert state.chosen == (0, 0)
    assert measured(state, (4, 0.625), (6, 0.625), (8, 0.5)) == [True, True, False]
    assert (state.best, state.chosen) == (0.625, (0, 6))
    assert state.validated == {"scratch": {"top1": 0.625}}  # the worse one is in the log alone
    assert state.reported == {}


def test_without_pictures_to_choose_by_the_latest_is_the_best(state: TrainState, index: FaceIndex) -> None:
    data = PhaseData(index, NOBODY, EvaluationSet(test=index, verification=None, pairs=None, held_out=False))
    for state.phase_step in (2, 4):
        assert choice.measure(state, data, cast(RunLog, Heard()))  # the test part is not asked in their place
        assert (state.best, state.chosen, state.validated) == (None, (0, state.phase_step), {})
    assert choice.said(state, data) == "* handed on: the last, since no picture could be spared to choose by"


def test_pictures_that_give_no_number_are_no_pictures_to_choose_by(
    state: TrainState, index: FaceIndex, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = EvaluationSet(test=None, verification=index, pairs=None, held_out=False)
    data, said = PhaseData(index, asked, NOBODY), Said()
    monkeypatch.setattr(choice, "_evaluate", lambda *_, **__: {"known_auc": NAN, "known_pairs": 0})
    for state.phase_step in (2, 4):
        assert choice.measure(state, data, said.log)
    assert state.best is None and state.chosen == (0, 4)
    assert said == 2 * ["note: the validation part gives no number to choose by"]
    assert measured(state, (6, 0.5)) == [True]
    monkeypatch.setattr(choice, "_evaluate", lambda *_, **__: {"known_auc": NAN, "known_pairs": 0})
    assert not choice.measure(state, data, said.log) and state.chosen == (0, 6)
    state.recipe = dataclasses.replace(state.recipe, eval=EvalConfig(metric="auc"))
    with pytest.raises(ValueError, match="eval.metric is auc, for which the evaluation has too few pairs"):
        choice.measure(state, data, said.log)


def test_the_best_checkpoint_is_unknown_before_the_first_evaluation_and_its_value_before_the_test_part_was_asked() -> (
    None
):
    state = at_end(of(), reported={CLASS_MEANS: {"top1": 0.9}})
    assert choice.best_of(state) is None
    state.best, state.chosen, state.validated = 0.75, (0, 4), {"only": {"top1": 0.75}}
    expected = {"phase": "only", "metric": "top1", "value": None, "validation": 0.75}
    assert choice.best_of(state) == expected
    state.reported["only"] = {"top1": 0.5, "validation": 0.75}
    assert choice.best_of(state) == expected | {"value": 0.5}


def test_the_best_checkpoint_may_be_one_of_the_phase_before() -> None:
    phases = (Phase(name="first", start="scratch"), Phase(name="second"))
    seen = {"first": {"top1": 0.75}, "second": {"top1": 0.625}}
    state = at_end(of(phases), best=0.75, chosen=(0, 3), validated=seen, reported={"first": {"top1": 0.5}})
    assert choice.best_of(state) == {"phase": "first", "metric": "top1", "value": 0.5, "validation": 0.75}
    state.chosen, state.best = (1, 4), 0.8
    assert (choice.best_of(state) or {})["phase"] == "second"


def test_a_phase_on_other_people_has_a_best_checkpoint_of_its_own(index: FaceIndex) -> None:
    phases = (Phase(name="first", start="scratch", split="train"), Phase(name="second", split="val"))
    data = PhaseData(index, NOBODY, NOBODY)
    state = make_state(*phases, data=(data, data))
    state.best, state.chosen, state.validated = 0.9, (0, 3), {"first": {"top1": 0.9}}
    state.reported = {"first": {"top1": 0.8}}
    state.enter(1, small.make_model(classes=small.PEOPLE, template="none"))
    assert state.best is None and not state.validated and state.reported == {"first": {"top1": 0.8}}


def test_the_metric_that_was_asked_for_is_named_as_the_test_part_knows_it() -> None:
    state = at_end(of(eval=EvalConfig(metric="auc")), best=0.7, chosen=(0, 4))
    state.validated = {"only": {"top1": 0.8, "known_auc": 0.7}}
    assert choice.best_of(state) == {"phase": "only", "metric": "known_auc", "value": None, "validation": 0.7}
    state.reported = {"only": {"top1": 0.9, "auc": 0.6}}
    assert choice.best_of(state) == {"phase": "only", "metric": "auc", "value": 0.6, "validation": 0.7}


# What is handed on.


def chosen(best: float, means: float, name: str = "top1", **fields: Any) -> TrainState:
    seen = {CLASS_MEANS: {"top1": means}, "only": {name: best}}
    return at_end(of(**fields), best=best, chosen=(0, 4), validated=seen)


def test_fine_tuning_has_to_beat_the_class_means_by_a_picture() -> None:
    assert choice.handed_on(chosen(0.5, 0.53)) == CLASS_MEANS
    assert choice.handed_on(chosen(0.5, 0.5)) == CLASS_MEANS
    assert choice.handed_on(chosen(29 / 32, 0.1 + 0.80625)) == CLASS_MEANS  # but for a rounding
    assert choice.handed_on(chosen(0.53, 0.5)) == "only"


def untrained(at: int, best: float, **rows: float) -> str:
    """What is handed on where the best checkpoint, of update `at`, names a part `best`, and other rows these."""
    names = {
        "means": CLASS_MEANS,
        "probe": PROBE,
        "adapted": ADAPTED,
        "adapted_probe": ADAPTED_PROBE,
    }
    seen = {names[row]: {"top1": top} for row, top in rows.items()} | {"only": {"top1": best}}
    state = at_end(of(), best=best, chosen=(0, at), validated=seen)
    if "adapted" in rows:
        model = dataclasses.replace(state.recipe.model, source="WEIGHTS")
        phase = dataclasses.replace(state.recipe.phases[0], start="source", adapt=AdaptConfig("auto"))
        state.recipe = dataclasses.replace(state.recipe, model=model, phases=(phase,))
    return choice.handed_on(state)


def test_a_probe_is_handed_on_where_it_names_more_than_class_means_and_as_much_as_fine_tuning() -> None:
    assert untrained(4, 0.6, means=0.5, probe=0.6) == PROBE
    assert untrained(4, 0.5, means=0.5, probe=0.5) == CLASS_MEANS
    assert untrained(4, 0.61, means=0.5, probe=0.6) == "only"
    assert untrained(4, 0.6, means=0.7, probe=0.6, adapted=0.5, adapted_probe=0.65) == CLASS_MEANS


def test_of_equals_what_was_adapted_is_handed_on_and_the_source_has_to_name_one_more() -> None:
    assert untrained(0, 0.5, means=0.5, probe=0.5, adapted=0.5, adapted_probe=0.5) == ADAPTED
    assert untrained(0, 0.5, means=0.5, probe=0.6, adapted=0.5, adapted_probe=0.6) == ADAPTED_PROBE
    assert untrained(0, 0.5, means=0.6, probe=0.5, adapted=0.5, adapted_probe=0.5) == CLASS_MEANS
    assert untrained(0, 0.5, means=0.5, adapted_probe=0.5) == "only"  # a recipe that only adapts
    assert untrained(0, 0.5, means=0.5) == CLASS_MEANS  # nothing was adapted: they are the same


def test_status_says_what_chose_the_row_that_is_handed_on() -> None:
    seen = {CLASS_MEANS: {"top1": 0.5}, PROBE: {"top1": 0.75}, "only": {"top1": 0.5}}
    state = at_end(of(), best=0.5, chosen=(0, 4), validated=seen, reported={PROBE: {"top1": 0.7}})
    assert choice.best_of(state) == {"phase": PROBE, "metric": "top1", "value": 0.7, "validation": 0.75}


def test_class_means_are_handed_on_only_where_names_choose_and_nothing_else_was_learnt() -> None:
    assert choice.handed_on(chosen(0.5, 0.9, "auc", eval=EvalConfig(metric="auc"))) == "only"
    attributes = TaskConfig(attributes=("Male",))  # whose heads they would lack
    assert choice.handed_on(chosen(0.5, 0.9, tasks=attributes)) == "only"
    assert choice.handed_on(at_end(of(), best=0.5, chosen=(0, 4), validated={"only": {"top1": 0.5}})) == "only"


def test_the_table_says_what_chose_and_on_how_many_pictures_of_which_part(index: FaceIndex) -> None:
    state = chosen(0.53, 0.5)
    asked = EvaluationSet(test=index, verification=None, pairs=None, held_out=False)
    expected = "* handed on as checkpoints/best: top1 of 9 validation pictures chose it; all other numbers are of the"
    assert choice.said(state, dataclasses.replace(TWO, validation=asked)).startswith(expected)
    state.validated["only"] = {"known_verification_accuracy": 0.53}
    pairs = EvaluationSet(test=None, verification=index, pairs=None, held_out=False)
    assert "known_verification_accuracy of 9 training pictures chose it" in choice.said(
        state, PhaseData(index, pairs, NOBODY)
    )
    assert "of 9 validation pictures chose it" in choice.said(state, dataclasses.replace(TWO, validation=pairs))


# A run that goes on.


@pytest.fixture
def folder(state: TrainState, tmp_path: Path) -> Path:
    """Checkpoints of updates 2, which is the best, and 4."""
    for step, best in ((2, True), (4, False)):
        state.step = state.phase_step = step
        checkpoint.save(
            tmp_path, step, tensors=state.tensors(), documents=state.documents(), best=best, keep=9
        )  # fmt: skip
    state.best, state.chosen, state.validated = 0.5, (0, 2), {"scratch": {"top1": 0.5}, CLASS_MEANS: {"top1": 0.25}}
    return tmp_path


def test_what_was_chosen_is_found_by_its_step_and_a_link_that_a_kill_left_behind_is_put_right(
    state: TrainState, folder: Path
) -> None:
    best = folder / "checkpoints" / "best"
    for kept in ("step-0000004", "step-0000009", None):
        best.unlink()
        if kept:
            best.symlink_to(kept)
        assert choice.has_best(folder, state)
        assert best.readlink() == Path("step-0000002")
        assert (state.best, state.chosen) == (0.5, (0, 2))


@pytest.mark.parametrize("name", choice.FOLDERS.values())
def test_what_took_no_update_and_was_handed_on_stays_the_best(state: TrainState, folder: Path, name: str) -> None:
    checkpoint.hand_on(folder, name, {"model": {}}, {"model": {}})
    assert choice.has_best(folder, state)
    assert (folder / "checkpoints" / "best").readlink() == Path(name)


def test_a_choice_that_is_not_in_the_folder_is_forgotten(state: TrainState, folder: Path, tmp_path: Path) -> None:
    state.chosen = (0, 3)
    assert choice.has_best(folder, state)  # what the run goes on from is there, and is the best now
    assert (state.best, state.chosen, state.validated) == (None, (0, 4), {CLASS_MEANS: {"top1": 0.25}})
    assert (folder / "checkpoints" / "best").readlink() == Path("step-0000004")
    state.best, state.chosen = 0.5, (0, 2)
    assert not choice.has_best(tmp_path / "another folder", state)  # it has to be saved there first
    assert state.best is None and state.chosen == (0, 4)


def test_a_run_that_has_chosen_nothing_yet_misses_nothing(state: TrainState, tmp_path: Path) -> None:
    state.phase_step = 3
    assert choice.has_best(tmp_path, state)
    assert state.chosen == (0, 0) and list(tmp_path.iterdir()) == []
