"""Runs that go on with another number of processes: which rows every update sees, and what becomes of the weights."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from facefast import train
from facefast.data.drawn import synthetic
from facefast.models.checkpoint import read_tensors
from facefast.recipe import IndexFacts, ModelConfig, Phase, Plan, Recipe, resolve, within
from facefast.runtime.exits import RankError
from facefast.runtime.ranks import Lobby
from facefast.training.step import train_step
from tests.support.ranks import run_ranks

# So low a rate, because at a usual one a random network amplifies what fp32 rounds a thousandfold in a few updates.
USUAL = (
    "scratch",
    "--data.format=celeba",
    "--image.size=32",
    "--model.backbone=resnet18",
    "--eval.pairs=12",
    "--eval.folds=2",
    "--precision=fp32",
    "--log-every=1",
    "--pictures=0",
    "--lr=1e-5",
    "--phases.scratch.batch-size=20",
    "--phases.scratch.steps=10",
    "--phases.scratch.clip-grad=1",
    "--model.dropout=0.2",
)
STEPS = 10
Updates = dict[int, Counter[int]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(8, 0, 0), pictures=8, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


def noted(rank: int, root: str, out: str, until: int, *more: str) -> int:
    """A training that writes down what each of its updates sees, and is asked to stop after update `until`."""
    note = Path(f"{out}.rows.{rank}")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        with open(f"{out}.said", "a") as said:
            os.dup2(said.fileno(), 1)

    def stepping(state: Any, batches: Any, row_counts: Any) -> Any:
        with open(note, "a") as file:
            print(json.dumps([state.step, [batch.rows.tolist() for batch in batches]]), file=file)
        stats = train_step(state, batches, row_counts)
        state.run.stop_requested |= state.step == until < STEPS
        return stats

    vars(train)["train_step"] = stepping
    return train.main([*USUAL, f"--data.root={root}", f"--out={out}", *more])


def goes(drawn: Path, out: Path, stays: Sequence[tuple[int, int]], *more: str) -> tuple[Updates, int]:
    """The rows of every update of a run that lasts until update N with so many processes, one stay after the other; and
    the most pictures that a process held at once."""
    for world, until in stays:
        codes = run_ranks(noted, world, str(drawn), str(out), until, *more)
        assert codes == [75 if until < STEPS else 0] * world
    updates: Updates = {}
    most = 0
    for path in out.parent.glob(f"{out.name}.rows.*"):
        for line in path.read_text().splitlines():
            step, batches = json.loads(line)
            seen = updates.setdefault(step, Counter())
            seen.update(row for batch in batches for row in batch if row >= 0)
            most = max(most, *map(len, batches))
    return updates, most


class Agent:
    """A node's torchrun, in a session of its own; the first one keeps the meeting place."""

    def __init__(self, folder: Path, name: str, port: int, root: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
        command += ["--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=x"]
        # On a busy machine a node that is only slow must not count as lost.
        command += [f"--rdzv-conf=is_host={int(name == 'first')},last_call_timeout=20,keep_alive_interval=2"]
        command += [__file__, str(root), str(folder / "run")]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(folder / f"{name}.txt", "wb") as said:
            self.process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)

    def lose(self) -> None:
        """The node is gone, with all that ran on it."""
        workers = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for number in (self.process.pid, *map(int, workers)):
            os.kill(number, signal.SIGKILL)
        self.process.wait()


def test_a_node_that_is_lost_under_torchrun_leaves_a_run_that_sees_every_row_once(drawn: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first, second = (Agent(tmp_path, name, port, drawn) for name in ("first", "second"))
    try:
        end = time.monotonic() + 240
        while not (tmp_path / "run" / "checkpoints" / "step-0000004").exists():
            assert first.process.poll() is second.process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        second.lose()
        assert first.process.wait(300) == 0, (tmp_path / "first.txt").read_text()
    finally:
        for agent in (first, second):
            agent.process.terminate()
            agent.process.wait()
    told = (tmp_path / "first.txt").read_text()
    assert "goes on with 1 process instead of 2" in told
    updates: dict[int, dict[int, Counter[int]]] = {}
    for path in tmp_path.glob("run.rows.*"):
        for line in path.read_text().splitlines():
            step, batches = json.loads(line)
            seen = updates.setdefault(step, {}).setdefault(int(path.suffix[1:]), Counter())
            seen.clear()  # an update that was made again counts once
            seen.update(row for batch in batches for row in batch if row >= 0)
    # What the lost node saw of an update that was then made anew does not count.
    last = int(told.split("(step ")[1].split(" of")[0])
    found = [
        sum((part for rank, part in updates[step].items() if step < last or rank == 0), Counter[int]())
        for step in range(STEPS)
    ]
    for epoch in range(3):
        assert sorted(sum(found[3 * epoch : 3 * epoch + 3], Counter[int]()).elements()) == list(range(48))
    expected, _ = goes(drawn, tmp_path / "whole", [(2, STEPS)])
    assert found == [expected[step] for step in range(STEPS)]


def test_ranks_of_a_restart_meet_nobody_of_the_start_before() -> None:
    store = HashStore()
    before = Lobby(store, 1, 2)
    store.set("asks/1", "a process of before that nobody answered")
    first, second = Lobby(store, 0, 2), Lobby(store, 1, 2)
    name = first.attempt(1.0)
    first.answer()
    with pytest.raises(RankError, match="rank 0 has not arrived within 0.2 s"):
        before.attempt(0.2)

    def answers() -> None:
        for _ in range(300):
            first.answer()
            time.sleep(0.01)

    answering = threading.Thread(target=answers)
    answering.start()
    assert second.attempt(5.0) == name
    answering.join()
    later = Lobby(store, 0, 2)
    assert later.attempt(1.0) != name


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(out / "checkpoints" / f"step-{STEPS:07d}", "model")


def test_two_processes_then_one_then_two_end_as_two_do(drawn: Path, tmp_path: Path) -> None:
    """With dropout, BatchNorm that learns and ends of epochs that fill a batch with other pictures (48, batches of
    20)."""
    expected, most = goes(drawn, tmp_path / "whole", [(2, STEPS)])
    found, still = goes(drawn, tmp_path / "parts", [(2, 2), (1, 7), (2, STEPS)])
    assert most == still == 10
    assert found == expected and sorted(found) == list(range(STEPS))
    for epoch in range(3):
        rows = sum((found[step] for step in range(3 * epoch, 3 * epoch + 3)), Counter[int]())
        assert sorted(rows.elements()) == list(range(48))
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)
    start = read_tensors(tmp_path / "whole" / "checkpoints" / "step-0000003", "model")
    assert max(float((theirs[name] - start[name]).abs().max()) for name in theirs) > 1e-3  # it did learn


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "the weights are the same but for rounding"),
        (("--model.batchnorm=sync",), "the weights will differ: BatchNorm normalises over 10 pictures instead of 20"),
    ],
)
def test_a_run_that_goes_on_with_fewer_processes_says_what_stays_the_same(
    more: tuple[str, ...], said: str, drawn: Path, tmp_path: Path
) -> None:
    goes(drawn, tmp_path / "run", [(2, 1), (1, 2)], *more)
    told = (tmp_path / "run.said").read_text()
    assert "goes on with 1 process instead of 2: the same 20 pictures in every update, accumulate 1 -> 2, 10" in told
    assert said in told


def test_a_number_of_processes_that_does_not_divide_the_batch_sees_the_same_rows(drawn: Path, tmp_path: Path) -> None:
    """Balanced batches, which have no end of an epoch, and the recipe's own accumulation."""
    more = ("--phases.scratch.sampler=balanced", "--phases.scratch.accumulate=2")
    expected, _ = goes(drawn, tmp_path / "whole", [(2, STEPS)], *more)
    found, most = goes(drawn, tmp_path / "parts", [(2, 2), (3, 4), (1, STEPS)], *more)
    assert most == 5 and found == expected
    assert [found[step].total() for step in range(3)] == [20, 20, 10]


def plan_for(world: int, batch_size: int = 64, accumulate: int = 1, batchnorm: str = "rank") -> tuple[Recipe, Plan]:
    phase = Phase(start="scratch", batch_size=batch_size, accumulate=accumulate)
    recipe = Recipe(model=ModelConfig(batchnorm=batchnorm), phases=(phase,))  # type: ignore[arg-type]
    return recipe, resolve(recipe, (IndexFacts(80, 4, "f"),), world)


@pytest.mark.parametrize(
    ("began", "world", "passes", "per_rank"),
    [(2, 1, 2, 32), (4, 2, 2, 16), (4, 3, 2, 11), (8, 7, 2, 5), (1, 4, 1, 16), (4, 1, 4, 16), (2, 2, 1, 32)],
)
def test_a_process_never_holds_more_pictures_at_once_than_when_the_run_began(
    began: int, world: int, passes: int, per_rank: int
) -> None:
    most = plan_for(began)[1].phases[0].most_per_rank
    recipe, plan = plan_for(world)
    phase = within(plan, recipe, [most]).phases[0]
    assert (phase.passes, phase.batch_per_rank, phase.accumulate) == (passes, per_rank, passes)
    assert phase.batch_per_rank <= phase.most_per_rank == most
    assert phase.batch_per_rank * world * passes >= 64
    again = within(plan_for(began)[1], recipe, [phase.most_per_rank]).phases[0]
    assert (again.passes, again.batch_per_rank) == (1, most)  # back to what it was
    assert phase.steps == again.steps


def test_statistics_over_all_processes_are_of_one_pass() -> None:
    recipe, plan = plan_for(2, batchnorm="sync", accumulate=2)
    phase = within(plan, recipe, [8]).phases[0]
    assert (phase.accumulate, phase.passes, phase.batchnorm_batch) == (4, 2, 16)


def test_a_batch_of_fewer_pictures_than_processes_is_refused() -> None:
    with pytest.raises(
        ValueError, match="batch_size 6 is less than a picture for each of 4 processes x 2 passes; use 8"
    ):
        plan_for(4, batch_size=6, accumulate=2)


if __name__ == "__main__":  # a worker of torchrun's
    _, data, folder = sys.argv
    sys.exit(noted(int(os.environ["RANK"]), data, folder, 0, "--save-every=2"))
