"""A run with nothing left to decide: a recipe, the facts of the photographs and the number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
    """Pictures of one forward pass over all processes."""
    batch_per_rank: int
    """Pictures of one forward pass on one process."""
    batchnorm_batch: int
    """Pictures that BatchNorm takes its statistics of, where it does."""
    seed: int
    """Of everything that is drawn in the phase: first weights, the order, augmentation."""
    steps_per_epoch: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """A run with nothing left to decide; saved beside the recipe."""

    world_size: int
    phases: tuple[PhasePlan, ...]

    @property
    def total_steps(self) -> int:
        """Optimiser updates of the whole run."""
        return sum(phase.steps for phase in self.phases)


def resolve(recipe: Recipe, facts: tuple[IndexFacts, ...], world_size: int) -> Plan:
    """Turns a recipe, one `IndexFacts` per phase and the world size into a plan.

    Raises:
        ValueError: a batch does not divide among the processes, or there is nothing to learn from.
    """
    return Plan(
        world_size=world_size,
        phases=tuple(
            _resolve_phase(phase, fact, world_size, recipe.seed + 1000 * number, recipe.model.batchnorm == "sync")
            for number, (phase, fact) in enumerate(zip(recipe.phases, facts, strict=True))
        ),
    )


def _resolve_phase(phase: Phase, facts: IndexFacts, world_size: int, seed: int, synchronised: bool) -> PhasePlan:
    passes = world_size * phase.accumulate
    if phase.batch_size % passes:
        raise ValueError(
            f"phase {phase.name}: batch_size {phase.batch_size} does not divide among {world_size} processes "
            f"x {phase.accumulate} passes; use a multiple of {passes}"
        )
    if facts.num_classes < 2 and (phase.loss.weight > 0 or phase.loss.pairwise):
        raise ValueError(
            f"phase {phase.name}: {facts.num_classes} identities in split {phase.split!r}; at least 2 are needed"
        )
    # Balanced samplers draw among identities: pictures without one never come.
    num_rows = facts.num_rows - (facts.num_unlabelled if phase.sampler != "epoch" else 0)
    steps_per_epoch = math.ceil(num_rows / phase.batch_size)
    return PhasePlan(
        name=phase.name,
        num_rows=facts.num_rows,
        num_classes=facts.num_classes,
        fingerprint=facts.fingerprint,
        batch_size=phase.batch_size // phase.accumulate,
        batch_per_rank=phase.batch_size // passes,
        batchnorm_batch=phase.batch_size // (phase.accumulate if synchronised else passes),
        seed=seed,
        steps_per_epoch=steps_per_epoch,
        # A phase makes one update at least, unless it is to make none.
        steps=phase.steps or (max(1, round(phase.epochs * steps_per_epoch)) if phase.epochs else 0),
    )
