"""Updates that are recorded and replayed are those that run as they are, to the last bit; what cannot be recorded is
named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from facefast.models import checkpoint
from facefast.recipe import ModelConfig, Recipe, TaskConfig, from_json, to_json
from facefast.runtime.process import World
from facefast.training.graphs import COMPILE_FROM, MOST, WARM_UP, compiles, why_not
from facefast.training.step import TrainState, train_step
from tests.training.test_step import PHASE, assert_same, make_batch, make_state, part, share, weights

MOVING = dataclasses.replace(PHASE, batchnorm="auto", schedule="cosine", warmup=0.2, clip_grad=0.5, batch_size=8)
CPU = torch.device("cpu")


class StandIn:
    """Does on a processor what a GPU does with a graph: recording computes nothing, a replay reads what the held
    tensors hold then."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.as_they_are = 0

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        self.as_they_are += 1
        return function()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            return function()

        return replay


def padded(seed: int) -> Any:
    """The last batch of an epoch: as large as the others, three of its rows count for nothing."""
    batch = make_batch(8, seed)
    rows = batch.rows.masked_fill(batch.rows >= 5, -1)
    return batch._replace(rows=rows, labels=batch.labels.masked_fill(rows < 0, -100))


def run(state: TrainState, updates: range, accumulate: int = 1) -> list[Tensor]:
    stats = []
    for number in updates:
        last = number % 3 == 2
        batch = padded(number) if last else make_batch(8, number)
        size = 8 // accumulate
        batches = [part(batch, slice(first, first + size)) for first in range(0, 8, size)]
        stats.append(train_step(state, batches, share(5 if last else 8)))
    return stats


@pytest.mark.parametrize(
    ("optimizer", "accumulate", "fields"),
    [
        ("sgd", 1, {}),
        ("adam", 1, {}),
        ("lamb", 1, {}),
        ("adamw", 2, {}),
        ("sgd", 1, {"ema": 0.9}),
        ("adamw", 1, {"precision": "bf16"}),
    ],
)
def test_replayed_updates_are_those_that_run_as_they_are(
    optimizer: Any, accumulate: int, fields: dict[str, Any]
) -> None:
    phase = dataclasses.replace(MOVING, optimizer=optimizer, accumulate=accumulate, lr=0.01, steps=14)
    plain, recorded, stand_in = make_state(phase, **fields), make_state(phase, **fields), StandIn()
    assert plain.recorded is None  # a processor launches nothing
    recorded.record(stand_in)
    for one, other in zip(run(plain, range(14), accumulate), run(recorded, range(14), accumulate), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert stand_in.recorded == MOST == 2 and stand_in.as_they_are == 2 * WARM_UP
    assert stand_in.replayed == 14 - 2 * WARM_UP
    assert_same(weights(plain), weights(recorded))
    theirs = recorded.tensors()
    for file, named in plain.tensors().items():
        assert_same(cast(dict[str, Tensor], named), cast(dict[str, Tensor], theirs[file]))


def test_pruned_weights_stay_pruned_between_replays() -> None:
    phase = dataclasses.replace(MOVING, prune=0.5, steps=12)
    plain, recorded = make_state(phase), make_state(phase)
    recorded.record(StandIn())
    run(plain, range(12)), run(recorded, range(12))
    assert_same(weights(plain), weights(recorded))


def test_an_update_that_is_not_finite_changes_nothing_when_it_is_replayed() -> None:
    state, stand_in = make_state(dataclasses.replace(MOVING, optimizer="adam", steps=20)), StandIn()
    state.record(stand_in)
    for number in range(WARM_UP + 1):
        train_step(state, [make_batch(8, number)], share(8))
    before, bad = weights(state), make_batch(8, 99)
    bad.images[3, 0, 0, 0] = torch.inf
    stats = train_step(state, [bad], share(8))
    assert stand_in.replayed == 2 and stats[3] == 1
    after = {name: value for name, value in weights(state).items() if "num_batches_tracked" not in name}
    assert_same(after, before)
    assert train_step(state, [make_batch(8, 100)], share(8))[3] == 0


def test_a_recording_survives_an_evaluation() -> None:
    plain, recorded = make_state(MOVING), make_state(MOVING)
    recorded.record(StandIn())
    for state in (plain, recorded):
        run(state, range(12))
        state.evaluated.eval()
        state.set_modes()  # as after every evaluation
        run(state, range(12, 15))
    assert_same(weights(plain), weights(recorded))


def test_a_resumed_run_goes_on_as_one_that_was_recorded_throughout(tmp_path: Path) -> None:
    phase = dataclasses.replace(MOVING, optimizer="adamw", lr=0.01, steps=16)
    straight, first, second = make_state(phase), make_state(phase), make_state(phase)
    for state in (straight, first, second):
        state.record(StandIn())
    run(straight, range(16))
    run(first, range(9))
    path = checkpoint.save(tmp_path, 9, tensors=first.tensors(), documents=first.documents(), best=True, keep=1)
    second.load(path)
    run(second, range(9, 16))
    assert_same(weights(straight), weights(second))


def test_a_recording_that_fails_leaves_updates_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(StandIn):
        def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
            weight = next(state.model.parameters())
            weight.grad = torch.ones_like(weight)  # what it got to
            raise RuntimeError("operation not permitted when stream is capturing")

    plain, state, failing = make_state(MOVING), make_state(MOVING), Failing()
    state.record(failing)
    run(plain, range(12)), run(state, range(12))
    assert_same(weights(plain), weights(state))
    assert failing.as_they_are == 12
    assert capsys.readouterr().out.count("not recorded as a CUDA graph: operation not permitted") == 1


@pytest.mark.parametrize(
    ("word", "phase", "fields"),
    [
        (None, {}, {}),
        ("compile is never", {}, {"compile": "never"}),
        ("mixup and cutmix", {"mixup": 0.2}, {}),
        ("Dropout draws", {}, {"model": ModelConfig(backbone="mobilefacenet", embedding=16, dropout=0.2)}),
        ("known attributes", {}, {"tasks": TaskConfig(attributes=("Male",))}),
    ],
)
def test_what_keeps_updates_from_being_recorded_is_named(
    word: str | None, phase: dict[str, Any], fields: dict[str, Any]
) -> None:
    recipe = Recipe(
        **({"model": ModelConfig(backbone="mobilefacenet", embedding=16)} | fields),
        phases=(dataclasses.replace(PHASE, **phase),),
    )
    state = make_state()
    if "model" in fields:
        state.objective.model.dropout.p = 0.2
    given = (recipe, recipe.phases[0], state.phase_plan)
    said = why_not(*given, World(), state.objective, state.optimizer)
    assert (said is None) if word is None else (said is not None and word in said)
    two = why_not(*given, World(0, 2, 0, 2), state.objective, state.optimizer)
    assert two is not None and (word == "compile is never" or two == "several processes share an update")


def test_a_network_is_compiled_on_a_gpu_where_a_phase_is_long_or_always() -> None:
    plan = make_state().phase_plan
    short, long = plan, dataclasses.replace(plan, steps=COMPILE_FROM)
    gpu, phase = torch.device("cuda"), PHASE
    asked = {
        "auto": [
            compiles(Recipe(phases=(phase,)), phase, which, device) for device in (gpu, CPU) for which in (short, long)
        ],
        "never": [compiles(Recipe(phases=(phase,), compile="never"), phase, long, gpu)],
        "always": [compiles(Recipe(phases=(phase,), compile="always"), phase, short, CPU)],
    }
    assert asked == {"auto": [False, True, False, False], "never": [False], "always": [True]}


def test_a_recipe_of_when_compiling_was_true_or_false_is_read() -> None:
    document = to_json(Recipe(phases=(PHASE,)))
    assert document["compile"] == "auto"
    assert from_json(Recipe, document | {"compile": True}).compile == "always"
    assert from_json(Recipe, document | {"compile": False}).compile == "never"
