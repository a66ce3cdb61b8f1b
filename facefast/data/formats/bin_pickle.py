"""The pickle of an InsightFace verification set, read without unpickling: where its pictures lie in the file, and what
its pairs are.

A pickle is a program for a stack machine (Python's pickletools documents it). The few instructions that such a set
needs are carried out here on places in the file and on plain values: nothing is imported or called, nothing is made
larger than the bytes that stand for it, and each instruction is taken once.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import re
from typing import Any, NamedTuple

import numpy as np

LONGEST_TEXT = 1 << 16
"""Bytes of a text or a number; those of pictures and arrays are not read here."""
LONGEST_LINE = 64 << 20
"""Bytes of a picture in Python 2's text protocol."""
MOST_STEPS = 1 << 22
"""Instructions; a picture takes four."""
BYTES = {
    "BINBYTES": 4, "BINSTRING": 4, "BINBYTES8": 8, "BYTEARRAY8": 8, "SHORT_BINBYTES": 1, "SHORT_BINSTRING": 1,
}  # fmt: skip
"""Instructions followed by bytes as they are, and the width of their number."""
TEXTS = {"SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8}
NUMBERS = {"BININT": 4, "BININT1": 1, "BININT2": 2}
MODULES = {"numpy"} | {f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray", "numeric")}
NAMES = {"dtype", "ndarray", "_reconstruct", "scalar", "_frombuffer"}
_DTYPE = re.compile(r"[<>|=]?[biuf][1248]|bool|u?int(8|16|32|64)")
_MARK = object()
_CODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}


class Span(NamedTuple):
    """Bytes of the file."""

    begin: int
    length: int


class _Packed(NamedTuple):
    """Bytes that the pickle holds in another form, as Python 2's text protocol does."""


class _Global(NamedTuple):
    name: str


class _Array:
    """An array or a dtype before and after it is told what it holds."""

    def __init__(self) -> None:
        self.dtype: np.dtype[Any] | None = None
        self.shape: tuple[int, ...] = ()
        self.span: Span | None = None


def read(data: mmap.mmap) -> tuple[list[Span | None], list[bool]]:
    """(pictures, flags): where each picture is, None for one that is not stored as it is; and whether each pair is one
    person.

    Raises:
        ValueError: it is no pickle of (pictures, flags), or holds anything else.
    """
    found = _Machine(data).run()
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise ValueError("it is no pair of pictures and flags")
    pictures, flags = (_items(part, data) for part in found)
    return [_picture(picture) for picture in pictures], [_flag(flag, data) for flag in flags]


def _items(value: Any, data: mmap.mmap) -> list[Any]:
    if isinstance(value, _Array):
        return _values(value, data)
    if not isinstance(value, list | tuple):
        raise ValueError("the pictures and the flags must be lists")
    return list(value)


def _picture(value: Any) -> Span | None:
    if isinstance(value, _Array) and value.dtype == np.uint8 and value.span is not None:
        return value.span
    if isinstance(value, Span):
        return value
    if isinstance(value, _Packed | str):
        return None
    raise ValueError(f"a picture is bytes; one is {_shown(value)}")


def _flag(value: Any, data: mmap.mmap) -> bool:
    if isinstance(value, _Array) and value.shape == ():
        (value,) = _values(value, data)
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"a pair is the same person or not, 1 or 0; one is {_shown(value)}")
    return bool(value)


def _values(array: _Array, data: mmap.mmap) -> list[Any]:
    if array.dtype is None or array.span is None:
        raise ValueError("an array without its numbers")
    content = data[array.span.begin : array.span.begin + array.span.length]
    return list(np.frombuffer(content, array.dtype).tolist())


def _shown(value: Any) -> str:
    plain = isinstance(value, str | int | float) or value is None
    return f"{value!r:.80}" if plain else f"a {type(value).__name__.strip('_').lower()}"


class _Machine:
    """The stack machine, with a method for each kind of instruction."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MOST_STEPS):
            code = self.take(1)[0]
            name = _CODES[code].name if code in _CODES else ""
            if name == "STOP":
                return self.pop()
            self.step(name, code)
        raise ValueError(f"it has more than {MOST_STEPS} instructions")

    def step(self, name: str, code: int) -> None:
        if name in BYTES:
            length = self.number(BYTES[name])
            self.skip(length)
            self.stack.append(Span(self.at - length, length))
        elif name in TEXTS:
            self.stack.append(self.text(self.number(TEXTS[name])))
        elif name in NUMBERS:
            width = NUMBERS[name]
            self.stack.append(int.from_bytes(self.take(width), "little", signed=width == 4))
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("EMPTY_LIST", "EMPTY_TUPLE"):
            self.stack.append([] if name == "EMPTY_LIST" else ())
        elif name in ("LONG1", "INT", "LONG", "FLOAT", "BINFLOAT", "STRING", "UNICODE"):
            self.stack.append(self.literal(name))
        elif name in ("PROTO", "FRAME"):
            self.skip(1 if name == "PROTO" else 8)
        elif "PUT" in name or "GET" in name or name == "MEMOIZE":
            self.remember(name)
        elif name in ("MARK", "POP", "POP_MARK", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS"):
            self.gather(name)
        elif name in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"):
            self.build(name)
        else:
            raise ValueError(f"instruction {name or hex(code)} at byte {self.at - 1} is not allowed")

    def literal(self, name: str) -> Any:
        if name == "LONG1":
            return int.from_bytes(self.take(self.number(1)), "little", signed=True)
        if name == "BINFLOAT":
            return float(np.frombuffer(self.take(8), ">f8")[0])
        line = self.line()
        if name == "STRING":
            return _Packed() if len(line) > 64 else line.strip("'\"")
        if name == "UNICODE":
            return line
        if line in ("00", "01"):
            return line == "01"
        return float(line) if name == "FLOAT" else int(line.removesuffix("L")[:64])

    def remember(self, name: str) -> None:
        if name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
            return
        key = int(self.line()[:16]) if name in ("PUT", "GET") else self.number(4 if name.startswith("LONG") else 1)
        if name.endswith("PUT"):
            self.memo[key] = self.top()
        elif key in self.memo:
            self.stack.append(self.memo[key])
        else:
            raise ValueError(f"it refers to value {key}, which it has not made")

    def gather(self, name: str) -> None:
        if name == "MARK":
            self.stack.append(_MARK)
        elif name == "POP":
            self.pop()
        elif name == "APPEND":
            value = self.pop()
            self.top_list().append(value)
        elif name == "APPENDS":
            values = self.since_mark()
            self.top_list().extend(values)
        elif name == "POP_MARK":
            self.since_mark()
        elif name in ("LIST", "TUPLE"):
            values = self.since_mark()
            self.stack.append(values if name == "LIST" else tuple(values))
        else:
            self.stack.append(tuple(reversed([self.pop() for _ in range(int(name[-1]))])))

    def build(self, name: str) -> None:
        """Arrays, scalars and dtypes of NumPy, which are described and not made."""
        if name == "GLOBAL":
            self.stack.append(self.known(self.line(), self.line()))
        elif name == "STACK_GLOBAL":
            called = self.pop()
            self.stack.append(self.known(self.pop(), called))
        else:
            given = self.pop()
            if not isinstance(given, tuple):
                raise ValueError("an object is made of something else than a tuple")
            self.stack.append(self.made(self.pop(), given) if name == "REDUCE" else self.told(self.pop(), given))

    def known(self, module: Any, name: Any) -> _Global:
        if not isinstance(module, str) or not isinstance(name, str) or module not in MODULES or name not in NAMES:
            raise ValueError(f"it wants {_shown(module)}.{_shown(name)}, which is not allowed".replace("'", ""))
        return _Global(name)

    def made(self, function: Any, given: tuple[Any, ...]) -> _Array:
        array = _Array()
        match function, given:
            case _Global("dtype"), (str() as form, *_) if _DTYPE.fullmatch(form):
                array.dtype = np.dtype(form)
            case _Global("dtype"), (Span() as form, *_) if form.length <= 8:
                return self.made(function, (self.at_span(form),))
            case _Global("_reconstruct"), _:
                pass
            case _Global("scalar"), (_Array(dtype=np.dtype() as dtype), Span() as span):
                self.hold(array, dtype, (), span)
            case _Global("_frombuffer"), (Span() as span, _Array(dtype=np.dtype() as dtype), tuple() as shape, *_):
                self.hold(array, dtype, shape, span)
            case _:
                raise ValueError("it makes an object that is no array of numbers")
        return array

    def told(self, array: Any, state: tuple[Any, ...]) -> _Array:
        match array, state:
            case _Array(dtype=np.dtype() as dtype, span=None), (_, str() | Span() as order, *_):
                order = order if isinstance(order, str) else self.at_span(order)
                if order not in ("<", ">", "|", "="):
                    raise ValueError(f"a byte order {order!r:.80}")
                array.dtype = dtype if order == "|" else dtype.newbyteorder("big" if order == ">" else "little")
            case _Array(dtype=None), (_, tuple() as shape, _Array(dtype=np.dtype() as dtype), _, Span() as span):
                self.hold(array, dtype, shape, span)
            case _:
                raise ValueError("it makes an object that is no array of numbers")
        return array

    def hold(self, array: _Array, dtype: np.dtype[Any], shape: tuple[Any, ...], span: Span) -> None:
        whole = all(type(side) is int and side >= 0 for side in shape) and len(shape) <= 8
        if not whole or math.prod(shape) * dtype.itemsize != span.length:
            raise ValueError(f"an array of {len(shape)} axes and {dtype} has {span.length} bytes, which do not fit")
        array.dtype, array.shape, array.span = dtype, shape, span

    # The stack and the file.

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("it takes a value where there is none")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def top_list(self) -> list[Any]:
        value = self.top()
        if type(value) is not list:
            raise ValueError("it appends to what is no list")
        return value

    def since_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise ValueError(f"it announces {count} bytes at byte {self.at}, and {len(self.data) - self.at} are left")
        self.at += count

    def take(self, count: int) -> bytes:
        if count > LONGEST_TEXT:
            raise ValueError(f"a text or a number of {count} bytes; at most {LONGEST_TEXT} are read")
        self.skip(count)
        return self.data[self.at - count : self.at]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self, length: int) -> str:
        return self.take(length).decode("utf-8", "surrogatepass")

    def at_span(self, span: Span) -> str:
        return self.data[span.begin : span.begin + min(span.length, 8)].decode("latin-1")

    def line(self) -> str:
        """Up to the next end of a line. Pictures of Python 2's text protocol are such lines, of any length."""
        end = self.data.find(b"\n", self.at, self.at + LONGEST_LINE)
        if end < 0:
            raise ValueError(f"it ends in the middle of a line at byte {self.at}")
        begin, self.at = self.at, end + 1
        return self.data[begin : min(end, begin + 4096)].decode("latin-1")
