"""Tensors whose rows lie on several ranks: on their way into one file, a piece at a time, and out of it again.

The file is the one that a single process would write. Nobody holds a whole tensor, and any number of ranks reads its
own rows of it.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from facefast.ops import class_block
from facefast.runtime.direct import DirectFile
from facefast.runtime.exits import RankError, exit_code
from facefast.runtime.process import Runtime

PIECE = 32 << 20
"""Bytes that travel at a time."""
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""By their names in a safetensors file."""


class Spread(NamedTuple):
    """A tensor of which this rank has a block of rows, see `facefast.ops.class_block`."""

    block: Tensor
    """[K, ...]"""
    rows: int
    """Of all ranks."""

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return self.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.block.element_size() * self.block.shape[1:].numel()

    @property
    def whole(self) -> bool:
        """Whether one rank has all rows."""
        return len(self.block) == self.rows


Named = Mapping[str, Mapping[str, "Tensor | Spread"]]
"""Tensors by file and name."""
Fetch = Callable[[str, str, Spread], Iterator[Tensor]]
"""The rows of a tensor of a file, in order, a piece at a time and on the CPU."""


def here(tensor: Tensor | Spread) -> Tensor:
    """What this process has of a tensor."""
    return tensor.block if isinstance(tensor, Spread) else tensor


def pieces(block: Tensor, row_bytes: int) -> Iterator[tuple[int, int]]:
    """First and last row, not included, of each piece that travels."""
    step = max(1, PIECE // max(1, row_bytes))
    yield from ((first, min(first + step, len(block))) for first in range(0, len(block), step))


@contextlib.contextmanager
def rows_of_all_ranks(run: Runtime, tensors: Named) -> Iterator[Fetch | None]:
    """Within it, rank 0 gets any rank's rows of `tensors`; the others enter at the same time, and answer before they
    go on.

    Yields:
        What fetches; None where no rank has a part only.

    Raises:
        RankError: rank 0 could not begin to ask.
    """
    parts = [tensor for named in tensors.values() for tensor in named.values() if isinstance(tensor, Spread)]
    if run.control is None or not parts:
        yield None
    elif run.is_main:
        try:
            yield lambda file, name, spread: _fetch(run, file, name, spread)
        finally:  # also where writing failed: the others wait for the next question
            run.broadcast(None)
    else:
        _answer(run, tensors)
        yield None


def _fetch(run: Runtime, file: str, name: str, spread: Spread) -> Iterator[Tensor]:
    for rank in range(run.world.size):
        block = class_block(spread.rows, run.world.size, rank)
        like = spread.block.new_empty((len(block), 0))
        for first, last in pieces(like, spread.row_bytes):
            if rank == 0:
                yield spread.block[first:last].detach().cpu()
                continue
            run.broadcast((file, name, rank, first, last))
            rows = torch.empty((last - first, *spread.block.shape[1:]), dtype=spread.block.dtype)
            dist.recv(rows, src=rank, group=run.control)
            yield rows


def _answer(run: Runtime, tensors: Named) -> None:
    """Sends what rank 0 asks for until it has what it wants."""
    while (asked := run.broadcast(None)) is not None:
        if isinstance(asked, BaseException):  # it ends instead of asking
            raise RankError(str(asked), exit_code(asked) or 1)
        file, name, rank, first, last = asked
        if rank == run.world.rank:
            rows = here(tensors[file][name])[first:last].detach().cpu().contiguous()
            dist.send(rows, dst=0, group=run.control)


def write(path: Path, file: str, named: Mapping[str, Tensor | Spread], fetch: Fetch | None = None) -> str:
    """A .safetensors file with the whole of every tensor, written piece by piece; returns the hex XXH3-128 of it.

    Args:
        file: what `fetch` calls it.
        fetch: gives other ranks' rows; None where this process has all of every tensor.

    Raises:
        OSError: it cannot be written.
        ValueError: the format has no such type of numbers.
    """
    # By size of an element, largest first, so that every tensor begins where its type wants it.
    order = sorted(named, key=lambda name: (-here(named[name]).element_size(), name))
    header, end = {}, 0
    for name in order:
        tensor = named[name]
        if (kind := here(tensor).dtype) not in TYPES:
            raise ValueError(f"{path}: {name} is of {kind}; a file of tensors has one of {', '.join(map(str, TYPES))}")
        shape = [tensor.rows, *tensor.block.shape[1:]] if isinstance(tensor, Spread) else list(tensor.shape)
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPES[kind], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with DirectFile(path) as out:
        out.write(memoryview(struct.pack("<Q", len(text)) + text))
        for name in order:
            tensor = named[name]
            if fetch is not None and isinstance(tensor, Spread):
                pieces_of_all = fetch(file, name, tensor)
            else:
                pieces_of_all = iter((here(tensor).detach().cpu(),))
            for piece in pieces_of_all:
                out.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return out.xxh3()


def own_rows(tensor: Tensor, block: range, rows: int) -> Tensor:
    """Of a whole tensor in a file, this rank's rows; their pages alone are read. What has no such rows stays whole."""
    if tensor.dim() < 2 or len(tensor) != rows or len(block) == rows:
        return tensor
    return tensor[block.start : block.stop].clone()
