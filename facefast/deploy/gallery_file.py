"""A gallery on disk: one safetensors file, mapped when it is read, written anew by every change.

It holds, in the order of people:

- `embeddings` [N, D] float32 or float16, of length 1;
- `lengths` [P] float32, of the sum of each person's embeddings, by which their mean is made a direction;
- `people` [N] int32, the place of each row's person in the document's names, never falling;
- `hashes` [N, 16] uint8, content hash of the picture that a row comes from;
- `document`, JSON in UTF-8: names, the fingerprint of the model, thresholds.

Pictures and their paths are not stored. A file is private to its owner, as embeddings are biometric data, unless its
mode is changed, which later versions keep.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from facefast.runtime import files
from facefast.runtime.exits import DataError, StorageError

FORMAT = 1
"""A later one is refused."""
BLOCK = 4096
"""Rows read or written at a time: what is held beside a mapped file."""
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_MARK = "facefast_gallery"


class Stored(NamedTuple):
    """What a file holds; numbers are read from it as they are used."""

    embeddings: NDArray[Any]
    lengths: NDArray[np.float32]
    people: NDArray[np.int32]
    hashes: NDArray[np.uint8]
    document: dict[str, Any]
    mapped: mmap.mmap
    first: int
    """Byte of the file at which embeddings begin."""

    def release(self, begin: int, end: int) -> None:
        """Takes the pages of embeddings from one row to another out of this process's memory, until they are looked at
        again; they stay in the system's cache of files."""
        width = self.embeddings.shape[1] * self.embeddings.itemsize
        page = mmap.PAGESIZE
        start = (self.first + begin * width) // page * page
        length = (self.first + end * width) // page * page - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED, start, length)


_PARTS = ("embeddings", "lengths", "people", "hashes", "document")


def read(path: Path) -> Stored:
    """The mapped file; what replaces it later does not change this.

    Raises:
        ValueError: a later facefast wrote it.
        DataError: it is damaged, or no gallery.
    """
    try:
        header, begin, mapped = _opened(path)
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"{path} cannot be read as a gallery ({error}); restore it from a backup") from error
    made = header.get("__metadata__", {}).get(_MARK) if isinstance(header, dict) else None
    if made is None:
        raise DataError(f"{path} is no gallery; give a file that facefast gallery enroll has written")
    if not made.isdecimal() or int(made) > FORMAT:
        raise ValueError(f"{path} is a gallery of format {made}, and this facefast reads {FORMAT}; update facefast")
    try:
        arrays = {name: _array(header[name], mapped, begin) for name in _PARTS}
        return _checked(arrays, mapped, begin + header["embeddings"]["data_offsets"][0])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} is a damaged gallery ({error}); restore it from a backup") from error


def _opened(path: Path) -> tuple[dict[str, Any], int, mmap.mmap]:
    """Header, first byte behind it, and the whole file, mapped."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        # A private mapping: torch takes arrays that could be written to, and nobody writes.
        return json.loads(file.read(length)), 8 + length, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _array(entry: Mapping[str, Any], mapped: mmap.mmap, begin: int) -> NDArray[Any]:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    count = int(np.prod(shape, dtype=np.int64))
    first, end = entry["data_offsets"]
    if first < 0 or end - first != count * dtype.itemsize or begin + end > len(mapped):
        raise ValueError("a part of it is cut off")
    found: NDArray[Any] = np.frombuffer(mapped, dtype, count, begin + first) if count else np.empty(0, dtype)
    return found.reshape(shape)


def _checked(arrays: dict[str, NDArray[Any]], mapped: mmap.mmap, first: int) -> Stored:
    document = json.loads(bytes(arrays["document"]).decode())
    stored = Stored(
        arrays["embeddings"], arrays["lengths"], arrays["people"], arrays["hashes"], document, mapped, first
    )
    rows, names = len(stored.people), document["names"]
    steps = np.diff(stored.people.astype(np.int64), prepend=-1, append=len(names))
    if (
        stored.embeddings.ndim != 2
        or len(stored.embeddings) != rows
        or stored.hashes.shape != (rows, 16)
        or stored.lengths.shape != (len(names),)
        or bool(((steps < 0) | (steps > 1)).any())  # every person has a row, and they come in order
        or len(set(names)) != len(names)
        or not isinstance(document["model"], str)
    ):
        raise ValueError("its parts do not fit together")
    return stored


def write(
    path: Path,
    people: NDArray[np.int32],
    hashes: NDArray[np.uint8],
    document: Mapping[str, Any],
    width: int,
    half: bool,
    rows: Callable[[int, int], NDArray[Any]],
) -> None:
    """Writes a file aside, a block at a time, syncs it and renames it into place.

    Args:
        path: the file.
        people: [N] as stored.
        hashes: [N, 16].
        document: with the names.
        width: D.
        half: float16 instead of float32.
        rows: gives embeddings from one row to another.

    Raises:
        StorageError: it cannot be written; the file that was there is untouched.
    """
    text = np.frombuffer(json.dumps(files.strict(document), ensure_ascii=False, allow_nan=False).encode(), np.uint8)
    kind = "F16" if half else "F32"
    num_people = len(document["names"])
    shapes: dict[str, tuple[str, list[int]]] = {
        "embeddings": (kind, [len(people), width]),
        "lengths": ("F32", [num_people]),
        "people": ("I32", [len(people)]),
        "hashes": ("U8", [len(people), 16]),
        "document": ("U8", [len(text)]),
    }
    header: dict[str, Any] = {"__metadata__": {"format": "np", _MARK: str(FORMAT)}}
    at = 0
    for name, (dtype, shape) in shapes.items():
        end = at + int(np.prod(shape, dtype=np.int64)) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % 64)  # numbers begin where vector loads like them to
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            if path.exists():
                os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
            file.write(struct.pack("<Q", len(head)) + head)
            lengths = _Lengths(num_people, width)
            for begin in range(0, len(people), BLOCK):
                block = np.ascontiguousarray(rows(begin, begin + BLOCK), _DTYPES[kind])
                file.write(block.data)
                lengths.add(people[begin : begin + BLOCK], block)
            for column in (lengths.found(), people.astype("<i4"), hashes, text):
                file.write(np.ascontiguousarray(column).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        files.sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; the gallery is as it was") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


class _Lengths:
    """Lengths of people's sums, of rows that come in their order."""

    def __init__(self, num_people: int, width: int) -> None:
        self._squares = np.zeros(num_people)
        self._open = np.zeros(width)  # the sum of the person whose rows may go on in the next block
        self._who = -1

    def add(self, people: NDArray[np.int32], block: NDArray[Any]) -> None:
        starts = np.flatnonzero(np.diff(people, prepend=-2))
        sums = np.add.reduceat(block, starts, axis=0, dtype=np.float64)
        if people[0] == self._who:
            sums[0] += self._open
        self._squares[people[starts]] = np.square(sums).sum(1)
        self._open, self._who = sums[-1], int(people[-1])

    def found(self) -> NDArray[np.float32]:
        return np.sqrt(self._squares).astype("<f4")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time change a gallery; the others wait. What a killed one left half written is removed.

    Raises:
        StorageError: its folder cannot be written to.
    """
    # A file beside it: the gallery's own is replaced by each change, and a lock on it would stay with the old one.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write beside {path}: {error.strerror}; choose another place") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        for left in path.parent.glob(f".{path.name}.*.tmp"):
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
