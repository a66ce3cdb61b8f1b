"""A run with nothing left to decide: a recipe, the facts of the photographs and the number of processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from facefast.recipe.config import Place
from facefast.recipe.phase import Phase
from facefast.recipe.whole import Recipe


@dataclass(frozen=True)
class IndexFacts:
    """What a plan needs to know of an index."""

    num_rows: int
    num_classes: int
    fingerprint: str
    """Hex digest over paths, labels and content."""
    class_names: tuple[str, ...] = field(repr=False, default=())
    num_unlabelled: int = 0
    """Rows among `num_rows` that have no identity."""


@dataclass(frozen=True)
class PhasePlan:
    """A phase with every number that follows from the data and the world."""

    name: str
    num_rows: int
    num_classes: int
    fingerprint: str
    batch_size: int
    """Pictures that are drawn at once: of `passes` forward passes over all processes."""
    batch_per_rank: int
    """Pictures of one forward pass on one process; the last ones of a batch that does not divide are padding."""
    most_per_rank: int
    """Those where the run began: a process that goes on with fewer others never holds more."""
    passes: int
    """Forward passes that `batch_size` takes; above 1 where fewer processes go on than began."""
    accumulate: int
    """Forward passes of one update on one process: `passes` times the recipe's own."""
    batchnorm_batch: int
    """Pictures that BatchNorm takes its statistics of, where it does."""
    seed: int
    """Of everything that is drawn in the phase: first weights, the order, augmentation."""
    steps_per_epoch: int
    steps: int


@dataclass(frozen=True)
class Decoding:
    """Where the pictures of a run on a GPU are decoded, all through it."""

    place: Place
    hw_decoder_load: float
    """Part of the pictures that the JPEG hardware takes."""
    why: Literal["asked", "measured", "usual"]
    """Who decided: the recipe, a measurement on such a machine, or nobody, since none would have paid."""


@dataclass(frozen=True)
class Plan:
    """A run with nothing left to decide; saved beside the recipe."""

    world_size: int
    phases: tuple[PhasePlan, ...]
    decoding: Decoding | None = None
    """None on the CPU, where there is nothing to choose."""

    @property
    def total_steps(self) -> int:
        """Optimiser updates of the whole run."""
        return sum(phase.steps for phase in self.phases)


def resolve(recipe: Recipe, facts: tuple[IndexFacts, ...], world_size: int) -> Plan:
    """Turns a recipe, one `IndexFacts` per phase and the world size into the plan of a run that begins.

    Raises:
        ValueError: a batch has fewer pictures than there are processes, or there is nothing to learn from.
    """
    return Plan(
        world_size=world_size,
        phases=tuple(
            _resolve_phase(phase, fact, world_size, recipe.seed + 1000 * number, recipe.model.batchnorm == "sync")
            for number, (phase, fact) in enumerate(zip(recipe.phases, facts, strict=True))
        ),
    )


def within(plan: Plan, recipe: Recipe, most_per_rank: Sequence[int]) -> Plan:
    """The plan of a run that goes on, perhaps with another number of processes.

    The rows of every update stay what they were. Where fewer processes go on, each takes its part in several forward
    passes, so that none holds more pictures at once than when the run began: where their number divides that of then,
    the parts are the very same.

    Args:
        plan: as `resolve` makes it for the processes that there are.
        most_per_rank: of each phase, as the run began.
    """
    phases = (
        _divided(phase, plan.world_size, most, ours.accumulate, recipe.model.batchnorm == "sync")
        for phase, ours, most in zip(plan.phases, recipe.phases, most_per_rank, strict=True)
    )
    return dataclasses.replace(plan, phases=tuple(phases))


def _resolve_phase(phase: Phase, facts: IndexFacts, world_size: int, seed: int, synchronised: bool) -> PhasePlan:
    batch_size = phase.batch_size // phase.accumulate
    if batch_size < world_size:
        raise ValueError(
            f"phase {phase.name}: batch_size {phase.batch_size} is less than a picture for each of {world_size} "
            f"processes x {phase.accumulate} passes; use {world_size * phase.accumulate} or more"
        )
    if facts.num_classes < 2 and (phase.loss.weight > 0 or phase.loss.pairwise):
        raise ValueError(
            f"phase {phase.name}: the number of identities in split {phase.split!r} is {facts.num_classes}; at least 2 "
            "are needed"
        )
    # Balanced samplers draw among identities: pictures without one never come.
    num_rows = facts.num_rows - (facts.num_unlabelled if phase.sampler != "epoch" else 0)
    steps_per_epoch = math.ceil(num_rows / phase.batch_size)
    most = math.ceil(batch_size / world_size)
    plan = PhasePlan(
        name=phase.name,
        num_rows=facts.num_rows,
        num_classes=facts.num_classes,
        fingerprint=facts.fingerprint,
        batch_size=batch_size,
        batch_per_rank=most,
        most_per_rank=most,
        passes=1,
        accumulate=phase.accumulate,
        batchnorm_batch=most,
        seed=seed,
        steps_per_epoch=steps_per_epoch,
        # A phase makes one update at least, unless it is to make none.
        steps=phase.steps or (max(1, round(phase.epochs * steps_per_epoch)) if phase.epochs else 0),
    )
    return _divided(plan, world_size, most, phase.accumulate, synchronised)


def _divided(plan: PhasePlan, world_size: int, most: int, accumulate: int, synchronised: bool) -> PhasePlan:
    """The phase with its batches divided among the processes, at most so many pictures at once on each."""
    passes = math.ceil(plan.batch_size / (world_size * most))
    batch_per_rank = math.ceil(plan.batch_size / (world_size * passes))
    return dataclasses.replace(
        plan,
        batch_per_rank=batch_per_rank,
        most_per_rank=most,
        passes=passes,
        accumulate=accumulate * passes,
        batchnorm_batch=batch_per_rank * world_size if synchronised else batch_per_rank,
    )
