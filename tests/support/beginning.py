"""What tests of how a phase begins share: a state before its first phase, and a log that only listens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from facefast.data.prepare import EvaluationSet, PhaseData
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


def same(one: FaceModel, other: FaceModel, part: str = "backbone.") -> bool:
    """Whether the parameters of a part are equal, bit for bit."""
    theirs = dict(other.named_parameters())
    return all(torch.equal(value, theirs[name]) for name, value in one.named_parameters() if name.startswith(part))
