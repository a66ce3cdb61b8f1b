"""Small runs that are killed, and what must be the same at their end however often that happened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from facefast import train
from facefast.runtime import manifest
from facefast.training.step import TrainState, train_step
from tests.support.ranks import ROOT

STEPS = 12
RECIPE = (
    "drawn",
    "--image.size=32",
    "--model.embedding=16",
    "--model.backbone=mobilefacenet_half",
    "--eval.pairs=12",
    "--eval.folds=2",
    "--ema=0.5",
    "--model.dropout=0.2",
    "--pictures=0",
    "--precision=fp32",
    "--phases.scratch.steps=3",
    "--phases.pretrain.steps=4",
    "--phases.finetune.steps=5",
    "--phases.scratch.batch-size=8",
    "--phases.pretrain.batch-size=8",
    "--phases.finetune.batch-size=8",
    "--log-every=1",
    "--save-every=2",
)
"""Three phases, an average, dropout, checkpoints every other step: a second of training."""
TIMING = ("images_per_second", "data_wait_fraction")
"""What two runs never have alike."""


def flags(root: Path, out: Path, *more: str) -> list[str]:
    """A training's arguments."""
    return [*RECIPE, f"--data.root={root}", f"--out={out}", *more]


def rank(number: int, arguments: Sequence[str], heard: str, seen: str = "") -> int:
    """The life of one process of a run: what it says goes to the file `heard`, what it trains on, where that is wanted,
    to `seen`, a line an update: step, then (row, hash of its pixels)."""
    # Appended, so that the lines of processes do not overwrite each other.
    output = os.open(heard, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if seen:
        _note_rows(Path(f"{seen}.{number}"))
    return train.main(list(arguments))


def _note_rows(path: Path) -> None:
    def noted(state: TrainState, batches: Any, counts: Any) -> Any:
        pictures = [
            [row, hashlib.md5(image.numpy().tobytes()).hexdigest()]
            for batch in batches
            for row, image in zip(batch.rows.tolist(), batch.images, strict=True)
            if row >= 0
        ]
        with open(path, "a") as file:
            file.write(json.dumps([state.step, pictures]) + "\n")
        return train_step(state, batches, counts)

    instead("train_step", noted)


def instead(name: str, function: Callable[..., Any]) -> None:
    """Lets the main path of this process call another function under a name."""
    setattr(train, name, function)


def rows_by_step(seen: Path) -> dict[int, set[tuple[int, str]]]:
    """What `rank` noted, of all processes: an update that was made again must have seen the same again."""
    found: dict[int, dict[str, set[tuple[int, str]]]] = {}
    for path in seen.parent.glob(f"{seen.name}.*"):
        for line in path.read_text().splitlines():
            step, pictures = json.loads(line)
            mine = {(row, pixels) for row, pixels in pictures}
            assert found.setdefault(step, {}).setdefault(path.name, mine) == mine, f"step {step} in {path.name}"
    return {step: set().union(*parts.values()) for step, parts in found.items()}


class Torchrun:
    """The same as `ranks.Ranks`, started by torchrun."""

    def __init__(self, arguments: Sequence[str], heard: str, *options: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "FACEFAST_TEST_RUN": heard}
        with open(heard, "a") as output:
            self.launcher = subprocess.Popen(
                [*command, "-m", "facefast.train", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._mark = f"FACEFAST_TEST_RUN={heard}".encode()

    def workers(self) -> list[int]:
        """Its processes that are there now, but for the launcher itself."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) != self.launcher.pid:
                with contextlib.suppress(OSError):
                    if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
        return sorted(found)

    def running(self) -> bool:
        """Whether the launcher is."""
        return self.launcher.poll() is None

    def wait(self, seconds: float = 120) -> int:
        """The launcher's exit code, once it and every worker has gone."""
        code = self.launcher.wait(seconds)
        end = time.monotonic() + seconds
        while left := self.workers():
            assert time.monotonic() < end, f"orphans: {left}"
            time.sleep(0.1)
        return code


_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def wait_until(happened: Callable[[], bool], running: Callable[[], bool], seconds: float = 120) -> bool:
    """Waits for something in a run; False where the run ended before."""
    end = time.monotonic() + seconds
    while not happened():
        if not running():
            return False
        assert time.monotonic() < end, "the run neither went on nor ended"
        time.sleep(0.001)
    return running()


def lines(out: Path) -> int:
    """Updates in the log of a run."""
    with contextlib.suppress(OSError):
        return (out / "metrics.jsonl").read_bytes().count(b'"split": "train"')
    return 0


def saving(out: Path) -> bool:
    """Whether a checkpoint is being written."""
    with contextlib.suppress(OSError):
        return any(name.startswith(".step-") for name in os.listdir(out / "checkpoints"))
    return False


def result(out: Path, step: int = STEPS) -> dict[str, Any]:
    """What a run that was done leaves and every other one like it must leave too: the content of its last checkpoint
    (weights, average, optimiser, cursor, results) and its log, but for what is time."""
    folder = out / "checkpoints" / f"step-{step:07d}"
    manifest.verify(folder)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "checkpoint": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())},
        "log": [{name: value for name, value in line.items() if name not in TIMING} for line in logged],
        "best": (out / "checkpoints" / "best").resolve().name,
    }


def leftovers(out: Path) -> list[Path]:
    """Temporary files and folders in a run folder."""
    return [path for path in out.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]
