"""One process in a cluster: where it stands, signals that ask it to stop, words between ranks, errors as exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from facefast.runtime import exits, process
from facefast.runtime.exits import DataError, NumericsError, StorageError
from facefast.runtime.process import Runtime, World
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_STEP_ID": "0",
}


def world_of(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> World:
    for name in [*TORCHRUN, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return World.from_environment()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, World(0, 1, 0, 1)),
        (TORCHRUN, World(5, 8, 1, 4)),
        (SLURM, World(5, 8, 1, 4)),
        (SLURM | TORCHRUN | {"RANK": "7"}, World(7, 8, 1, 4)),  # torchrun inside of a Slurm job
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, World(0, 1, 0, 1)),  # a plain salloc
        ({name: SLURM[name] for name in SLURM if name != "SLURM_NTASKS_PER_NODE"}, World(5, 8, 1, 2)),
        ({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}, World()),  # sbatch
    ],
)
def test_the_launchers_variables_say_where_a_process_stands(
    variables: dict[str, str], expected: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world_of(variables, monkeypatch) == expected


@pytest.mark.parametrize("wrong", [{"RANK": "8"}, {"RANK": "-1"}, {"LOCAL_RANK": "4"}])
def test_contradictory_variables_are_refused(wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="contradict each other; start with torchrun"):
        world_of(TORCHRUN | wrong, monkeypatch)


@pytest.mark.parametrize("number", process.STOP_SIGNALS)
def test_a_stop_signal_is_noted_once_the_run_has_started_and_left_alone_after_it(number: signal.Signals) -> None:
    received = []
    before = signal.signal(number, lambda *_: received.append(number))
    try:
        with process.start("cpu") as run, process.stop_on_signals(run):
            assert not run.stop_requested
            os.kill(os.getpid(), number)
            assert run.stop_requested
            assert run.agree(run.stop_requested)
        assert not received
        os.kill(os.getpid(), number)
        assert received == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set; unset RANK for one process, or start several with torchrun"),
        (TORCHRUN | {"RANK": "first"}, "RANK is 'first', which is no whole number"),
        (SLURM | {"SLURM_NTASKS": ""}, "SLURM_NTASKS is '', which is no whole number"),
    ],
)
def test_variables_that_are_missing_or_no_numbers_are_named(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message):
        world_of(variables, monkeypatch)


INSIST = """
import os, signal, sys, time
from facefast.runtime import process
process.SAME_REQUEST = 0.2
number = getattr(signal, sys.argv[1])
signal.signal(number, signal.SIG_DFL)  # a suite in the background, or under nohup, ignores some
with process.start("cpu") as run, process.stop_on_signals(run):
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # the same request by another way
    assert run.stop_requested
    time.sleep(0.3)
    os.kill(os.getpid(), number)
    print("went on")
"""


@pytest.mark.parametrize(("name", "ends"), [("SIGTERM", True), ("SIGINT", True), ("SIGHUP", True), ("SIGUSR1", False)])
def test_who_insists_on_a_stop_ends_the_process_at_once(name: str, ends: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    command = [sys.executable, "-c", INSIST, name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == (-getattr(signal, name) if ends else 0), done.stderr
    assert ("went on" in done.stdout) == (not ends)


def test_a_signal_that_was_to_be_ignored_stays_so_and_one_ahead_of_the_time_limit_is_no_insistence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "SAME_REQUEST", 0.0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with process.start("cpu") as run, process.stop_on_signals(run):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not run.stop_requested
            os.kill(os.getpid(), signal.SIGUSR1)
            assert run.stop_requested
            os.kill(os.getpid(), signal.SIGTERM)  # the first of its kind: there is time to save
            assert run.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_omp_num_threads_is_respected_unless_torchrun_made_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    before = torch.get_num_threads()
    try:
        for variables, expected in (
            ({}, 3),
            ({"OMP_NUM_THREADS": "1"}, before),
            ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 3),
            ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, before),
        ):
            torch.set_num_threads(before)
            for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
                monkeypatch.delenv(name, raising=False)
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            process._share_cores(World(0, 2, 0, 2))
            assert torch.get_num_threads() == expected, variables
    finally:
        torch.set_num_threads(before)


def test_a_run_in_another_thread_catches_no_signals_and_works() -> None:
    found: list[bool] = []

    def work() -> None:
        with process.start("cpu") as run:
            found.append(run.agree(False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def words_between_ranks(rank: int) -> int:
    """What the ranks of one run tell each other; an assertion that fails gives exit code 1."""
    with process.start("cpu") as run:
        assert run.world.rank == rank and run.is_main == (rank == 0)
        assert run.agree(rank == 2)  # one of them is enough
        assert not run.agree(False)
        assert run.broadcast(f"from rank {rank}") == "from rank 0"
        assert run.broadcast(None) is None
        assert run.allreduce_seconds(1000) > 0
        if rank == 1:
            run.stop_requested = True
        run.barrier()
        assert run.agree(run.stop_requested)
    return 10 + rank


def test_ranks_agree_when_one_of_them_wants_to_stop() -> None:
    assert run_ranks(words_between_ranks, 3) == [10, 11, 12]


def test_one_process_agrees_with_itself() -> None:
    run = Runtime(World(), torch.device("cpu"))
    assert run.agree(True) and not run.agree(False)
    assert run.broadcast("mine") == "mine"
    assert run.allreduce_seconds(1000) == 0
    assert run.transfer_seconds(1000) == 0
    run.barrier()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("usage"), 64),
        (DataError("data"), 65),
        (NumericsError("numerics"), 70),
        (StorageError("storage"), 74),
        (OSError("somebody else's"), None),
        (KeyError("ours"), None),
    ],
)
def test_every_kind_of_error_has_its_exit_code(error: Exception, code: int | None) -> None:
    assert exits.exit_code(error) == code


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TORCHRUN | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="local rank 1 has no GPU: this machine has 1; .* --nproc-per-node 1"):
        process.start("cuda").__enter__()


def test_decoding_threads_are_shared_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    assert [process.decode_threads(0, World(0, n, 0, n)) for n in (1, 2, 3, 4, 8, 64)] == [15, 15, 9, 8, 4, 1]
    assert process.decode_threads(3, World()) == 3


def test_cudnn_measures_its_algorithms_where_a_run_on_a_gpu_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for asked in (True, False):  # the next run of the same process has what it asks for
        process.set_cudnn_benchmark(Runtime(World(), torch.device("cuda")), asked)
        assert torch.backends.cudnn.benchmark is asked
    assert capsys.readouterr().out == ""
    for rank, asked in ((0, True), (1, True), (0, False)):
        process.set_cudnn_benchmark(Runtime(World(rank, 2, rank, 2), torch.device("cpu")), asked)
    assert not torch.backends.cudnn.benchmark
    assert capsys.readouterr().out.count("cudnn_benchmark has no effect without a GPU") == 1
