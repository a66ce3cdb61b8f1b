"""What the updates of a phase consume: every batch of every epoch once, from wherever a run goes on."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from facefast import train
from facefast.data import FaceIndex, Loader
from facefast.data.divide import EvaluationSet, PhaseData
from facefast.models import build_model
from facefast.recipe import ImageSpec, ModelConfig, Phase, Recipe, resolve, within
from facefast.runtime.process import Runtime, World
from facefast.training.step import TrainState
from tests.support.pictures import encode, make_index, smooth_picture

NOTHING = EvaluationSet(test=None, verification=None, pairs=None, held_out=True)
NUMBER = 11
Update = tuple[list[list[int]], list[torch.Tensor], int]
"""Rows and images of the micro-batches, and the rows that count over all ranks."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PhaseData:
    folder = tmp_path_factory.mktemp("photographs")
    names = [f"{i:03}.jpg" for i in range(NUMBER)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(encode(smooth_picture(40, 48, i)))
    index: FaceIndex = make_index(folder, names, (48, 40), labels=np.arange(NUMBER, dtype=np.int32) % 3).scanned()
    return PhaseData(index, NOTHING, NOTHING)


def state_of(data: PhaseData, world: World, most: int | None, **phase: int) -> TrainState:
    recipe = Recipe(
        image=ImageSpec(size=32, template="none"),
        model=ModelConfig(backbone="mobilefacenet", embedding=16),
        phases=(Phase(start="scratch", **phase),),  # type: ignore[arg-type]
        precision="fp32",
        threads=1,
    )
    plan = resolve(recipe, (data.facts(),), world.size)
    if most is not None:
        plan = within(plan, recipe, [most])
    state = TrainState(recipe, plan, Runtime(World(), torch.device("cpu")))
    state.enter(0, build_model(recipe.model, len(data.train.class_names), recipe.image))
    state.run = Runtime(world, torch.device("cpu"))  # a loader's rank needs no other one beside it
    return state


def consumed(state: TrainState, data: PhaseData, first: int = 0) -> list[Update]:
    state.phase_step = first
    found: list[Update] = []
    with train.open_loader(state, data) as loader:
        assert isinstance(loader, Loader)
        for micro, counts in train.updates(state, loader, data):
            found.append(([batch.rows.tolist() for batch in micro], [batch.images for batch in micro], counts.rows))
            state.phase_step += 1
    return found


CASES = {
    # 11 pictures in batches of 4: an epoch of 3 updates, the last of 3 pictures.
    "plain": (World(), None, {"batch_size": 4, "steps": 8}),
    # Passes of 2: 6 an epoch, no end inside an update. Passes of 4 by twos: 3 an epoch, the second update has one.
    "accumulated": (World(), None, {"batch_size": 4, "steps": 8, "accumulate": 2}),
    "an epoch that ends inside an update": (World(), None, {"batch_size": 8, "steps": 5, "accumulate": 2}),
    "one rank of two": (World(1, 2, 1, 2), None, {"batch_size": 4, "steps": 7, "accumulate": 1}),
    "fewer processes than began": (World(), 1, {"batch_size": 4, "steps": 7}),
    "a batch that does not divide": (World(0, 3, 0, 3), None, {"batch_size": 4, "steps": 7}),
    "epochs of one update": (World(), None, {"batch_size": 11, "steps": 9}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_update_has_its_batches_wherever_the_run_began(data: PhaseData, name: str) -> None:
    world, most, phase = CASES[name]
    make = functools.partial(state_of, data, world, most, **phase)
    state = make()
    whole = consumed(state, data)
    plan = state.phase_plan
    assert len(whole) == plan.steps == phase["steps"]
    with train.open_loader(state, data) as loader:
        sampler = loader.sampler
    for step, (rows, _, counted) in enumerate(whole):
        epoch, done = divmod(step, plan.steps_per_epoch)
        first = done * plan.accumulate
        passes = range(first, min(first + plan.accumulate, sampler.steps_per_epoch))
        assert rows == [sampler.local(epoch, part, world.rank, world.size).tolist() for part in passes]
        assert counted == sum(int((sampler.batch(epoch, part) >= 0).sum()) for part in passes)
    for first in range(1, plan.steps):
        tail = consumed(make(), data, first)
        assert [(rows, counted) for rows, _, counted in tail] == [(rows, n) for rows, _, n in whole[first:]]
        pairs = zip((i for _, i, _ in tail), (i for _, i, _ in whole[first:]), strict=True)
        assert all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def test_a_phase_that_is_over_reads_nothing(data: PhaseData, tmp_path: Path) -> None:
    state = state_of(data, World(), None, batch_size=4, steps=3)
    assert consumed(state, data, 3) == []
