"""Weights of a Torch7 network (.t7) read as data: Lua code that such a file may hold is skipped, never run.

Oxford's VGG_FACE.t7 is such a file. The format is that of Torch7's binary torch.save with 64-bit longs
(https://github.com/torch/torch7/blob/master/File.lua, generic/Tensor.c and generic/Storage.c): each value follows the
number of its type; tables and objects carry an index, by which they are referred to when they come again.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NIL, NUMBER, STRING, TABLE, OBJECT, BOOLEAN = range(6)
FUNCTIONS = (6, 7, 8)
DTYPES = {
    "Byte": "u1", "Char": "i1", "Short": "<i2", "Int": "<i4", "Long": "<i8", "Float": "<f4", "Double": "<f8",
    "Cuda": "<f4", "CudaDouble": "<f8",
}  # fmt: skip
MAX_AXES = 16
MAX_DEPTH = 64
"""Tables around a weight."""
MAX_ENTRIES = 1 << 17
"""Entries looked at in search of weights. Tables may be referred to from many places, and 60 that each hold the next
one twice have more paths through them than can be counted."""
LEARNT = ("weight", "bias", "running_mean", "running_var")
"""The tensors of a module that are its weights; the others are room for its results and gradients."""


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a saved network by their places in it, modules.1.weight and so on, counted from 1 as Lua does.

    Raises:
        ValueError: the file is cut off or damaged, or not a binary .t7.
    """
    try:
        value = _Reader(path.read_bytes()).value()
        return dict(_weights(value, "", (), [MAX_ENTRIES]))
    except (ValueError, RuntimeError, struct.error, RecursionError) as error:
        raise ValueError(f"{path} is not a sound binary .t7 file of Torch7: {error}") from error


def _weights(value: Any, at: str, around: tuple[int, ...], left: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Weights in a table and in those within it; `around` are the tables that it lies in, which it may refer to, and
    `left` counts the entries that may still be looked at."""
    if not isinstance(value, dict) or id(value) in around:
        return
    left[0] -= len(value)
    if left[0] < 0 or len(around) > MAX_DEPTH:
        raise ValueError(f"its tables hold each other more than {MAX_DEPTH} deep or in more than {MAX_ENTRIES} places")
    # Lua hands out a table's numbers in any order.
    for key in sorted(value, key=lambda key: (isinstance(key, str), key)):
        inner = value[key]
        if isinstance(inner, Tensor) and key in LEARNT:
            yield f"{at}{key}", inner
        elif isinstance(inner, dict):
            yield from _weights(inner, f"{at}{key}.", (*around, id(value)), left)


class _Reader:
    """Values one after the other: numbers, strings, tables as dicts, tensors, other objects as their table."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.place = 0
        self.known: dict[int, Any] = {}

    def value(self) -> Any:
        kind = self.integer()
        if kind == NIL:
            return None
        if kind == NUMBER:
            number = self.unpack("<d")
            return int(number) if number.is_integer() and abs(number) < 1 << 53 else number
        if kind == STRING:
            return self.string()
        if kind == BOOLEAN:
            return self.integer() == 1
        if kind not in (TABLE, OBJECT, *FUNCTIONS):
            raise ValueError(f"no value has type {kind}")
        # None while it is being read, so that an object that refers to itself ends instead of nesting forever.
        index = self.integer()
        if index not in self.known:
            self.known[index] = None
            self.known[index] = self.table(index) if kind == TABLE else self.other(kind, index)
        return self.known[index]

    def table(self, index: int) -> dict[int | str, Any]:
        """Entries under numbers and strings; others have no name to be found by."""
        found: dict[int | str, Any] = {}
        self.known[index] = found  # a table may hold itself
        # However many entries the file claims: each takes bytes, and `take` refuses what is not there.
        for _ in range(self.integer()):
            key, value = self.value(), self.value()
            if isinstance(key, int | str):
                found[key] = value
        return found

    def other(self, kind: int, index: int) -> Any:
        if kind in FUNCTIONS:
            self.string()  # its code, compiled Lua: passed over
            self.value()  # what it refers to
            return None
        name = self.string()
        if name.startswith("V "):  # the version of its class
            name = self.string()
        space, _, name = name.partition(".")
        element = DTYPES.get(name.removesuffix("Tensor").removesuffix("Storage")) if space == "torch" else None
        if element is None:
            if space == "torch":
                raise ValueError(f"torch.{name} is not a type of tensor that is read")
            return self.value()
        if name.endswith("Storage"):
            dtype = np.dtype(element)
            return torch.from_numpy(np.frombuffer(self.take(self.unpack("<q") * dtype.itemsize), dtype).copy())
        return self.tensor()

    def tensor(self) -> Tensor:
        axes = self.integer()
        if not 0 <= axes <= MAX_AXES:
            raise ValueError(f"a tensor of {axes} axes")
        # Sizes, strides and offset are the file's word, and may point anywhere; `as_strided` below checks them against
        # the storage.
        size, stride = ([self.unpack("<q") for _ in range(axes)] for _ in range(2))
        first = self.unpack("<q") - 1
        storage = self.value()
        if storage is None or not axes:
            return torch.empty(0)
        if not isinstance(storage, Tensor):
            raise ValueError("a tensor without its numbers")
        # A stride of 0 would make one number a million.
        if min(size) < 0 or math.prod(size) > storage.numel():
            raise ValueError(f"a tensor of shape {size} with {storage.numel()} numbers")
        return storage.as_strided(size, stride, first)

    def string(self) -> str:
        return bytes(self.take(self.integer())).decode("latin-1")

    def integer(self) -> int:
        return int(self.unpack("<i"))

    def unpack(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self.data) - self.place:  # every read comes through here
            raise ValueError(f"{count} bytes wanted at {self.place}, {len(self.data) - self.place} are left")
        self.place += count
        return self.data[self.place - count : self.place]
