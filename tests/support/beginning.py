"""What tests of how phases begin and end share: a state before its first phase or in its last, a log that only
listens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from facefast.data import FaceIndex
from facefast.data.divide import EvaluationSet, PhaseData
from facefast.models import FaceModel
from facefast.recipe import (
    DataConfig,
    ImageSpec,
    ModelConfig,
    Phase,
    Recipe,
    resolve,
)
from facefast.runtime.log import RunLog
from facefast.runtime.process import Runtime, World
from facefast.training.step import TrainState
from tests.support import small

RUN = Runtime(World(), torch.device("cpu"))
NOBODY = EvaluationSet(test=None, verification=None, pairs=None, held_out=False)
TWO = PhaseData(FaceIndex.build("people", [b"ann.jpg", b"bo.jpg"], [0, 1], ("ann", "bo")), NOBODY, NOBODY)
"""Ann and Bo, and nothing to measure on."""
SCRATCH = Phase(name="scratch", start="scratch", batch_size=4)


class Said(list[str]):
    """A log that only listens."""

    def say(self, text: str) -> None:
        self.append(text)

    @property
    def log(self) -> RunLog:
        """Itself, as a phase takes it."""
        return cast(RunLog, self)


def make_state(*phases: Phase, data: Sequence[PhaseData], source: Path | None = None, **fields: Any) -> TrainState:
    """A state at the start of a run of these phases; every picture may be bad."""
    model = ModelConfig(
        backbone="mobilefacenet", embedding=16, source=str(source) if source else "none", **fields.pop("model", {})
    )
    recipe = Recipe(
        data=DataConfig(root="people", max_bad_fraction=1.0),
        image=ImageSpec(size=small.SIZE, template="none"),
        model=model,
        phases=phases,
        precision="fp32",
        seed=7,
        **fields,
    )
    return TrainState(recipe, resolve(recipe, tuple(each.facts() for each in data), 1), RUN)


def at_end(recipe: Recipe, **found: Any) -> TrainState:
    """A state in the last phase of a run, of which only what was measured matters: fields of `TrainState`."""
    state = TrainState(recipe, resolve(recipe, len(recipe.phases) * (TWO.facts(),), 1), RUN)
    state.phase_number = len(recipe.phases) - 1
    for name, value in found.items():
        assert hasattr(state, name)
        setattr(state, name, value)
    return state


def same(one: FaceModel, other: FaceModel, part: str = "backbone.") -> bool:
    """Whether the parameters of a part are equal, bit for bit."""
    theirs = dict(other.named_parameters())
    return all(torch.equal(value, theirs[name]) for name, value in one.named_parameters() if name.startswith(part))
