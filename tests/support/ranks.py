"""Real processes of one run, forked from a server that imports everything once.

python -m tests.support.ranks    # the server: requests on standard input, answers on standard output, a JSON line each
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_ranks(target: Callable[..., int], world: int, *arguments: Any) -> list[int]:
    """Exit codes of `world` processes, each of which calls target(rank, *arguments); minus a signal's number where that
    ended one.

    Args:
        target: a function of a test module.
        arguments: JSON values.
    """
    return start_ranks(target, world, *arguments).wait()


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Processes that run, by rank."""

    processes: list[int]

    def codes(self) -> list[int | None]:
        """Exit codes so far, None of a process that runs."""
        return list(_ask({"codes": self.processes}))

    def running(self) -> bool:
        """Whether one of them does."""
        return None in self.codes()

    def kill(self, *ranks: int) -> None:
        """SIGKILL to these, or to all; no process that has ended is meant, its number is kept until `wait`."""
        for process in [self.processes[rank] for rank in ranks] or self.processes:
            os.kill(process, signal.SIGKILL)

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes once all have ended; to be called once. Those that run on for too long are killed, which fails."""
        self.wait_for(*range(len(self.processes)), seconds=seconds)
        return list(_ask({"reap": self.processes}))

    def wait_for(self, *ranks: int, seconds: float = 300) -> list[int]:
        """Exit codes of these once they have ended; others may run on. After too long all are killed, which fails."""
        end = time.monotonic() + seconds
        while True:
            found = self.codes()
            ended = [code for rank in ranks if (code := found[rank]) is not None]
            if len(ended) == len(ranks):
                return ended
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"after {seconds} s the ranks have ended with {found}; None runs")
            time.sleep(0.02)


def start_ranks(target: Callable[..., int], world: int, *arguments: Any) -> Ranks:
    """As `run_ranks`, without waiting for their end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return Ranks(_ask({"start": [target.__module__, target.__name__, world, port, arguments]}))


_asking = threading.Lock()


def _ask(request: dict[str, Any]) -> Any:
    with _asking:
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server of ranks ended with {server.wait()}"
        return json.loads(answer)


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", __name__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # it ends with its input
    return server


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a rank prints is no answer
    importlib.import_module("facefast.train")
    for line in sys.stdin:
        ((word, what),) = json.loads(line).items()
        print(json.dumps(_start(*what) if word == "start" else _look(what, word)), file=answers, flush=True)


def _start(module: str, name: str, world: int, port: int, arguments: list[Any]) -> list[int]:
    processes = []
    for rank in range(world):
        processes.append(os.fork())
        if processes[-1] == 0:
            _enter(module, name, rank, world, port, arguments)
    return processes


def _look(processes: list[int], word: str) -> list[int | None]:
    """Exit codes; a process that ended is kept, so that its number stays its own, until it is reaped."""
    found: list[int | None] = []
    for process in processes:
        flags = os.WEXITED | os.WNOHANG | (0 if word == "reap" else os.WNOWAIT)
        end = os.waitid(os.P_PID, process, flags)
        if end is None:
            found.append(None)
        else:
            found.append(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status)
    return found


def _enter(module: str, name: str, rank: int, world: int, port: int, arguments: list[Any]) -> None:
    """The life of one rank; it never comes back."""
    code = 1
    try:
        variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in variables.items()})
        os.environ["LOCAL_WORLD_SIZE"] = str(max(world, os.cpu_count() or 1))  # one thread each, as in conftest
        # The same arithmetic on every machine; two processes on one GPU would be refused besides.
        os.environ.update(MASTER_ADDR="127.0.0.1", CUDA_VISIBLE_DEVICES="")
        code = getattr(importlib.import_module(module), name)(rank, *arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
