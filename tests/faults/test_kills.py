"""kill -9 at random moments: of everything, of one rank, of torchrun. The run that goes on ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from facefast.data.drawn import synthetic
from facefast.runtime import files
from tests.faults import runs
from tests.support.ranks import Ranks, start_ranks
from tests.support.scale import FULL, count

AT_ONCE = 2
"""Runs side by side: one waits for the disk while another computes."""
MOMENTS = ("starting", "training", "saving")
ONE, EVERYTHING, ONE_RANK, LAUNCHED = count(1, 12), count(1, 6), count(1, 6), count(1, 6)
"""Kills of single processes, of both ranks, of one of two, and under torchrun: 30 by `make faults`."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(4, 3, 3), pictures=5, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


def start(world: int, drawn: Path, out: Path, *more: str, seen: str = "") -> Ranks:
    out.mkdir(parents=True, exist_ok=True)
    return start_ranks(runs.rank, world, runs.flags(drawn, out, *more), str(out.with_suffix(".out")), seen)


class Straight:
    """Runs that nobody kills, by the number of their processes."""

    def __init__(self, drawn: Path, folder: Path) -> None:
        self.drawn, self.folder = drawn, folder
        self.results: dict[int, dict[str, Any]] = {}
        self.seconds: dict[int, float] = {}

    def of(self, world: int) -> dict[str, Any]:
        """What one leaves."""
        if world not in self.results:
            out, began = self.folder / str(world), time.monotonic()
            codes = start(world, self.drawn, out, seen=str(self.folder / f"seen{world}")).wait()
            assert codes == [0] * world, out.with_suffix(".out").read_text()
            self.seconds[world] = time.monotonic() - began
            self.results[world] = runs.result(out)
        return self.results[world]


@pytest.fixture(scope="module")
def straight(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(drawn, tmp_path_factory.mktemp("straight"))


def moment_comes(kind: str, out: Path, run: Any, seconds: float, chance: random.Random) -> bool:
    """Waits for a random moment of a kind; False where the run was over before."""
    if kind == "starting":
        time.sleep(chance.uniform(0, seconds / 2))
        return bool(run.running())
    if kind == "training":
        updates = chance.randrange(1, runs.STEPS)
        if not runs.wait_until(lambda: runs.lines(out) >= updates, run.running):
            return False
        time.sleep(chance.uniform(0, 0.1))
        return bool(run.running())
    updates = chance.randrange(0, runs.STEPS - 1)
    came = runs.wait_until(lambda: runs.lines(out) >= updates and runs.saving(out), run.running)
    time.sleep(chance.uniform(0, 0.03))
    return came


def check_same(out: Path, expected: dict[str, Any]) -> None:
    """The end of a run that was killed is that of one which nobody killed."""
    found, said = runs.result(out), out.with_suffix(".out").read_text()[-2000:]
    steps = [line["step"] for line in found["log"] if line["split"] == "train"]
    assert steps == list(range(1, runs.STEPS + 1)), said
    assert found == expected, said
    assert files.read_json(out / "status.json")["state"] == "done", said
    assert runs.leftovers(out) == [], said


def killed_and_resumed(world: int, ranks: tuple[int, ...], seed: int, folder: Path, straight: Straight) -> int:
    """Kills a run, and every other one once more while it goes on; lets it go on to its end; returns the kills."""
    chance, out, kills = random.Random(seed), folder / str(seed), 0
    for number in range(1 + seed % 2):
        kind = MOMENTS[(seed + number) % 3]
        run = start(world, straight.drawn, out)
        if moment_comes(kind, out, run, straight.seconds[world], chance):
            run.kill(*ranks)
            kills += 1
        codes = run.wait()  # a rank whose peer is gone ends by itself
        assert number > 0 or -signal.SIGKILL in codes or codes == [0] * world, codes
    codes = start(world, straight.drawn, out).wait()
    assert codes == [0] * world, out.with_suffix(".out").read_text()[-3000:]
    check_same(out, straight.of(world))
    return kills


def all_of(number: int, world: int, ranks: tuple[int, ...], folder: Path, straight: Straight, first: int) -> None:
    straight.of(world)
    seeds, kills = iter(range(first, first + 100 * number)), 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while kills < number:  # a run may be over before its moment has come
            batch = [next(seeds) for _ in range(min(AT_ONCE, number - kills))]
            kills += sum(pool.map(lambda seed: killed_and_resumed(world, ranks, seed, folder, straight), batch))
    print(f"{kills} kills, all of them resumed to the same bits")


def test_a_process_that_is_killed_at_any_moment_goes_on_to_the_same_bits(straight: Straight, tmp_path: Path) -> None:
    all_of(ONE, 1, (), tmp_path, straight, first=1)


def test_two_ranks_that_are_killed_together_go_on_to_the_same_bits(straight: Straight, tmp_path: Path) -> None:
    all_of(EVERYTHING, 2, (), tmp_path, straight, first=1001)


@pytest.mark.parametrize("victim", [0, 1] if FULL else [1])
def test_the_death_of_one_rank_ends_the_other_and_both_go_on_to_the_same_bits(
    straight: Straight, tmp_path: Path, victim: int
) -> None:
    all_of(max(1, ONE_RANK // 2), 2, (victim,), tmp_path, straight, first=2001 + 1000 * victim)


def launched_and_killed(seed: int, folder: Path, straight: Straight) -> None:
    """torchrun itself, one of its workers, or all of them."""
    chance, out = random.Random(seed), folder / str(seed)
    out.mkdir()
    heard = str(out.with_suffix(".out"))
    run = runs.Torchrun(runs.flags(straight.drawn, out), heard)
    updates = chance.randrange(1, runs.STEPS - 6)
    assert runs.wait_until(lambda: runs.lines(out) >= updates, run.running)
    time.sleep(chance.uniform(0, 0.1))
    workers = run.workers()
    victims = ([run.launcher.pid], workers[:1], [run.launcher.pid, *workers])[seed % 3]
    for process in victims:
        os.kill(process, signal.SIGKILL)
    run.wait()
    assert runs.lines(out) < runs.STEPS, "who was left behind went on training"
    assert runs.Torchrun(runs.flags(straight.drawn, out), heard).wait() == 0, Path(heard).read_text()[-3000:]
    check_same(out, straight.of(2))


def test_torchrun_and_its_workers_can_be_killed_as_well(straight: Straight, tmp_path: Path) -> None:
    straight.of(2)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda seed: launched_and_killed(seed, tmp_path, straight), range(LAUNCHED)))


@pytest.mark.parametrize("asked", [0, 1] if FULL else [1])
def test_a_request_to_stop_that_reaches_one_rank_alone_stops_both_after_the_same_update(
    straight: Straight, drawn: Path, tmp_path: Path, asked: int
) -> None:
    out = tmp_path / "run"
    run = start(2, drawn, out, seen=str(tmp_path / "seen"))
    assert runs.wait_until(lambda: runs.lines(out) >= 3, run.running)
    os.kill(run.processes[asked], signal.SIGTERM)
    assert run.wait(60) == [75, 75], out.with_suffix(".out").read_text()[-3000:]
    done = [len((tmp_path / f"seen.{number}").read_text().splitlines()) for number in (0, 1)]
    status = files.read_json(out / "status.json")
    assert status["state"] == "preempted" and done == [status["step"]] * 2 and status["step"] < runs.STEPS
    assert (out / "checkpoints" / "last").resolve().name == f"step-{status['step']:07d}"
    assert start(2, drawn, out).wait() == [0, 0]
    check_same(out, straight.of(2))


def test_every_step_sees_the_same_pictures_when_the_number_of_processes_changes(
    straight: Straight, drawn: Path, tmp_path: Path
) -> None:
    """Rows and pixels; two processes, one, two, killed in between."""
    out, seen = tmp_path / "run", tmp_path / "seen"
    chance = random.Random(5)
    seen.mkdir()
    for world, updates in ((2, 3), (1, 7), (2, 12)):
        run = start(world, drawn, out, seen=str(seen / str(world)))
        if updates < runs.STEPS:
            assert runs.wait_until(lambda: runs.lines(out) >= updates, run.running)  # noqa: B023
            time.sleep(chance.uniform(0, 0.05))
            run.kill()
            run.wait()
        else:
            assert run.wait() == [0, 0], out.with_suffix(".out").read_text()[-3000:]
    straight.of(1), straight.of(2)
    expected = runs.rows_by_step(straight.folder / "seen1")
    assert set(expected) == set(range(runs.STEPS)) and all(expected.values())
    assert runs.rows_by_step(straight.folder / "seen2") == expected
    parts = [runs.rows_by_step(seen / str(world)) for world in (1, 2)]
    both = {step: set().union(*(part.get(step, set()) for part in parts)) for step in range(runs.STEPS)}
    assert both == expected
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line["split"] == "train"] == list(range(1, runs.STEPS + 1))
