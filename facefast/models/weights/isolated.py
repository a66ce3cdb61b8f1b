"""Reading a file in a process of its own, with little memory and little time.

Libraries that parse formats of others crash on some damaged files (HDF5), and pickles of a few hundred bytes can work
for years. Neither may take a run along: what goes wrong in the child is an error of the file here.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import math
import mmap
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facefast.runtime.untrusted import may_hold

MEMORY = 256 << 20
"""Bytes that a child may take beside those of the tensors, twice: as read and as handed over."""
CPU_SECONDS, CPU_BYTES_PER_SECOND = 2, 32 << 20
"""Of the processor; and a second more for so many bytes of the file."""
WALL_SECONDS, WALL_BYTES_PER_SECOND = 8, 4 << 20
"""Until an answer; files may come from a slow network."""
MAX_MESSAGE = 64 << 20
_ALIGNMENT = 64
_KILLED_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_libc = ctypes.CDLL(None)  # now: a child should not load anything


def read_apart(path: Path, read: Callable[[Path], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `read` gives for a file, read in a child; the tensors lie in memory that both share.

    Raises:
        ValueError: that of `read`; or the file makes it crash, or needs more memory or time than its size explains.
    """
    size = path.stat().st_size
    memory = os.memfd_create("weights")
    try:
        message = _answer(path, read, memory, size)
        if "error" in message:
            raise ValueError(str(message["error"]))
        return _received(message["tensors"], memory)
    finally:
        os.close(memory)


def _answer(path: Path, read: Callable[[Path], Mapping[str, Tensor]], memory: int, size: int) -> dict[str, Any]:
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        # A child of a process with threads may not take locks that those hold. This one only reads a file, as the
        # workers of torch's DataLoader do; should it wait for ever, it is ended below.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            _work(path, read, memory, size, sender)
        finally:
            os._exit(1)
    os.close(sender)
    seconds = WALL_SECONDS + size / WALL_BYTES_PER_SECOND
    try:
        content = _until_end(receiver, time.monotonic() + seconds)
    finally:
        os.close(receiver)
        os.kill(child, signal.SIGKILL)  # at its end already, or too late; nobody else can have its number yet
        _, status = os.waitpid(child, 0)
    if content:
        try:
            return dict(json.loads(content))
        except ValueError:
            pass  # it was ended while it wrote
    how = "took too long" if content is None else _ending(status)
    raise ValueError(
        f"{path} was refused: the process that read it {how}. A file of {size} bytes may take {_memory(size) >> 20} MB "
        f"and {_cpu(size)} seconds; it is damaged, or made to do harm"
    )


def _ending(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return "ended without an answer"
    name = signal.Signals(os.WTERMSIG(status)).name
    return "took too long" if name in ("SIGXCPU", "SIGKILL") else f"crashed ({name})"


def _until_end(receiver: int, deadline: float) -> bytes | None:
    """All that the other side writes, None where it does not come to an end."""
    parts: list[bytes] = []
    total = 0
    waiting = select.poll()
    waiting.register(receiver, select.POLLIN)
    while total <= MAX_MESSAGE:
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        part = os.read(receiver, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
        total += len(part)
    return None


def _memory(size: int) -> int:
    return MEMORY + 2 * may_hold(size)


def _cpu(size: int) -> int:
    return CPU_SECONDS + size // CPU_BYTES_PER_SECOND


# The child.


def _work(path: Path, read: Callable[[Path], Mapping[str, Tensor]], memory: int, size: int, sender: int) -> None:
    _restrict(size)
    try:
        answer: dict[str, Any] = {"tensors": _send(read(path), memory, may_hold(size))}
    except ValueError as error:
        answer = {"error": str(error)[:8192]}
    except Exception as error:
        what = str(error).partition("\n")[0][:400] or type(error).__name__
        if isinstance(error, MemoryError) or "alloc" in what:
            what = f"it needs more than {_memory(size) >> 20} MB, which is too much for {size} bytes"
        answer = {"error": f"{path} was refused: {what}"}
    content = json.dumps(answer).encode()
    while content:
        content = content[os.write(sender, content) :]
    os._exit(0)


def _restrict(size: int) -> None:
    _libc.prctl(_KILLED_WITH_PARENT, signal.SIGKILL)
    faulthandler.disable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_CPU, _cpu(size))
    _lower(resource.RLIMIT_AS, taken + _memory(size))


def _lower(what: int, limit: int) -> None:
    hard = resource.getrlimit(what)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(what, (limit, limit))


def _send(tensors: Mapping[str, Tensor], memory: int, most: int) -> list[tuple[str, str, list[int], int]]:
    """Writes the tensors' bytes one after the other; name, dtype, shape and place of each."""
    sent, at = [], 0
    for name, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        if at + count > most:  # before it is made contiguous: a view of one number may have any shape
            raise ValueError(f"its tensors take more than {most} bytes, the most that a file of its size may hold")
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        view = memoryview(flat.numpy().data)
        os.lseek(memory, at, os.SEEK_SET)
        while view:
            view = view[os.write(memory, view) :]
        sent.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), at))
        at += -(-count // _ALIGNMENT) * _ALIGNMENT
    return sent


# The parent again: a child that was taken over by its file could answer anything.


def _received(sent: list[tuple[str, str, list[int], int]], memory: int) -> dict[str, Tensor]:
    total = os.fstat(memory).st_size
    shared = mmap.mmap(memory, total) if total else None
    tensors = {}
    for name, kind, shape, at in sent:
        dtype = getattr(torch, kind)
        count = math.prod(shape)
        if not count:
            tensors[name] = torch.empty(shape, dtype=dtype)
        elif shared is not None and 0 <= at <= total - count * dtype.itemsize:
            tensors[name] = torch.frombuffer(shared, dtype=dtype, count=count, offset=at).reshape(shape)
        else:
            raise ValueError(f"tensor {name} has no place in what was read")
    return tensors
