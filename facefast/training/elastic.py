"""A run that goes on with another number of processes than it had: the same rows in every update, and what else is the
same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from facefast.recipe import within
from facefast.runtime import files
from facefast.runtime.exits import StorageError
from facefast.training.step import TrainState
from facefast.training.transfer import keeps_statistics


def take_division(state: TrainState, saved: Path) -> None:
    """Lets no process hold more pictures at once than when the run of a checkpoint began.

    Raises:
        StorageError: the checkpoint's plan does not say how many those were.
    """
    # Plans of before there was a limit: what a process held then.
    most = [each.get("most_per_rank", each["batch_per_rank"]) for each in _phases(saved)]
    if not all(type(number) is int and number > 0 for number in most) or len(most) != len(state.plan.phases):
        raise StorageError(f"{saved / 'plan.json'} is no plan of facefast's: batches of {most} pictures")
    state.plan = within(state.plan, state.recipe, most)


def division_said(state: TrainState, saved: Path | None) -> Iterator[str]:
    """What another number of processes than before means for the phase that the run is in; and padding, where a batch
    does not divide among them.

    Args:
        saved: the checkpoint that the run goes on from; None where it begins.
    """
    plan, world = state.phase_plan, state.run.world.size
    if saved is not None:
        before, old = _phases(saved)[state.phase_number], files.read_json(saved / "plan.json")["world_size"]
        if old != world:
            yield (
                f"goes on with {world} process{'es' if world > 1 else ''} instead of {old}: the same "
                f"{state.phase.batch_size} pictures in every update, accumulate "
                f"{before.get('accumulate', state.phase.accumulate)} -> {plan.accumulate}, {plan.batch_per_rank} at "
                f"once on each; {_what_is_equal(state, before, old)}"
            )
    parts = world * plan.passes
    padding = plan.batch_per_rank * parts - plan.batch_size
    if padding:
        yield (
            f"note: {plan.batch_size} pictures do not divide among {parts} parts ({world} processes x {plan.passes} "
            f"passes): {padding} of {plan.batch_per_rank * parts} places count for nothing"
        )


def _what_is_equal(state: TrainState, before: dict[str, Any], old_world: int) -> str:
    """How near the weights come to those of a run that kept its processes."""
    plan, phase = state.phase_plan, state.phase
    learns = not (phase.trains_only_head or keeps_statistics(phase, plan.num_rows, plan.num_classes))
    differs = []
    if learns and plan.batchnorm_batch != before["batchnorm_batch"]:
        differs.append(
            f"BatchNorm normalises over {plan.batchnorm_batch} pictures instead of {before['batchnorm_batch']}"
        )
    at_once, then = plan.batch_per_rank * state.run.world.size, before["batch_per_rank"] * old_world
    if (phase.loss.pairwise or phase.align != "none") and at_once != then:
        differs.append(f"pictures are compared with each other among {at_once} instead of {then}")
    if plan.passes * state.run.world.size != before.get("passes", 1) * old_world and _draws(state):
        differs.append("dropout and mixed pictures are drawn anew")
    return f"the weights will differ: {', '.join(differs)}" if differs else "the weights are the same but for rounding"


def _draws(state: TrainState) -> bool:
    model, phase = state.recipe.model, state.phase
    return any((model.dropout, model.drop_path, phase.mixup, phase.cutmix, phase.loss.margin == "ada"))


def _phases(saved: Path) -> list[dict[str, Any]]:
    path = saved / "plan.json"
    try:
        found: list[dict[str, Any]] = files.read_json(path)["phases"]
        for each in found:
            _ = each["batch_per_rank"], each["batchnorm_batch"]  # both must be there
    except (KeyError, TypeError) as error:
        raise StorageError(f"{path} is no plan of facefast's: {error}") from error
    return found
