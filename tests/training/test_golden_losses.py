"""A curve of thirty losses that stays as it is: augmentation, samplers, losses, optimisers and schedules at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tests.training.golden import COMMAND, FILE, FIRST, losses

TOLERANCE = 5e-4
"""Of each loss, relative. Arithmetic by AVX-512, AVX2 or SSE (of ATen, oneDNN and MKL, together and each alone) and two
threads instead of one moved no loss by more than 0.8e-4; a learning rate, margin or scale that is one percent off moves
some by 50e-4 or more."""


def apart(found: list[float], expected: list[float]) -> list[int]:
    """The steps, from 1, whose losses differ."""
    return [
        step
        for step, (one, other) in enumerate(zip(found, expected, strict=True), start=1)
        if abs(one - other) > TOLERANCE * other
    ]


def test_the_losses_of_thirty_steps_are_those_that_were_written_down(tmp_path: Path) -> None:
    expected, found = json.loads(FILE.read_text(encoding="utf-8")), losses(tmp_path)
    steps = apart(found, expected)
    table = "\n".join(f"  step {step}: {found[step - 1]:.6f}, was {expected[step - 1]:.6f}" for step in steps)
    assert not steps, (
        f"training does not compute what it did:\n{table}\nIf that is what you wanted, write the losses down anew with "
        f"`{COMMAND}` and say in the commit what changed them"
    )


def test_a_learning_rate_that_is_one_percent_off_would_be_seen(tmp_path: Path) -> None:
    expected = json.loads(FILE.read_text(encoding="utf-8"))[: FIRST.steps]
    found = losses(tmp_path, (dataclasses.replace(FIRST, lr=1.01 * FIRST.lr),))
    assert apart(found, expected)
