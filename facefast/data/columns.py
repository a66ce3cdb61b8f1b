"""Columns of ten million rows: what all rows have alike is stored once, and nothing makes an object of every row at
once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK = 1 << 16
"""Rows that are looked at together: as Python's objects the paths of ten million take a gigabyte."""


def blocks(column: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """The column's parts, each with its first row."""
    return ((start, column[start : start + BLOCK]) for start in range(0, len(column), BLOCK))


def filled(values: ArrayLike | None, neutral: int, rows: int, dtype: Any) -> NDArray[Any]:
    """A column of some values, or of `rows` neutral ones."""
    return constant(neutral, rows, dtype) if values is None else np.array(values, dtype)


def constant(value: int, rows: int, dtype: Any) -> NDArray[Any]:
    """[rows] of one value, which is stored once."""
    return np.broadcast_to(np.array([value], dtype), rows)


def once(column: NDArray[Any]) -> NDArray[Any]:
    """The column itself, or `constant` where all its rows have one value: nearly half of the columns of whole files."""
    same = len(column) > 1 and column[0] == column[-1] and column.min() == column.max()
    return np.broadcast_to(column[:1].copy(), len(column)) if same else column


def taken(columns: dict[str, NDArray[Any]], which: Any) -> dict[str, Any]:
    """The rows of a mask or of row numbers, of columns of one length; what is stored once stays so."""
    found = {name: column[which] for name, column in columns.items() if not _is_constant(column)}
    rows = len(next(iter(found.values())))
    return {
        name: found[name] if name in found else np.broadcast_to(column[:1], rows) for name, column in columns.items()
    }


def gathered(paths: Iterable[bytes]) -> NDArray[np.bytes_]:
    """[N] paths as a column, without a list of them all."""
    parts: list[NDArray[np.bytes_]] = []
    waiting: list[bytes] = []
    for path in paths:
        waiting.append(path)
        if len(waiting) == BLOCK:
            parts.append(np.array(waiting, np.bytes_))
            waiting = []
    parts.append(np.array(waiting, np.bytes_))
    return np.concatenate(parts)


def first_outside(paths: NDArray[np.bytes_]) -> bytes | None:
    """A path that is absolute, empty, or climbs out of the folder it is relative to."""
    for _, some in blocks(paths):
        for path in some.tolist():
            if not path or path.startswith(b"/") or (b".." in path and b".." in path.split(b"/")):
                return bytes(path)
    return None


def _is_constant(column: NDArray[Any]) -> bool:
    return len(column) > 0 and column.strides == (0,)
