"""Real processes of one run, forked from a server that imports everything once.

python -m tests.support.ranks    # the server: requests on standard input, answers on standard output, a JSON line each
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import socket
import subprocess
import sys
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
    server = _server()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    request = [target.__module__, target.__name__, world, port, arguments]
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the server of ranks ended with {server.wait()}"
    codes: list[int] = json.loads(answer)
    return codes


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
        module, name, world, port, arguments = json.loads(line)
        processes = []
        for rank in range(world):
            processes.append(os.fork())
            if processes[-1] == 0:
                _enter(module, name, rank, world, port, arguments)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps(codes), file=answers, flush=True)


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
