"""Checkpoints beside training: an update waits for a copy of its tensors, a thread writes them.

The files, their order and what a crash leaves are those of `facefast.models.checkpoint`; `last`, `best` and status.json
move when the files are on the disk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from facefast.models import checkpoint
from facefast.models.spread import Fetch, Named, rows_of_all_ranks
from facefast.runtime.exits import NumericsError
from facefast.training.choice import best_of
from facefast.training.finish import write_status
from facefast.training.guard import not_finite, some
from facefast.training.step import TrainState


def save(folder: Path, state: TrainState, improved: bool) -> None:
    """Begins one checkpoint, which rank 0 writes while training goes on; waits for the one before.

    Raises:
        NumericsError: it would hold numbers that are not finite; the one before stays the newest.
        StorageError: the one before, or this one at once, cannot be written, or the run folder is gone.
    """
    state.saves.settle()  # never two at once
    tensors = state.tensors()
    broken = not_finite(tensors)
    if state.run.agree(bool(broken)):  # BatchNorm's statistics are each rank's own until they are measured
        raise NumericsError(
            f"after step {state.step} of phase {state.phase.name} the run holds numbers that are not finite "
            f"({some(broken) or 'on another rank'}) and is not saved; the newest checkpoint is sound: go on from it "
            "with a lower learning rate, or use precision fp32"
        )
    with state.run.together(), rows_of_all_ranks(state.run, tensors) as fetch:
        if not state.run.is_main:
            return
        write = _writing(folder, state, improved)
        if fetch is None:
            staged = state.staged.take(tensors)
            state.saves.begin(lambda: write(staged(), None))
        else:
            # Ranks share the head because none has room for all of it: it goes into the file a piece at a time, which
            # takes every rank's answers. A copy is what that is to avoid.
            write(tensors, fetch)


def _writing(folder: Path, state: TrainState, improved: bool) -> Callable[[Named, Fetch | None], None]:
    """What writes a checkpoint of now, whatever becomes of the state meanwhile."""
    documents: dict[str, Any] = copy.deepcopy(state.documents())
    best = copy.deepcopy(best_of(state))
    step, keep, held = state.step, state.recipe.keep, state.run.held

    def write(tensors: Named, fetch: Fetch | None) -> None:
        if held is not None and (problem := held.problem()):
            raise problem
        checkpoint.save(folder, step, tensors=tensors, documents=documents, best=improved, keep=keep, fetch=fetch)
        write_status(folder, "running", step=step, best=best)

    return write
