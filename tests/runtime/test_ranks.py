"""The ranks of a run: how they find each other and compare, and that one which ends, stops or hangs is named."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from facefast.runtime import exits, process, ranks
from facefast.runtime.exits import DataError
from facefast.runtime.process import Runtime
from tests.support.ranks import run_ranks, start_ranks

LIMIT = 2.0
ME = r"rank {} \(host \S+, process \d+\)"


def reason(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.txt").read_text()


def life(rank: int, folder: str, work: Callable[[Runtime], None], limit: float = LIMIT) -> int:
    """One rank as a command has it: its exit code, and the reason in a file of its own."""

    def note(code: int, text: str) -> None:
        Path(folder, f"{rank}.txt").write_text(text)

    with exits.exit_codes(note) as outcome, process.start("cpu", limit, note) as run:
        work(run)
    return outcome.code


# Ranks that differ.


def another_seed(rank: int, folder: str) -> int:
    return life(rank, folder, lambda run: run.require_same({"seed": 3 * (rank == 1), "phases": [{"lr": 0.1}]}))


def another_index(rank: int, folder: str) -> int:
    return life(rank, folder, lambda run: run.require_same({"index.npz": "ab"[rank % 2]}, DataError))


def another_world(rank: int, folder: str) -> int:
    os.environ["WORLD_SIZE"] = "23"[rank]
    return life(rank, folder, Runtime.barrier)


def another_installation(rank: int, folder: str) -> int:
    found = ranks.installed() | ({"digest of facefast's source files": "0"} if rank == 1 else {})
    ranks.installed = lambda: found  # type: ignore[assignment]
    return life(rank, folder, Runtime.barrier)


@pytest.mark.parametrize(
    ("target", "world", "code", "message"),
    [
        (another_seed, 3, 64, rf"seed is 3 on {ME.format(1)}, 0 on {ME.format(0)}"),
        (another_index, 2, 65, rf"index.npz is 'b' on {ME.format(1)}, 'a' on {ME.format(0)}"),
        (another_world, 2, 64, rf"number of processes is 3 on {ME.format(1)}, 2 on {ME.format(0)}"),
        (another_installation, 2, 64, rf"source files is '0' on {ME.format(1)}, '[0-9a-f]+' on {ME.format(0)}"),
    ],
)
def test_a_rank_that_differs_ends_all_of_them_and_each_names_it_with_both_values(
    tmp_path: Path, target: Callable[[int, str], int], world: int, code: int, message: str
) -> None:
    assert run_ranks(target, world, str(tmp_path)) == [code] * world
    for rank in range(world):
        assert re.search(message, reason(tmp_path, rank)), reason(tmp_path, rank)


def alike(rank: int, folder: str) -> int:
    return life(rank, folder, lambda run: run.require_same({"seed": 1, "phases": [{"lr": 0.1}]}))


def test_ranks_that_are_alike_go_on(tmp_path: Path) -> None:
    assert run_ranks(alike, 2, str(tmp_path)) == [0, 0]


def test_a_change_of_any_source_file_changes_what_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    for text in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "runtime").mkdir(exist_ok=True)
        (tmp_path / "runtime" / "x.py").write_text(text)
        monkeypatch.setattr(ranks, "__file__", str(tmp_path / "runtime" / "ranks.py"))
        found.append(ranks.installed.__wrapped__()["digest of facefast's source files"])
    assert found[0] == found[2] != found[1]


def twice_the_same(rank: int, folder: str) -> int:
    ranks.LEAST_PATIENCE = 3.0
    os.environ["RANK"] = "011"[rank]
    time.sleep(0.5 * rank)  # the third comes last
    return life(10 + rank, folder, Runtime.barrier)


def test_two_processes_of_one_rank_and_a_rank_that_never_comes_are_named(tmp_path: Path) -> None:
    assert run_ranks(twice_the_same, 3, str(tmp_path))[2] == 64
    assert "two processes say that they are rank 1" in reason(tmp_path, 12)
    assert "rank 2 of 3 has not arrived within 3 s" in reason(tmp_path, 10)


# Ranks that end, stop or hang.


def stops(rank: int, folder: str, who: int) -> int:
    def work(run: Runtime) -> None:
        if rank == who:
            os.kill(os.getpid(), signal.SIGSTOP)
        run.barrier()

    return life(rank, folder, work)


@pytest.mark.parametrize("who", [1, 0])
def test_a_rank_that_was_stopped_is_named_and_the_others_end_with_75(tmp_path: Path, who: int) -> None:
    run = start_ranks(stops, 2, str(tmp_path), who)
    other = 1 - who
    assert run.wait_for(other) == [75]
    assert run.codes()[who] is None
    assert re.match(rf"{ME.format(who)} has not answered for 2 s; the same command goes on", reason(tmp_path, other))
    run.kill(who)
    assert run.wait()[who] == -signal.SIGKILL


def hangs(rank: int, folder: str, who: int) -> int:
    def work(run: Runtime) -> None:
        if rank == who:
            threading.Event().wait(600)  # as one that waits for a disk
        run.barrier()

    return life(rank, folder, work)


@pytest.mark.parametrize("who", [1, 0])
def test_a_rank_that_hangs_is_named_with_the_place_where_it_waits_and_all_end(tmp_path: Path, who: int) -> None:
    assert run_ranks(hangs, 2, str(tmp_path), who) == [75, 75]
    for rank in (0, 1):
        said = reason(tmp_path, rank)
        assert re.search(rf"{ME.format(who)} has not gone on for 2 s: it waits in wait .* < work \(runtime", said) or (
            rank != who and re.search(rf"{ME.format(who)} (is gone|ended)", said)  # it saw the end, not the verdict
        ), said


def works_alone(rank: int, folder: str, who: int, how: str) -> int:
    def work(run: Runtime) -> None:
        if rank == who:
            until = time.monotonic() + 3 * LIMIT
            while how == "itself" and time.monotonic() < until:
                sum(range(10000))
                time.sleep(0.01)
            if how == "a child":
                loop = f"import time; end = time.time() + {3 * LIMIT}\nwhile time.time() < end: pass"
                subprocess.run(["python3", "-c", loop], check=True)
        run.barrier()

    return life(rank, folder, work)


@pytest.mark.parametrize(("who", "how"), [(0, "itself"), (1, "itself"), (0, "a child")])
def test_a_rank_that_works_alone_for_long_is_waited_for(tmp_path: Path, who: int, how: str) -> None:
    assert run_ranks(works_alone, 2, str(tmp_path), who, how) == [0, 0]


def leaves(rank: int, folder: str, who: int) -> int:
    def work(run: Runtime) -> None:
        run.barrier()
        until = time.monotonic() + 2 * LIMIT
        while rank != who and time.monotonic() < until:
            sum(range(10000))

    return life(rank, folder, work)


@pytest.mark.parametrize("who", [1, 0])
def test_a_rank_that_has_finished_is_not_missed(tmp_path: Path, who: int) -> None:
    assert run_ranks(leaves, 2, str(tmp_path), who) == [0, 0]


def suspended(rank: int, folder: str) -> int:
    def work(run: Runtime) -> None:
        assert run.ranks is not None
        both = " ".join(str(each.process) for each in run.ranks.all)
        if rank == 0:
            script = f"sleep 0.5; kill -STOP {both}; sleep {2 * LIMIT}; kill -CONT {both}"
            subprocess.Popen(["sh", "-c", script], start_new_session=True)
        run.barrier()
        until = time.monotonic() + 3 * LIMIT
        while time.monotonic() < until:
            sum(range(10000))
            time.sleep(0.01)
        run.barrier()

    return life(rank, folder, work)


def test_a_job_that_was_suspended_as_a_whole_goes_on_afterwards(tmp_path: Path) -> None:
    assert run_ranks(suspended, 2, str(tmp_path)) == [0, 0]


def fails(rank: int, folder: str, who: int) -> int:
    ranks.FAREWELL = 600.0  # whoever waits for the one that failed learns of it from the store, not from its end
    os.dup2(os.open(f"{folder}/{rank}.err", os.O_CREAT | os.O_WRONLY), 2)

    def work(run: Runtime) -> None:
        if rank == who:
            raise DataError("too many bad files, the first is \x1b[2J.jpg")
        run.barrier()

    return life(rank, folder, work)


@pytest.mark.parametrize("who", [1, 0])
def test_ranks_end_with_the_code_of_the_one_that_failed_and_name_it(tmp_path: Path, who: int) -> None:
    assert run_ranks(fails, 2, str(tmp_path), who) == [65, 65]
    assert re.fullmatch(rf"{ME.format(who)} ended: too many bad files.*", reason(tmp_path, 1 - who))
    for rank in (0, 1):
        assert r"the first is \x1b[2J.jpg" in (tmp_path / f"{rank}.err").read_text()


def fails_and_stays(rank: int, folder: str) -> int:
    def work(run: Runtime) -> None:
        if rank == 1:
            raise DataError("too many bad files")
        try:
            run.barrier()
        finally:
            Path(folder, "completed").touch()

    stays = 2 * LIMIT if rank == 1 else 0.0
    with exits.exit_codes(lambda code, text: time.sleep(stays)) as outcome, process.start("cpu", LIMIT) as run:
        work(run)
    return outcome.code


def test_rank_0_completes_its_files_where_another_has_failed_and_stays(tmp_path: Path) -> None:
    assert run_ranks(fails_and_stays, 2, str(tmp_path)) == [65, 65]
    assert (tmp_path / "completed").exists()


def fails_unheard(rank: int, folder: str) -> int:
    ranks.FAREWELL = LIMIT  # the other works for longer

    def work(run: Runtime) -> None:
        if rank == 0:
            raise DataError("too many bad files")
        until = time.monotonic() + 3 * LIMIT
        while time.monotonic() < until:
            sum(range(10000))
        run.barrier()

    return life(rank, folder, work)


def test_what_was_heard_of_a_failure_is_said_although_the_store_is_gone(tmp_path: Path) -> None:
    assert run_ranks(fails_unheard, 2, str(tmp_path)) == [65, 65]
    assert re.fullmatch(rf"{ME.format(0)} ended: too many bad files", reason(tmp_path, 1))


def interrupted(rank: int, folder: str) -> int:
    def work(run: Runtime) -> None:
        if rank == 0:
            raise KeyboardInterrupt
        run.barrier()

    return life(rank, folder, work)


def test_ctrl_c_on_rank_0_is_no_bug_of_the_others(tmp_path: Path) -> None:
    assert run_ranks(interrupted, 2, str(tmp_path)) == [130, 130]


def dies(rank: int, folder: str, who: int) -> int:
    def work(run: Runtime) -> None:
        run.barrier()
        if rank == who:
            os.kill(os.getpid(), signal.SIGKILL)
        run.barrier()

    return life(rank, folder, work)


@pytest.mark.parametrize("who", [1, 0])
def test_a_rank_that_was_killed_is_named_and_that_is_no_bug_of_the_others(tmp_path: Path, who: int) -> None:
    codes = run_ranks(dies, 2, str(tmp_path), who)
    assert codes[who] == -signal.SIGKILL and codes[1 - who] == 75
    assert re.match(rf"{ME.format(who)} is gone", reason(tmp_path, 1 - who))


def test_errors_of_ones_own_are_no_lost_connections() -> None:
    mine = object.__new__(ranks.Ranks)
    assert mine.explain(ValueError("Connection closed by peer")) is None
    assert mine.explain(RuntimeError("shapes do not match")) is None
