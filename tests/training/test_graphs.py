"""Updates that are recorded and replayed are those that run as they are, to the last bit; what cannot be recorded is
named.

The same tests hold a stand-in on a processor and CUDA graphs on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from facefast.data import Batch
from facefast.models import build_model, checkpoint
from facefast.recipe import (
    AttributeSpec,
    ImageSpec,
    IndexFacts,
    ModelConfig,
    Phase,
    Recipe,
    TaskConfig,
    from_json,
    resolve,
    to_json,
)
from facefast.runtime.process import Runtime, World
from facefast.training.graphs import COMPILE_FROM, WARM_UP, GraphRecorder, Recorder, compiles, why_not
from facefast.training.objective import RowCounts
from facefast.training.step import SideInputs, TrainState, train_step
from tests.training.test_step import CLASSES, PHASE, assert_same, make_batch, make_state, part, share, weights

MOVING = dataclasses.replace(PHASE, batchnorm="auto", schedule="cosine", warmup=0.2, clip_grad=0.5, batch_size=8)
CPU = torch.device("cpu")


class StandIn:
    """Does on a processor what a GPU does with a graph: recording computes nothing, a replay reads what the held
    tensors hold then. On a GPU it runs updates as they are."""

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return function


class Watched:
    """A recorder, and how often it was asked for what."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.recorded = self.replayed = self.as_they_are = 0

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        self.as_they_are += 1
        return self._recorder.warm_up(function)

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        launch = self._recorder.record(function)
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            return launch()

        return replay


@dataclasses.dataclass(frozen=True)
class Place:
    """Where updates are recorded, and by what."""

    device: torch.device
    make: Callable[[], Recorder]

    @property
    def run(self) -> Runtime:
        return Runtime(World(), self.device)

    def plain(self, phase: Phase, **fields: Any) -> TrainState:
        """Whose updates run as they are."""
        state = make_state(phase, self.run, **fields)
        if self.device.type == "cpu":
            assert state.recorded is None  # a processor launches nothing
        else:
            state.record(StandIn())  # with rates on the device as well: as numbers they would be rounded elsewhere
        return state

    def recorded(self, phase: Phase, **fields: Any) -> tuple[TrainState, Watched]:
        state = make_state(phase, self.run, **fields)
        return state, self.watch(state)

    def watch(self, state: TrainState) -> Watched:
        watched = Watched(self.make())
        state.record(watched)
        return watched


def graphs_on(device: str) -> Place:
    return Place(torch.device(device), lambda: GraphRecorder(torch.device(device)))


@pytest.fixture(params=["stand-in", pytest.param("graph", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return Place(CPU, StandIn) if request.param == "stand-in" else graphs_on("cuda")


def update_of(number: int, accumulate: int = 1) -> tuple[list[Batch], RowCounts]:
    """An update's micro-batches: some rows have no name. The last update of an epoch, each third here, is padded with
    rows that count for nothing; where others have several micro-batches it has one."""
    last, unnamed = number % 3 == 2, number % 4
    batch, rows = make_batch(8, number), 5 if last else 8
    place = torch.arange(8)
    batch = batch._replace(
        labels=batch.labels.masked_fill((place < unnamed) | (place >= rows), -100),
        rows=batch.rows.masked_fill(place >= rows, -1),
    )
    size = 8 // accumulate
    micro = [part(batch, slice(first, first + size)) for first in range(0, 8, size)]
    if last and accumulate > 1:
        micro, rows = micro[:1], min(rows, size)
    return micro, RowCounts(rows, rows - unnamed)


def run(state: TrainState, updates: range, accumulate: int = 1) -> list[Tensor]:
    stats = []
    for number in updates:
        batches, counts = update_of(number, accumulate)
        stats.append(train_step(state, [moved(batch, state.run.device) for batch in batches], counts))
    return stats


def moved(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(column.to(device) for column in batch))


def step(state: TrainState, batch: Batch) -> Tensor:
    return train_step(state, [moved(batch, state.run.device)], share(8))


def assert_equal(stats: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(stats, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


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
    place: Place, optimizer: Any, accumulate: int, fields: dict[str, Any]
) -> None:
    """Whatever number of rows counts and has a name; one recording for full updates, and one for the last of an epoch
    where that has fewer micro-batches."""
    phase = dataclasses.replace(MOVING, optimizer=optimizer, accumulate=accumulate, lr=0.01, steps=14)
    plain, (recorded, watched) = place.plain(phase, **fields), place.recorded(phase, **fields)
    assert_equal(run(plain, range(14), accumulate), run(recorded, range(14), accumulate))
    kinds = 2 if accumulate > 1 else 1
    assert (watched.recorded, watched.as_they_are, watched.replayed) == (kinds, kinds * WARM_UP, 14 - kinds * WARM_UP)
    assert_same(weights(plain), weights(recorded))
    theirs = recorded.tensors()
    for file, named in plain.tensors().items():
        assert_same(cast(dict[str, Tensor], named), cast(dict[str, Tensor], theirs[file]))


def test_updates_that_know_other_attributes_each_time_are_one_recording(place: Place) -> None:
    specs = (AttributeSpec("Male"), AttributeSpec("age", (20.0, 30.0, 40.0)))
    recipe = Recipe(
        image=ImageSpec(size=32, template="none"),
        model=ModelConfig(backbone="mobilefacenet", embedding=16),
        tasks=TaskConfig(attributes=("Male", "age")),
        phases=(MOVING,),
        precision="fp32",
    )
    values = torch.tensor([[1.0, 20], [0, torch.nan], [torch.nan, 40], [1, 30]] * 2)

    def begun() -> TrainState:
        state = TrainState(recipe, resolve(recipe, (IndexFacts(80, CLASSES, "f"),), 1), place.run)
        torch.manual_seed(1)
        model = build_model(recipe.model, CLASSES, recipe.image, attributes=specs).to(place.device)
        state.enter(0, model, SideInputs(values=values))
        return state

    def updates(state: TrainState) -> list[Tensor]:
        stats = []
        for number in range(WARM_UP + 3):
            batch = make_batch(8, number)
            rows = batch.rows.masked_fill(batch.rows < number, -1)
            batch = batch._replace(rows=rows, labels=batch.labels.masked_fill(rows < 0, -100))
            known = (~values[number:].isnan()).sum(0).tolist()
            counts = RowCounts(8 - number, 8 - number, tuple(known))
            stats.append(train_step(state, [moved(batch, place.device)], counts))
        return stats

    plain, recorded = begun(), begun()
    assert recorded.unrecorded is None
    if place.device.type == "cuda":
        plain.record(StandIn())
    watched = place.watch(recorded)
    assert_equal(updates(plain), updates(recorded))
    assert (watched.recorded, watched.replayed) == (1, 3)
    assert_same(weights(plain), weights(recorded))


def test_pruned_weights_stay_pruned_between_replays(place: Place) -> None:
    phase = dataclasses.replace(MOVING, prune=0.5, steps=12)
    plain, (recorded, _) = place.plain(phase), place.recorded(phase)
    run(plain, range(12)), run(recorded, range(12))
    assert_same(weights(plain), weights(recorded))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_update_that_is_not_finite_changes_nothing_when_it_is_replayed(place: Place, precision: str) -> None:
    state, watched = place.recorded(dataclasses.replace(MOVING, optimizer="adam", steps=20), precision=precision)
    for number in range(WARM_UP + 1):
        step(state, make_batch(8, number))
    before, bad = weights(state), make_batch(8, 99)
    bad.images[3, 0, 0, 0] = torch.inf
    stats = step(state, bad)
    assert watched.replayed == 2 and stats[3] == 1
    after = {name: value for name, value in weights(state).items() if "num_batches_tracked" not in name}
    assert_same(after, before)
    assert step(state, make_batch(8, 100))[3] == 0
    changed = [name for name, value in weights(state).items() if not torch.equal(value, before[name])]
    assert "head.weight" in changed


def test_a_recording_survives_an_evaluation(place: Place) -> None:
    plain, (recorded, _) = place.plain(MOVING), place.recorded(MOVING)
    for state in (plain, recorded):
        run(state, range(12))
        state.evaluated.eval()
        with torch.no_grad():
            state.evaluated.embed(make_batch().images.to(place.device))
        state.set_modes()  # as after every evaluation
        run(state, range(12, 15))
    assert_same(weights(plain), weights(recorded))


def test_a_run_resumed_in_the_middle_of_an_epoch_goes_on_as_one_that_was_recorded_throughout(
    place: Place, tmp_path: Path
) -> None:
    phase = dataclasses.replace(MOVING, optimizer="adamw", lr=0.01, steps=18)
    (straight, _), (first, _), (second, again) = (place.recorded(phase) for _ in range(3))
    assert 7 % straight.phase_plan.steps_per_epoch > 0
    run(straight, range(18))
    run(first, range(7))
    tensors = first.staged.take(first.tensors())()
    path = checkpoint.save(tmp_path, 7, tensors=tensors, documents=first.documents(), best=True, keep=1)
    second.load(path)
    run(second, range(7, 18))
    assert (again.recorded, again.as_they_are) == (1, WARM_UP)  # a process that begins with it records anew
    assert_same(weights(straight), weights(second))
    ours, theirs = straight.tensors()["optimizer"], second.tensors()["optimizer"]
    assert_same(cast(dict[str, Tensor], ours), cast(dict[str, Tensor], theirs))


def test_the_next_phase_is_recorded_anew(place: Place) -> None:
    one = dataclasses.replace(MOVING, name="one", steps=6)
    two = dataclasses.replace(
        MOVING, name="two", start="previous", trainable=("head",), optimizer="adam", lr=0.01, steps=6
    )

    def phases(state: TrainState, enter: Callable[[], None]) -> list[Tensor]:
        stats = run(state, range(6))
        state.enter(1, state.model)
        enter()
        return stats + run(state, range(6, 12))

    fields = {"phases": (one, two)}
    plain, (recorded, first) = place.plain(one, **fields), place.recorded(one, **fields)
    seen: list[Watched] = []
    as_they_are = (lambda: None) if place.device.type == "cpu" else (lambda: plain.record(StandIn()))
    assert_equal(phases(plain, as_they_are), phases(recorded, lambda: seen.append(place.watch(recorded))))
    for watched in (first, *seen):
        assert (watched.recorded, watched.as_they_are, watched.replayed) == (1, WARM_UP, 6 - WARM_UP)
    assert_same(weights(plain), weights(recorded))


def test_a_recording_that_fails_leaves_updates_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(StandIn):
        def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
            weight = next(state.model.parameters())
            weight.grad = torch.ones_like(weight)  # what it got to
            raise RuntimeError("operation not permitted when stream is capturing")

    plain, state, failing = make_state(MOVING), make_state(MOVING), Watched(Failing())
    state.record(failing)
    run(plain, range(12)), run(state, range(12))
    assert_same(weights(plain), weights(state))
    assert failing.as_they_are == 12
    assert capsys.readouterr().out.count("not recorded as a CUDA graph: operation not permitted") == 1


# ---------------------------------------------------------------------------------------------
# What only a graph does


@pytest.mark.gpu
def test_a_replay_waits_for_nothing() -> None:
    place = graphs_on("cuda")
    state, watched = place.recorded(MOVING)
    run(state, range(WARM_UP + 1))
    batch = moved(make_batch(), place.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = [train_step(state, [batch], RowCounts(8, 8 - number)) for number in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched.replayed == 4 and all(bool(one.isfinite().all()) for one in stats)


@pytest.mark.gpu
def test_updates_come_before_what_else_a_gpu_has_to_do() -> None:
    device, seen = torch.device("cuda"), []

    def look() -> Tensor:
        seen.append(torch.cuda.current_stream(device).priority)
        return torch.zeros(1, device=device) + 1

    recorder = GraphRecorder(device)
    recorder.warm_up(look)
    assert recorder.record(look)() == 1
    usual = torch.cuda.default_stream(device).priority
    assert len(seen) == 2 and all(priority < usual for priority in seen)


@pytest.mark.gpu
def test_what_no_graph_can_hold_ends_recording_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    place = graphs_on("cuda")
    plain, (state, watched) = place.plain(MOVING), place.recorded(MOVING)

    def wait(module: torch.nn.Module, given: Any, output: Tensor) -> None:
        if torch.cuda.is_current_stream_capturing():
            output.sum().item()

    next(m for m in state.model.modules() if isinstance(m, torch.nn.Conv2d)).register_forward_hook(wait)
    assert_equal(run(plain, range(12)), run(state, range(12)))
    assert_same(weights(plain), weights(state))
    assert (watched.recorded, watched.as_they_are) == (0, 12)
    assert capsys.readouterr().out.count("not recorded as a CUDA graph") == 1
    # What two streams have used is free again: the allocator knows that nothing is being recorded any more.
    side, sizes = torch.cuda.Stream(), []
    for _ in range(3):
        memory = torch.empty(1 << 22, device=place.device)
        memory.record_stream(side)
        del memory
        torch.cuda.synchronize()
        torch.empty(1, device=place.device)
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("word", "phase", "fields"),
    [
        (None, {}, {}),
        ("compile is never", {}, {"compile": "never"}),
        ("mixup and cutmix", {"mixup": 0.2}, {}),
        ("Dropout draws", {}, {"model": ModelConfig(backbone="mobilefacenet", embedding=16, dropout=0.2)}),
        (None, {}, {"tasks": TaskConfig(attributes=("Male",))}),
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


@pytest.mark.parametrize("fields", [{}, {"cudnn_benchmark": True}])
def test_cudnn_chooses_by_its_rules_unless_a_recipe_has_it_measure(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not fields)
    recipe = Recipe(phases=(PHASE,), **fields)
    plan = resolve(recipe, (IndexFacts(80, CLASSES, "f"),), 1)
    TrainState(recipe, plan, Runtime(World(), torch.device("cuda")))
    assert torch.backends.cudnn.benchmark is bool(fields)


def test_what_divides_on_the_device_divides_to_the_bit_as_numbers_do() -> None:
    loss = torch.tensor(1.2345678)
    for rows in range(1, 400, 3):
        for world in (1, 2, 3, 7, 12, 1000):
            counts = RowCounts(rows, rows // 2, (rows // 3,)).on(CPU)
            assert torch.equal(loss * counts.share(world), loss * (world / rows)), (rows, world)
            assert torch.equal(loss * world / counts.labelled, loss * world / max(1, rows // 2)), (rows, world)
            assert torch.equal(loss / counts.known[0], loss / max(1, rows // 3)), rows


def test_a_recipe_of_when_compiling_was_true_or_false_is_read() -> None:
    document = to_json(Recipe(phases=(PHASE,)))
    assert document["compile"] == "auto"
    assert from_json(Recipe, document | {"compile": True}).compile == "always"
    assert from_json(Recipe, document | {"compile": False}).compile == "never"
