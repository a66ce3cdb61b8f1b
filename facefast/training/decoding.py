"""Where the pictures of a run on a GPU are decoded: as its checkpoint says, as its recipe asks, or as was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from facefast.data import placement
from facefast.data.divide import PhaseData
from facefast.recipe import Decoding, Place
from facefast.runtime import files
from facefast.runtime.exits import StorageError
from facefast.runtime.terminal import tell
from facefast.training.step import TrainState


def settle_decoding(state: TrainState, saved: Path | None, datasets: Sequence[PhaseData]) -> None:
    """Writes into the plan where pictures are decoded, and lets the run's loaders do so; every rank must ask.

    The places agree but for rounding (0.01 of 255 on average), which weights would show: a run that goes on keeps the
    place that it began with, whatever the machine that it goes on with would choose.

    Args:
        saved: the checkpoint that the run goes on from.

    Raises:
        StorageError: the checkpoint's plan names no place that there is.
    """
    config = state.recipe.data
    if state.run.device.type != "cuda":
        if state.run.is_main and (config.decoding != "auto" or config.hw_decoder_load >= 0):
            tell("note: data.decoding and data.hw_decoder_load have no effect without a GPU: the processor decodes")
        return
    candidates = placement.asked_for(config.decoding, config.hw_decoder_load)
    found = _kept(saved) if saved is not None else None
    if saved is not None and found is None:  # begun on the CPU, or before there was a choice
        found = Decoding(*candidates[0], "usual")
    if found is None:
        phases = list(zip(state.recipe.phases, state.plan.phases, strict=True))
        found = placement.choose(
            placement.Job(
                index=datasets[0].train,
                image=state.recipe.image,
                augment=phases[0][0].augment,
                reading=state.reading,
                batch_size=phases[0][1].batch_per_rank,
                dtype=state.precision.dtype,
                channels_last=state.precision.channels_last,
                pictures=sum(phase.batch_size * plan.steps for phase, plan in phases),
            ),
            candidates,
            state.run,
        )
    state.plan = dataclasses.replace(state.plan, decoding=found)
    state.reading = dataclasses.replace(state.reading, decoding=found.place, hw_decoder_load=found.hw_decoder_load)


def _kept(saved: Path) -> Decoding | None:
    path = saved / "plan.json"
    try:
        found = files.read_json(path).get("decoding")
        if found is None:
            return None
        place: Place = found["place"]
        kept = Decoding(place, float(found["hw_decoder_load"]), found["why"])
        placement.check(kept)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} is no plan of facefast's: decoding: {error}") from error
    return kept
