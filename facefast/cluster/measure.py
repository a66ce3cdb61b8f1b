"""What one rank sees of its machine and of the others, as JSON values: no judgment is made here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import platform
import random
import resource
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from facefast.recipe import is_remote
from facefast.runtime import files, process, ranks
from facefast.runtime.cores import usable_cores
from facefast.runtime.process import Runtime, World

SHM = Path("/dev/shm")
BLOCK = 16 << 10
"""Bytes of a read from a file that holds many photographs."""
READERS = 8
"""Threads that read at once, as decoders do."""
PATIENCE = 3.0
"""Seconds until a file system shows a file that another machine has made."""
ROUNDS = 8
"""Questions for the time; the quickest answer counts."""


class Effort(NamedTuple):
    """How much is measured."""

    files: int
    seconds: float
    """Greatest time for looking for files, and again for reading them."""
    written: int
    """Bytes."""
    reduced: int
    """Numbers in an all-reduce."""


FULL, QUICK = Effort(600, 2.0, 16 << 20, 4 << 20), Effort(150, 0.5, 8 << 20, 1 << 18)


def machine(world: World, root: str, out: Path | None, effort: Effort, met: bool = False) -> dict[str, Any]:
    """Facts that need no other rank.

    Args:
        root: of the photographs; "" where they are not to be read, as those of an object store are not.
        out: the run folder, which may not exist yet.
        met: whether the ranks have met already, and so have their port.
    """
    return {
        "rank": world.rank,
        "host": socket.gethostname(),
        "size": world.size,
        "local_size": world.local_size,
        "port": port(world, met),
        "versions": versions(),
        "gpus": gpus(),
        "driver": driver(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm": room(SHM),
        "address": address(),
        "interface": {name: os.environ[name] for name in INTERFACES if os.environ.get(name)},
        "master": os.environ.get("MASTER_ADDR", ""),
        "data": None if not root or is_remote(root) else reading(root, world, effort),
        "out": None if out is None else writing(out, effort.written),
    }


INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def versions() -> dict[str, str]:
    """All that must be alike on all ranks."""
    found = {"version of Python": platform.python_version(), "version of CUDA": str(torch.version.cuda)}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["version of torchvision"] = importlib.metadata.version("torchvision")
    return {**ranks.installed(), **found}


def gpus() -> list[str]:
    """Names of the GPUs that torch can use."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def driver() -> str:
    """The version of NVIDIA's driver; "" where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(words, capture_output=True, text=True, timeout=20)
        if said.returncode == 0 and said.stdout.strip():
            return said.stdout.split()[0]
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        return next((word for word in text.split() if word[:1].isdigit() and "." in word), "")
    return ""


def room(folder: Path) -> dict[str, int] | None:
    """Bytes of a file system, and free ones; None where there is none."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return {"size": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def address() -> str:
    """What this host's name means, which is what others are told to connect to; "" where it means nothing."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except OSError:
        return ""


def port(world: World, met: bool) -> dict[str, Any]:
    """The port where the ranks meet: whether this run has it already (`kept`), whether it was `asked` for, and why it
    cannot be had."""
    found: dict[str, Any] = {"number": process.store_port(), "problem": ""}
    found["asked"] = world.size > 1 or "MASTER_PORT" in os.environ
    found["kept"] = met and world.size > 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world.rank == 0 and not found["kept"]:
        try:
            socket.create_server(("", found["number"])).close()
        except (OSError, OverflowError) as error:
            found["problem"] = getattr(error, "strerror", None) or str(error)
    return found


# ---------------------------------------------------------------------------------------------
# File systems


class Piece(NamedTuple):
    """Something to read: a photograph, or a part of a file that holds many."""

    path: str
    start: int
    length: int
    """-1 is to the end."""


def reading(root: str, world: World, effort: Effort) -> dict[str, Any]:
    """How fast small files come from `root`, by as many threads as decode; other ranks read other files."""
    start = time.perf_counter()
    threads = max(1, min(READERS, process.decode_threads(0, world)))
    try:
        sample = pieces(Path(root), effort, random.Random(world.rank))
        if not sample:
            return {"root": root, "problem": "there is no file in it", "rate": 0.0, "bytes": 0.0}
        deadline = time.perf_counter() + effort.seconds
        start = time.perf_counter()

        def work(part: list[Piece]) -> list[int]:
            sizes: list[int] = []
            for piece in part:
                if sizes and time.perf_counter() > deadline:
                    break
                sizes.append(read(piece))
            return sizes

        with ThreadPoolExecutor(threads) as pool:
            done = list(itertools.chain.from_iterable(pool.map(work, [sample[k::threads] for k in range(threads)])))
    except OSError as error:
        return {"root": root, "problem": error.strerror or str(error), "rate": 0.0, "bytes": 0.0}
    seconds = max(time.perf_counter() - start, 1e-6)
    return {"root": root, "problem": "", "rate": len(done) / seconds, "bytes": sum(done) / seconds}


def pieces(root: Path, effort: Effort, chance: random.Random) -> list[Piece]:
    """A sample of what is to be read in a folder, or in one file.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    if not root.is_dir():
        size = os.stat(root).st_size
        starts = (chance.randrange(max(1, size - BLOCK)) for _ in range(effort.files))
        return [Piece(str(root), start, BLOCK) for start in starts] if size else []
    found: list[str] = []
    # Down to one folder's files, then up to the next one: no listing of all, which may take an hour.
    folders, deadline, wanted = [str(root)], time.perf_counter() + effort.seconds, 4 * effort.files
    while folders and len(found) < wanted and time.perf_counter() < deadline:
        below = []
        with contextlib.suppress(PermissionError), os.scandir(folders.pop()) as entries:
            for entry in itertools.islice(entries, wanted):
                if entry.is_dir():
                    below.append(entry.path)
                elif entry.is_file():
                    found.append(entry.path)
        chance.shuffle(below)
        folders += below
    if not found:
        os.listdir(root)
    return [Piece(path, 0, -1) for path in chance.sample(found, min(len(found), effort.files))]


def read(piece: Piece) -> int:
    """Reads a piece from the disk, as far as the system lets go of what it has in memory; returns its bytes."""
    descriptor = os.open(piece.path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = piece.length if piece.length >= 0 else os.fstat(descriptor).st_size
        return len(os.pread(descriptor, size, piece.start))
    finally:
        os.close(descriptor)


def writing(out: Path, size: int) -> dict[str, Any]:
    """How fast a file goes to the disk where `out` lies or would lie, and what room there is; nothing stays."""
    place = files.existing(out)
    found = {"out": str(out), "free": files.free_bytes(place), "problem": "", "rate": 0.0, "free_files": None}
    try:
        stat = os.statvfs(place)
        found["free_files"] = stat.f_favail if stat.f_files else None
        text = os.urandom(1 << 20)
        with tempfile.TemporaryFile(dir=place) as file:
            start = time.perf_counter()
            for _ in range(size // len(text)):
                file.write(text)
            file.flush()
            os.fsync(file.fileno())
            found["rate"] = size / max(time.perf_counter() - start, 1e-6)
    except OSError as error:
        found["problem"] = error.strerror or str(error)
    return found


# ---------------------------------------------------------------------------------------------
# Together; every rank must ask


def together(run: Runtime, out: Path | None, effort: Effort) -> dict[str, Any]:
    """Facts for which the ranks have met; rank 0's clock is the one that others differ from."""
    return {
        "device": run.device.type,
        "cores": usable_cores(),
        "bound": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "clock": clock(run),
        "latency": run.allreduce_seconds(1),
        "bandwidth": bandwidth(run, effort.reduced),
        "sees_out": sees(run, out),
    }


def clock(run: Runtime) -> dict[str, float]:
    """Seconds by which this rank's clock is ahead of rank 0's, and how far that may be wrong."""
    if run.control is None:
        return {"ahead": 0.0, "error": 0.0}
    answer, mine = torch.zeros(1, dtype=torch.float64), {"ahead": 0.0, "error": 0.0}
    for other in range(1, run.world.size):
        tries = []
        for _ in range(ROUNDS):
            if run.is_main:
                asked = time.time()
                dist.send(answer, other, group=run.control)
                dist.recv(answer, other, group=run.control)
                heard = time.time()
                tries.append((heard - asked, answer.item() - (asked + heard) / 2))
            elif run.world.rank == other:
                dist.recv(answer, 0, group=run.control)
                answer[0] = time.time()
                dist.send(answer, 0, group=run.control)
        if run.is_main:
            trip, ahead = min(tries)
            dist.send(torch.tensor([ahead, trip / 2], dtype=torch.float64), other, group=run.control)
        elif run.world.rank == other:
            both = torch.zeros(2, dtype=torch.float64)
            dist.recv(both, 0, group=run.control)
            mine = {"ahead": float(both[0]), "error": float(both[1])}
    return mine


def bandwidth(run: Runtime, numbers: int) -> float:
    """Bytes a second that an all-reduce moves through each rank's link, as nccl-tests count it; 0 with one process."""
    seconds, size = run.allreduce_seconds(numbers), run.world.size
    return 2 * (size - 1) / size * 4 * numbers / seconds if seconds else 0.0


def sees(run: Runtime, out: Path | None) -> bool:
    """Whether this rank sees what rank 0 writes into the place of the run folder."""
    if out is None or run.control is None:
        return True
    place, mark = files.existing(out), None
    if run.is_main:
        with contextlib.suppress(OSError):
            mark = tempfile.NamedTemporaryFile(prefix=".doctor-", dir=place)  # noqa: SIM115 -- closed below
    name = run.broadcast("" if mark is None else mark.name)
    deadline = time.monotonic() + PATIENCE
    while not (seen := not name or os.path.exists(name)) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.barrier()
    if mark is not None:
        mark.close()
    return seen
