"""Numbers that are not finite on one of two ranks: no rank applies the update, all stay alike, a run that has no sound
update any more ends with 70 and its last sound checkpoint. (One process: tests/training/test_guard.py.)"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facefast import train
from facefast.data.drawn import synthetic
from facefast.models import checkpoint
from facefast.runtime import files, manifest
from facefast.runtime.log import LOST_UPDATES
from facefast.training.guard import not_finite
from facefast.training.step import TrainState, train_step
from tests.faults import runs
from tests.support.ranks import start_ranks
from tests.support.scale import FULL

AT, VICTIM = 5, 1
"""The update that goes wrong, and the rank on which it does."""
CASES = list(itertools.product(("picture", "loss", "gradient"), (math.nan, math.inf)))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(4, 3, 3), pictures=5, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


def digest(state: TrainState) -> str:
    """Of everything that an update moves and that must be alike on all ranks."""
    found = hashlib.sha256()
    parts = [*state.model.named_parameters(), *sorted(checkpoint.pack_optimizer(state.optimizer)[0].items())]
    for name, tensor in parts:
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def rank(
    number: int, arguments: list[str], heard: str, noted: str, where: str, value: str, first: int, last: int
) -> int:
    """The life of a rank on which the updates from `first` to `last` go wrong at one place, if it is the victim; each
    update's digest before and after it goes to a file."""

    def spoilt(state: TrainState, batches: list[Any], counts: Any) -> Tensor:
        wrong = number == VICTIM and first <= state.step <= last
        before, hooks = digest(state), []
        if wrong and where == "picture":
            batches[0].images[0, 0, 0, 0] = float(value)
        if wrong and where == "gradient":
            # Before DDP adds it to the others'.
            weight = next(parameter for parameter in state.model.parameters() if parameter.requires_grad)
            hooks.append(weight.register_hook(lambda gradient: gradient * float(value)))
        if wrong and where == "loss":
            hooks.append(
                state.objective.register_forward_hook(
                    lambda module, inputs, terms: terms._replace(total=terms.total * float(value))
                )
            )
        stats = train_step(state, batches, counts)
        for hook in hooks:
            hook.remove()
        with open(f"{noted}.{number}", "a") as file:
            file.write(json.dumps([before, digest(state), float(stats[3])]) + "\n")
        return stats

    runs.instead("train_step", spoilt)
    return runs.rank(number, arguments, heard)


def spoilt_run(drawn: Path, out: Path, steps: int, *arguments: Any) -> tuple[list[int], list[list[Any]]]:
    """Exit codes, and for every update what each rank noted."""
    flags = runs.flags(drawn, out, "--save-every=1", f"--phases.finetune.steps={steps}")
    noted = out.with_name("noted")
    codes = start_ranks(rank, 2, flags, str(out.with_suffix(".out")), str(noted), *arguments).wait()
    lines = [(out.with_name(f"noted.{number}")).read_text().splitlines() for number in (0, 1)]
    return codes, [[json.loads(one), json.loads(other)] for one, other in zip(*lines, strict=True)]


@pytest.mark.parametrize(("where", "value"), CASES if FULL else CASES[2::3])
def test_what_is_not_finite_on_one_rank_is_applied_on_none(
    drawn: Path, tmp_path: Path, where: str, value: float
) -> None:
    codes, updates = spoilt_run(drawn, tmp_path / "run", 3, where, str(value), AT, AT)
    assert codes == [0, 0], (tmp_path / "run.out").read_text()[-3000:]
    assert len(updates) == 10
    for number, (one, other) in enumerate(updates):
        assert one == other, f"the ranks differ in update {number}"
        before, after, skipped = one
        assert (before == after) == (number == AT) == bool(skipped), number
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line.get("skipped_steps")] == [AT + 1]


def test_a_run_of_two_ranks_that_is_lost_ends_with_70_and_its_last_sound_checkpoint(
    drawn: Path, tmp_path: Path
) -> None:
    first, run = 10, tmp_path / "run"
    codes, updates = spoilt_run(drawn, run, 2 * LOST_UPDATES, "gradient", "nan", first, 10**6)
    assert codes == [70, 70], (tmp_path / "run.out").read_text()[-3000:]
    assert len(updates) == first + LOST_UPDATES
    assert all(one == other and one[0] == one[1] for one, other in updates[first:])
    status = files.read_json(run / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 70)
    assert f"the last {LOST_UPDATES} updates" in status["error"]
    newest = checkpoint.newest(run)
    assert newest is not None
    manifest.verify(newest)
    tensors = {file.stem: checkpoint.read_tensors(file.parent, file.stem) for file in newest.glob("*.safetensors")}
    assert set(tensors) == {"model", "optimizer", "ema"} and not_finite(tensors) == []
    assert torch.cat([tensor.flatten() for tensor in tensors["model"].values()]).abs().max() < 1e3


@pytest.mark.parametrize("what", ["model", "optimizer", "ema"])
def test_no_checkpoint_is_written_of_a_state_that_is_not_finite(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    def overflowing(state: TrainState, batches: list[Any], counts: Any) -> Tensor:
        stats = train_step(state, batches, counts)
        if state.step == AT:
            held = [tensor for tensor in state.tensors()[what].values() if isinstance(tensor, Tensor)]
            floats = [tensor for tensor in held if tensor.is_floating_point()]
            floats[-1].view(-1)[0] = math.inf
        return stats

    monkeypatch.setattr(train, "train_step", overflowing)
    assert train.main(runs.flags(drawn, tmp_path, "--save-every=1")) == 70
    assert f"after step {AT} of phase pretrain the run holds numbers that are not finite ({what} " in (
        capsys.readouterr().err
    )
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == f"step-{AT - 1:07d}"
