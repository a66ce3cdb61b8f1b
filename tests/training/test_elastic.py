"""Runs that go on with another number of processes: which rows every update sees, and what becomes of the weights."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from facefast import train
from facefast.data.drawn import synthetic
from facefast.models.checkpoint import read_tensors
from facefast.recipe import IndexFacts, ModelConfig, Phase, Plan, Recipe, resolve, within
from facefast.training.step import train_step
from tests.support.ranks import run_ranks

# So low a rate, because at a usual one a random network amplifies what fp32 rounds a thousandfold in a few updates.
USUAL = (
    "scratch",
    "--data.format=celeba",
    "--image.size=32",
    "--model.backbone=resnet18",
    "--eval.pairs=12",
    "--eval.folds=2",
    "--precision=fp32",
    "--log-every=1",
    "--pictures=0",
    "--lr=1e-5",
    "--phases.scratch.batch-size=20",
    "--phases.scratch.steps=10",
    "--phases.scratch.clip-grad=1",
    "--model.dropout=0.2",
)
STEPS = 10
Updates = dict[int, Counter[int]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(8, 0, 0), pictures=8, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


def noted(rank: int, root: str, out: str, until: int, *more: str) -> int:
    """A training that writes down what each of its updates sees, and is asked to stop after update `until`."""
    note = Path(f"{out}.rows.{rank}")
    with open(f"{out}.said", "a") as said:
        os.dup2(said.fileno(), 1)

    def stepping(state: Any, batches: Any, row_counts: Any) -> Any:
        with open(note, "a") as file:
            print(json.dumps([state.step, [batch.rows.tolist() for batch in batches]]), file=file)
        stats = train_step(state, batches, row_counts)
        state.run.stop_requested |= state.step == until < STEPS
        return stats

    vars(train)["train_step"] = stepping
    return train.main([*USUAL, f"--data.root={root}", f"--out={out}", *more])


def goes(drawn: Path, out: Path, stays: Sequence[tuple[int, int]], *more: str) -> tuple[Updates, int]:
    """The rows of every update of a run that lasts until update N with so many processes, one stay after the other; and
    the most pictures that a process held at once."""
    for world, until in stays:
        codes = run_ranks(noted, world, str(drawn), str(out), until, *more)
        assert codes == [75 if until < STEPS else 0] * world
    updates: Updates = {}
    most = 0
    for path in out.parent.glob(f"{out.name}.rows.*"):
        for line in path.read_text().splitlines():
            step, batches = json.loads(line)
            seen = updates.setdefault(step, Counter())
            seen.update(row for batch in batches for row in batch if row >= 0)
            most = max(most, *map(len, batches))
    return updates, most


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(out / "checkpoints" / f"step-{STEPS:07d}", "model")


def test_two_processes_then_one_then_two_end_as_two_do(drawn: Path, tmp_path: Path) -> None:
    """With dropout, BatchNorm that learns and ends of epochs that fill a batch with other pictures (48, batches of
    20)."""
    expected, most = goes(drawn, tmp_path / "whole", [(2, STEPS)])
    found, still = goes(drawn, tmp_path / "parts", [(2, 2), (1, 7), (2, STEPS)])
    assert most == still == 10
    assert found == expected and sorted(found) == list(range(STEPS))
    for epoch in range(3):
        rows = sum((found[step] for step in range(3 * epoch, 3 * epoch + 3)), Counter[int]())
        assert sorted(rows.elements()) == list(range(48))
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)
    start = read_tensors(tmp_path / "whole" / "checkpoints" / "step-0000003", "model")
    assert max(float((theirs[name] - start[name]).abs().max()) for name in theirs) > 1e-3  # it did learn


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "the weights are the same but for rounding"),
        (("--model.batchnorm=sync",), "the weights will differ: BatchNorm normalises over 10 pictures instead of 20"),
    ],
)
def test_a_run_that_goes_on_with_fewer_processes_says_what_stays_the_same(
    more: tuple[str, ...], said: str, drawn: Path, tmp_path: Path
) -> None:
    goes(drawn, tmp_path / "run", [(2, 1), (1, 2)], *more)
    told = (tmp_path / "run.said").read_text()
    assert "goes on with 1 process instead of 2: the same 20 pictures in every update, accumulate 1 -> 2, 10" in told
    assert said in told


def test_a_number_of_processes_that_does_not_divide_the_batch_sees_the_same_rows(drawn: Path, tmp_path: Path) -> None:
    """Balanced batches, which have no end of an epoch, and the recipe's own accumulation."""
    more = ("--phases.scratch.sampler=balanced", "--phases.scratch.accumulate=2")
    expected, _ = goes(drawn, tmp_path / "whole", [(2, STEPS)], *more)
    found, most = goes(drawn, tmp_path / "parts", [(2, 2), (3, 4), (1, STEPS)], *more)
    assert most == 5 and found == expected
    assert [found[step].total() for step in range(3)] == [20, 20, 10]


def plan_for(world: int, batch_size: int = 64, accumulate: int = 1, batchnorm: str = "rank") -> tuple[Recipe, Plan]:
    phase = Phase(start="scratch", batch_size=batch_size, accumulate=accumulate)
    recipe = Recipe(model=ModelConfig(batchnorm=batchnorm), phases=(phase,))  # type: ignore[arg-type]
    return recipe, resolve(recipe, (IndexFacts(80, 4, "f"),), world)


@pytest.mark.parametrize(
    ("began", "world", "passes", "per_rank"),
    [(2, 1, 2, 32), (4, 2, 2, 16), (4, 3, 2, 11), (8, 7, 2, 5), (1, 4, 1, 16), (4, 1, 4, 16), (2, 2, 1, 32)],
)
def test_a_process_never_holds_more_pictures_at_once_than_when_the_run_began(
    began: int, world: int, passes: int, per_rank: int
) -> None:
    most = plan_for(began)[1].phases[0].most_per_rank
    recipe, plan = plan_for(world)
    phase = within(plan, recipe, [most]).phases[0]
    assert (phase.passes, phase.batch_per_rank, phase.accumulate) == (passes, per_rank, passes)
    assert phase.batch_per_rank <= phase.most_per_rank == most
    assert phase.batch_per_rank * world * passes >= 64
    again = within(plan_for(began)[1], recipe, [phase.most_per_rank]).phases[0]
    assert (again.passes, again.batch_per_rank) == (1, most)  # back to what it was
    assert phase.steps == again.steps


def test_statistics_over_all_processes_are_of_one_pass() -> None:
    recipe, plan = plan_for(2, batchnorm="sync", accumulate=2)
    phase = within(plan, recipe, [8]).phases[0]
    assert (phase.accumulate, phase.passes, phase.batchnorm_batch) == (4, 2, 16)


def test_a_batch_of_fewer_pictures_than_processes_is_refused() -> None:
    with pytest.raises(
        ValueError, match="batch_size 6 is less than a picture for each of 4 processes x 2 passes; use 8"
    ):
        plan_for(4, batch_size=6, accumulate=2)
