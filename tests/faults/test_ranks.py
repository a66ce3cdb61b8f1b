"""Whole runs under torchrun that are stopped or killed: nothing is lost, and no process stays behind.

FACEFAST_FAULTS=full (`make faults`) tries many kills; without it each kind is tried once.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from facefast.data.drawn import synthetic
from facefast.runtime import files

FULL = os.environ.get("FACEFAST_FAULTS") == "full"
KILLS = 20 if FULL else 2
LATEST = 12.0
"""Seconds after which a run of `STEPS` updates is under way on a slow machine."""
STEPS = 14
TOKEN = "FACEFAST_TEST_TOKEN"
TINY = (
    "scratch",
    "--data.format=celeba",
    "--image.size=32",
    "--model.backbone=mobilefacenet_half",
    "--eval.pairs=12",
    "--eval.folds=2",
    "--batch-size=8",
    "--precision=fp32",
    "--log-every=1",
    "--save-every=5",
    "--pictures=0",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(4, 3, 3), pictures=5, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


class Launched:
    """torchrun with two ranks, in a session of its own."""

    def __init__(self, drawn: Path, out: Path, *more: str, steps: int = STEPS) -> None:
        self.out, self.token = out, uuid.uuid4().hex
        out.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE"))}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", TOKEN: self.token}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "facefast.train", *TINY, f"--phases.scratch.steps={steps}"]
        command += [f"--data.root={drawn}", f"--out={out}", *more]
        self.said = out.parent / f"{out.name}.{self.token}.txt"
        with open(self.said, "wb") as said:
            self.torchrun = subprocess.Popen(
                command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )

    def processes(self) -> dict[int, str]:
        """Those of this run that live: number and command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{TOKEN}={self.token}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for process in self.processes():
            with contextlib.suppress(OSError):
                if f"RANK={number}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
                    return process
        raise AssertionError(f"rank {number} does not run")

    def wait_for_step(self, step: int) -> None:
        """Until so many updates are in the log."""
        log = self.out / "metrics.jsonl"
        while not log.exists() or log.read_text().count('"train"') < step:
            assert self.torchrun.poll() is None, self.text()
            time.sleep(0.02)

    def wait_for_failure(self) -> dict[str, Any]:
        """status.json, once it says that the run has failed."""
        while (status := files.read_json(self.out / "status.json"))["state"] != "failed":
            assert self.processes(), self.text()
            time.sleep(0.1)
        return dict(status)

    def wait_until_alone(self, seconds: float) -> dict[int, str]:
        """The processes that are still there after so many seconds; they are then killed."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            self.torchrun.poll()
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.torchrun.wait()
        return left

    def text(self) -> str:
        """What all of them said."""
        return self.said.read_text(errors="replace")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "checkpoints" / "last" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Launched(drawn, tmp_path_factory.mktemp("runs") / "straight")
    assert run.torchrun.wait() == 0, run.text()
    return run.out


def to_torchrun(run: Launched) -> None:
    run.torchrun.send_signal(signal.SIGINT)


def to_one_rank(run: Launched) -> None:
    os.kill(run.rank(1), signal.SIGINT)


def hang_up(run: Launched) -> None:
    run.torchrun.send_signal(signal.SIGHUP)


def to_everybody(run: Launched) -> None:
    for process in run.processes():  # Ctrl-C in a terminal reaches torchrun, which hands it on to its workers besides
        os.kill(process, signal.SIGINT)


@pytest.mark.parametrize("stop", [to_torchrun, to_one_rank, hang_up, to_everybody] if FULL else [to_torchrun])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_bits(
    drawn: Path, straight: Path, tmp_path: Path, stop: Callable[[Launched], None]
) -> None:
    run = Launched(drawn, tmp_path / "run")
    run.wait_for_step(7)
    stop(run)
    assert not run.wait_until_alone(60)
    status = files.read_json(run.out / "status.json")
    assert (status["state"], status["exit_code"]) == ("preempted", 75), run.text()
    assert 7 <= status["step"] < STEPS
    again = Launched(drawn, tmp_path / "run")
    assert again.torchrun.wait() == 0, again.text()
    one, two = weights(straight), weights(again.out)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("number", range(KILLS))
def test_no_process_stays_behind_when_torchrun_is_killed(drawn: Path, tmp_path: Path, number: int) -> None:
    run = Launched(drawn, tmp_path / "run", steps=100_000)
    # The first half while workers start and import, the others at any moment.
    if number < KILLS / 2:
        while len(run.processes()) < 3:
            time.sleep(0.005)
        time.sleep(random.Random(number).uniform(0, 1.5))
    else:
        time.sleep(random.Random(number).uniform(0, LATEST))
    run.torchrun.kill()
    assert not run.wait_until_alone(75), run.text()


@pytest.mark.parametrize("number", (1, 0) if FULL else (1,))
def test_a_rank_that_no_longer_answers_ends_the_run_by_its_name(drawn: Path, tmp_path: Path, number: int) -> None:
    run = Launched(drawn, tmp_path / "run", "--rank-timeout=8", steps=100_000)
    run.wait_for_step(6)
    victim = run.rank(number)
    os.kill(victim, signal.SIGSTOP)
    status = run.wait_for_failure()
    if not FULL:  # torchrun gives a worker that does not answer 30 seconds before it does this
        os.kill(victim, signal.SIGKILL)
    assert not run.wait_until_alone(60), run.text()
    assert (status["state"], status["exit_code"]) == ("failed", 75)
    assert f"rank {number} (host" in status["error"]
    assert f"process {victim}) has not answered for 8 s" in status["error"]
    assert (run.out / "checkpoints" / "last").exists()
