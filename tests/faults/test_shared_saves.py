"""Two ranks write one checkpoint of what each has a part of, and one of them dies: the checkpoint before is whole, and
nobody takes a half one."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facefast.models import checkpoint, spread
from facefast.models.spread import Spread
from facefast.ops import class_block
from facefast.runtime import files, process
from tests.faults.disk import DEATHS, die_at
from tests.support.ranks import run_ranks, start_ranks
from tests.support.scale import FULL

CLASSES, DIM = 7, 4
PARTS = (9, 3)
"""Rank 0's moments of a save and rank 1's are cut into so many parts, and one of each is tried."""


def head(step: int) -> Tensor:
    """Every row has another number, and so has every step."""
    return (torch.arange(CLASSES)[:, None] + 100.0 * step).expand(CLASSES, DIM).contiguous()


def saves(rank: int, out: str, step: int, victim: int, moment: int, death: str) -> int:
    """One save, in which rank `victim` dies at a moment: about a call to the file system, or about a piece that it
    waits for or answers with."""
    spread.PIECE = 2 * DIM * 4  # two rows: four pieces of each tensor
    with process.start("cpu") as run:
        block = class_block(CLASSES, run.world.size, rank)
        part = Spread(head(step)[block.start : block.stop], CLASSES)
        tensors: dict[str, dict[str, Tensor | Spread]] = {
            name: {"head.weight": part, "rest": torch.full((50,), float(step))} for name in ("model", "ema")
        }
        documents: dict[str, Any] = {"state": {"step": step}, "recipe": {}}
        disk = die_at(moment, death, Path(out)) if rank == victim else None
        if disk is not None:
            spread.pieces, spread.here = each_counted(spread.pieces, disk.tick), counted(spread.here, disk.tick)
        with run.together(), spread.rows_of_all_ranks(run, tensors) as fetch:
            if run.is_main:
                checkpoint.save(Path(out), step, tensors=tensors, documents=documents, best=False, keep=2, fetch=fetch)
        number = 0 if disk is None else disk.moments
    if disk is not None:
        Path(out, "moments").write_text(f"{number}")
    return 0


def each_counted(function: Callable[..., Iterator[Any]], tick: Callable[[], None]) -> Callable[..., Iterator[Any]]:
    def call(*arguments: Any) -> Iterator[Any]:
        for each in function(*arguments):
            tick()
            yield each

    return call


def counted(function: Callable[..., Any], tick: Callable[[], None]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        tick()
        return function(*arguments)

    return call


def step_of(folder: Path) -> int:
    """The step of the newest checkpoint, all of which is of that step."""
    path = checkpoint.newest(folder)
    assert path is not None
    step: int = files.read_json(path / "state.json")["step"]
    for stem in ("model", "ema"):
        found = checkpoint.read_tensors(path, stem)
        assert torch.equal(found["head.weight"], head(step)) and set(found["rest"].tolist()) == {step}, folder.name
    return step


def moments(first: Path, victim: int) -> list[int]:
    """Some of those of a save in which nobody dies, over all its length."""
    folder = first.with_name(f"all-{victim}")
    shutil.copytree(first, folder, symlinks=True)
    assert run_ranks(saves, 2, str(folder), 4, victim, 10**6, "killed") == [0, 0]
    assert step_of(folder) == 4
    whole, some = int((folder / "moments").read_text()), PARTS[victim]
    assert whole > some
    if FULL:
        return list(range(1, whole + 1))
    draw = random.Random(victim)
    return [draw.randint(1 + whole * k // some, whole * (k + 1) // some) for k in range(some)]


def test_whenever_a_rank_dies_in_a_save_of_both_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    first = tmp_path / "run"
    first.mkdir()
    assert run_ranks(saves, 2, str(first), 2, -1, 0, "killed") == [0, 0]
    assert step_of(first) == 2
    deaths = [(victim, moment) for victim in (0, 1) for moment in moments(first, victim)]
    tries = []
    for victim, moment in deaths:
        # Where rank 1 dies alone, the machine that holds the files goes on.
        kinds = ("killed",) if victim else DEATHS if FULL else DEATHS[moment % len(DEATHS) :][:1]
        tries += [(victim, moment, death) for death in kinds]
    left = {0: [0, 0], 1: [0, 0]}
    for wave in (tries[k : k + 6] for k in range(0, len(tries), 6)):
        started = []
        for victim, moment, death in wave:
            folder = tmp_path / f"{victim}-{moment}-{death}"
            shutil.copytree(first, folder, symlinks=True)
            started.append((victim, folder, start_ranks(saves, 2, str(folder), 4, victim, moment, death)))
        for victim, folder, ranks in started:
            codes = ranks.wait()
            assert codes[victim] == -signal.SIGKILL and codes[1 - victim] > 0, codes  # nobody waits for the dead
            step = step_of(folder)
            assert step in ((2, 4) if victim == 0 else (2,)), folder.name
            left[victim][step == 4] += 1
            checkpoint.save(folder, 8, tensors={"model": {}}, documents={}, best=False, keep=1)
            assert {each.name for each in (folder / checkpoint.FOLDER).iterdir()} == {"last", "step-0000008"}
    assert left[0][0] and left[0][1] and left[1][0]
    print("old and new checkpoints left, by the rank that died:", left)
