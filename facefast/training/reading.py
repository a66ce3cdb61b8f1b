"""A phase's pictures as training reads them: in whose order, and by which loader."""

from __future__ import annotations

import dataclasses

import numpy as np

from facefast.data import Loader, Parts, Sampler, make_loader, make_sampler
from facefast.data.divide import PhaseData
from facefast.training.step import TrainState


def phase_sampler(state: TrainState, data: PhaseData) -> Sampler:
    """Who owns the order of the phase's pictures."""
    run, phase, plan = state.run, state.phase, state.phase_plan
    # Balanced and pk batches are drawn by identity: pictures without one cannot be drawn.
    rows = np.arange(len(data.train)) if phase.sampler == "epoch" else np.flatnonzero(data.train.labels >= 0)
    sampler = make_sampler(
        phase.sampler,
        labels=data.train.labels[rows],
        batch_size=plan.batch_size,
        seed=plan.seed,
        rows=rows,
        pictures_per_identity=phase.pictures_per_identity,
    )
    if plan.passes > 1 or plan.batch_size % run.world.size:
        return Parts(sampler, run.world.size, plan.passes)
    return sampler


def picture_loader(state: TrainState, data: PhaseData, sampler: Sampler) -> Loader:
    """The phase's pictures for this rank, in the order of a sampler."""
    run = state.run
    return make_loader(
        data.train,
        state.recipe.image,
        sampler=sampler,
        augment=state.phase.augment,
        seed=state.phase_plan.seed,
        rank=run.world.rank,
        world=run.world.size,
        device=run.device,
        dtype=state.precision.dtype,
        channels_last=state.precision.channels_last,
        **dataclasses.asdict(state.reading),
    )
