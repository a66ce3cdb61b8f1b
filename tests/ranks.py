"""Real processes of one run, forked from a server that imports everything once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

SECONDS = 300


def run_ranks(target: Callable[..., int], world: int, *arguments: Any) -> list[int | None]:
    """Exit codes of `world` processes, each of which calls target(rank, *arguments); None did not end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["facefast.train"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        context.Process(target=_enter, args=(target, rank, world, port, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _enter(target: Callable[..., int], rank: int, world: int, port: int, arguments: tuple[Any, ...]) -> None:
    variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ["LOCAL_WORLD_SIZE"] = str(max(world, os.cpu_count() or 1))  # one thread each, as in conftest
    # The same arithmetic on every machine; two processes on one GPU would be refused besides.
    os.environ.update(MASTER_ADDR="127.0.0.1", CUDA_VISIBLE_DEVICES="")
    sys.exit(target(rank, *arguments))
