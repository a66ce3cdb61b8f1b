"""How fast a training's parts are without the others: updates on batches that stay in memory, or the loader drained.

    python -m facefast.training.pace compute|loader [RECIPE] [options of train]

Each is the first phase of the run that the same words would train, prints a JSON line whenever it has done a part of
its work, and goes on until it is ended. Nothing is measured and nothing saved.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from facefast.data import Batch
from facefast.data.divide import PhaseData
from facefast.data.prepare import prepare
from facefast.data.sampler import EpochSampler
from facefast.recipe import flags, resolve
from facefast.runtime import process
from facefast.runtime.log import RunLog
from facefast.runtime.process import Runtime
from facefast.training.begin import begin, find_source, settle
from facefast.training.objective import RowCounts
from facefast.training.reading import phase_sampler, picture_loader
from facefast.training.step import TrainState, train_step

PARTS = ("compute", "loader")
RESIDENT = 4
"""Updates' worth of batches that stay in memory: more than a cache holds of any."""
LINE_PICTURES = 1024
"""Pictures, at least, that the loader gives before it says so."""
LONG = 1000
"""Batches of an epoch of the drained loader: where epochs end is the whole job's to show."""


def main(arguments: list[str] | None = None) -> None:
    """The command line; does not return.

    Raises:
        ValueError: the words are no run, or no part.
    """
    part, *words = sys.argv[1:] if arguments is None else arguments
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r} of a training; it must be one of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder, process.start() as run:
        for done in begun(words, part, Path(folder), run):
            print(json.dumps({"done": done}), flush=True)


def begun(words: list[str], part: str, folder: Path, run: Runtime) -> Iterator[int]:
    """Updates or batches done so far, without end, each time the device has done them.

    Args:
        words: a command line of train.
        part: one of `PARTS`.
        folder: for the index of the photographs.
        run: one process.
    """
    recipe = flags.command_line(words).recipe
    source = find_source(recipe)
    datasets = prepare(recipe, folder, run)
    recipe = settle(recipe, source, None, datasets)
    state = TrainState(recipe, resolve(recipe, tuple(data.facts() for data in datasets), run.world.size), run)
    total, every = state.plan.total_steps, recipe.log_every
    with RunLog(folder, enabled=False, total_steps=total, first_step=None, every=every) as log:
        begin(folder, state, 0, datasets[0], source, None, None, log)
    yield from updates(state, datasets[0], every) if part == "compute" else batches(state, datasets[0])


def updates(state: TrainState, data: PhaseData, every: int) -> Iterator[int]:
    """`train_step` on the same few batches again and again; waits for the device as often as the log does."""
    plan = state.phase_plan
    with picture_loader(state, data, phase_sampler(state, data)) as loader:
        taken = list(itertools.islice(loader, RESIDENT * plan.accumulate))
        # Copies: the loader's own memory is another batch's soon.
        resident = [Batch(*(tensor.clone() for tensor in batch)) for batch in taken]
    labelled, known = data.train.labels >= 0, ~data.values().isnan().numpy()
    turns = []
    for first in range(0, len(resident), plan.accumulate):
        micro = resident[first : first + plan.accumulate]
        rows = torch.cat([batch.rows for batch in micro]).cpu().numpy()
        rows = rows[rows >= 0]
        turns.append((micro, RowCounts(len(rows), int(labelled[rows].sum()), tuple(known[rows].sum(0).tolist()))))
    for done, (micro, row_counts) in enumerate(itertools.cycle(turns), 1):
        stats = train_step(state, micro, row_counts)
        if done % every == 0:
            stats.tolist()
            yield done


def batches(state: TrainState, data: PhaseData) -> Iterator[int]:
    """The loader alone, its batches thrown away."""
    size = state.phase_plan.batch_size
    sampler = EpochSampler(np.resize(np.arange(len(data.train)), LONG * size), size, seed=state.phase_plan.seed)
    every, done = line_batches(size), 0
    with picture_loader(state, data, sampler) as loader:
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            for batch in loader:
                done += 1
                if done % every == 0:
                    batch.rows.cpu()  # comes after its pictures on a GPU's stream
                    yield done


def line_batches(size: int) -> int:
    """Batches of so many pictures between two lines of the loader's."""
    return -(-LINE_PICTURES // size)


if __name__ == "__main__":
    main()
