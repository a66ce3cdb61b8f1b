"""A node's launcher ends with the run's exit code and hands a stop to the workers, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError, run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from facefast.cluster import launch

ROOT = Path(__file__).parents[2]
WORKER = """
import os, signal, sys, time
rank, folder = int(os.environ["RANK"]), os.environ["FOLDER"]
def stop(number, frame):
    time.sleep(1)
    open(f"{folder}/saved-{rank}", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
open(f"{folder}/up-{rank}", "w").close()
if sys.argv[1] == "wait":
    time.sleep(100)
code = int(sys.argv[1 + rank])
if code == 75:
    time.sleep(100)  # it hears of the other's end later
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def started(folder: Path, torchrun: list[str], *train: str) -> subprocess.Popen[str]:
    """The launcher, whose workers are those of this test."""
    (folder / "worker_of_test_launch.py").write_text(WORKER)
    text = "import sys; from facefast.cluster import launch; launch.MODULE = 'worker_of_test_launch'; "
    text += "sys.exit(launch.main(sys.argv[1:]))"
    path = f"{folder}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-c", text, *torchrun, "--", *train],
        env=environment | {"PYTHONPATH": path, "FOLDER": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


TWO = ["--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize(("workers", "code"), [(("65", "65"), 65), (("75", "-9"), 137)])
def test_the_code_of_the_workers_is_the_launchers(workers: tuple[str, ...], code: int, tmp_path: Path) -> None:
    process = started(tmp_path, TWO, *workers)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code, said


def test_a_stop_reaches_all_workers_which_take_their_time_to_save(tmp_path: Path) -> None:
    process = started(tmp_path, TWO, "wait")
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"up-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))


def test_a_stop_while_the_other_nodes_have_not_come_ends_at_once_to_go_on(tmp_path: Path) -> None:
    torchrun = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    process = started(tmp_path, torchrun, "wait")
    status = Path(f"/proc/{process.pid}/status")
    deadline = time.monotonic() + 120
    while not caught(status):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said


def caught(status: Path) -> bool:
    """Whether a process has a handler for SIGTERM."""
    (mask,) = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    ("codes", "asked", "code"),
    [
        ((75, 75), False, 75),
        ((64, 75), False, 64),
        ((75, 70, -15), False, 70),
        ((1, 74), False, 74),
        ((1, 75), False, 1),
        ((75, -9), False, 137),
        ((-15, 75), False, 75),
        ((-15, -15), False, 143),
        ((2, 75), False, 2),
        ((), False, 1),
        ((-10, -15), True, 75),
        ((-9, 75), True, 75),
        ((74, 75), True, 74),
    ],
)
def test_one_code_stands_for_those_of_all_workers(codes: tuple[int, ...], asked: bool, code: int) -> None:
    assert launch.code_of(codes, asked) == code


def failure(*codes: int) -> ChildFailedError:
    return ChildFailedError("x", {rank: ProcessFailure(rank, 1, code, "<N/A>") for rank, code in enumerate(codes)})


@pytest.mark.parametrize("error", [RendezvousConnectionError("gone"), DistNetworkError("gone")])
def test_a_node_that_loses_the_others_goes_on_later(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(asked: object) -> None:
        raise error

    monkeypatch.setattr(run, "run", lost)
    assert launch.main(["--nnodes=2", "--", "--out", "x"]) == 75
    assert capsys.readouterr().err == "error: the other nodes cannot be reached: gone; try again\n"


def test_a_code_survives_that_the_store_goes_with_the_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(asked: object) -> None:
        try:
            raise failure(65)
        finally:
            raise RendezvousConnectionError("gone")

    monkeypatch.setattr(run, "run", lost)
    assert launch.main(["--nnodes=2", "--", "--out", "x"]) == 65


@pytest.mark.parametrize(
    ("index", "words", "settings"),
    [
        ("0", ["--rdzv-backend=c10d", "--rdzv-conf=join_timeout=9"], "join_timeout=9,is_host=true"),
        ("3", ["--rdzv-backend=c10d"], "is_host=false"),
        (None, ["--rdzv-backend=c10d"], ""),
        ("0", ["--rdzv-backend=c10d", "--rdzv-conf=is_host=false"], "is_host=false"),
        ("0", ["--master-addr=a"], ""),
    ],
)
def test_the_first_pod_keeps_the_store(
    index: str | None, words: list[str], settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    if index is not None:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    asked: list[str] = []
    monkeypatch.setattr(run, "run", lambda given: asked.append(given.rdzv_conf))
    assert launch.main([*words, "--", "--out", "x"]) == 0
    assert asked == [settings]


def test_words_are_told_apart_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--nnodes=2", "finetune"]) == 64
    assert "behind a -- of their own" in capsys.readouterr().err
    assert launch.main(["--nodes=2", "--max-restarts=many", "--", "finetune"]) == 64
