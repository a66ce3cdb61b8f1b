"""CelebA's lists: a line per picture, of its name and numbers, in the official files and in comma-separated ones."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facefast.data import lists
from facefast.data.index import printable
from facefast.runtime.exits import DataError

NAME = "image_id"
"""Header of the file names."""


@dataclass(frozen=True)
class Table:
    """One list: a line per picture, found by the stem of its name (PNG editions keep the names)."""

    path: Path
    header: tuple[str, ...]
    files: list[str]
    lines: list[int]
    """Where each file stands, from 1."""
    rows: dict[str, int]
    values: NDArray[Any]  # [files, numbers], float64, or int64 of whole numbers

    def column(self, names: Sequence[str], twins: set[str], neutral: str) -> NDArray[Any]:
        """[N, numbers] of `names`; NaN, or -1, where there is no line, and a warning of what follows.

        Args:
            names: of files.
            twins: stems that several of them share; such a line is for the file of exactly its name.
            neutral: says what those without a line get.
        """

        def row_of(name: str) -> int:
            row = self.rows.get(stem(name), -1)
            return -1 if row >= 0 and stem(name) in twins and self.files[row] != name else row

        rows = np.fromiter(map(row_of, names), np.int64, len(names))
        absent = np.flatnonzero(rows < 0)
        if len(absent) == len(names):
            raise DataError(
                f"{self.path} names none of the {len(names)} pictures (first: {_printable(names[0])}); its first line "
                f"is for {_printable(self.files[0]) if self.files else 'nothing'}, and {self.values.shape[1]} numbers"
            )
        if len(absent) > 0:
            self._require_no_surplus()
            warnings.warn(
                f"{self.path} has no line for {len(absent)} of {len(names)} pictures "
                f"(first: {_printable(names[absent[0]])}); {neutral}",
                stacklevel=4,
            )
        values = self.values[rows]
        values[absent] = -1 if values.dtype == np.int64 else np.nan
        return values

    def require(self, valid: Callable[[NDArray[Any]], NDArray[np.bool_]], what: str) -> None:
        """Raises DataError unless every line is valid."""
        bad = np.flatnonzero(~valid(self.values).all(axis=1))
        if len(bad) > 0:
            raise DataError(
                f"{self.path}: {len(bad)} of {len(self.files)} lines are no good (first: "
                f"{_printable(self.files[bad[0]])} {_text(self.values[bad[0]])} in line {self.lines[bad[0]]}); it must "
                f"be {what}"
            )

    def require_text(self, there: set[str]) -> None:
        """Raises DataError where a name is no UTF-8, unless it is that of a file: names of files may be any bytes."""
        for row, name in enumerate(self.files):
            if not name.isascii() and stem(name) not in there:
                lists.require_text(self.path, self.lines[row], name)

    def _require_no_surplus(self) -> None:
        for row, name in enumerate(self.files):
            if " " in os.path.splitext(name)[1]:
                raise DataError(
                    f"{self.path}, line {self.lines[row]}: {_printable(name)} is no name of a file; is there a number "
                    f"more than the {self.values.shape[1]} that belong there?"
                )


def read_table(path: Path, columns: Sequence[str] | None, *, whole: bool = False) -> Table:
    """Lines of a file name and as many numbers as `columns`, or as the header names.

    File names may hold spaces. The count of pictures on the first line is not used: it is wrong in edited copies.

    Args:
        path: a .txt or .csv file, whose header may name `columns` in any order.
        whole: the numbers are whole, and read exactly however large.

    Raises:
        DataError: a line has other numbers, a column's name repeats, or two lines for one picture differ.
    """
    numbered = lists.read_lines(path)
    if numbered and numbered[0][1].isdecimal():
        del numbered[0]
    commas = bool(numbered) and "," in numbered[0][1]
    header: list[str] = []
    if numbered and not _is_number(_cells(numbered[0][1], commas)[-1]):
        header = _cells(numbered.pop(0)[1], commas)
    name_at = header.index(NAME) if NAME in header else 0
    places = [k for k, name in enumerate(header) if name and not (k == name_at and (commas or name == NAME))]
    named = [header[k] for k in places]
    width = len(columns or named)
    if width == 0:
        raise DataError(f"{path} has no header line to name its columns")
    twice = [name for name, count in Counter(name.lower() for name in named).items() if count > 1]
    if twice or (columns and named and len(named) != width):
        what = f"the column {twice[0]!r} twice" if twice else f"the columns {', '.join(named)}"
        raise DataError(f"{path} has {what}; it must have {', '.join(columns or ('each once',))}")
    order = [named.index(name) for name in columns] if columns and {*columns} == {*named} else list(range(width))

    # From the right: what is left of the numbers is the name, with whatever spaces it has.
    if commas:
        places = places or list(range(1, width + 1))
        cells = max(len(header), width + 1)  # a header with fewer names than columns fits no line
        parts = [_comma_separated(line, name_at, places, cells) for _, line in numbered]
    else:
        parts = [line.rsplit(None, width) for _, line in numbered]
    parse = lists.whole if whole else _number
    rows = [[parse(text) for text in part[1:]] for part in parts]
    bad = [k for k, row in enumerate(rows) if len(row) != width or None in row]
    if bad:
        line, text = numbered[bad[0]]
        numbers = all(_number(word) is not None for word in parts[bad[0]][1:]) and len(rows[bad[0]]) == width
        what = "no good" if numbers else f"not a file name and {width} numbers"
        must = "; it must be a whole number of at most 18 digits, without an exponent" if numbers else ""
        raise DataError(
            f"{path}: {len(bad)} of {len(parts)} lines are {what} (first: {lists.shown(text)} in line {line}){must}"
        )
    values = np.array(rows, np.int64 if whole else np.float64).reshape(-1, width)[:, order]
    ordered = tuple(named[k] for k in order) if named else ()
    return _checked(path, ordered, [part[0] for part in parts], [line for line, _ in numbered], values)


def require_agreement(one: Table, other: Table) -> None:
    """Refuses two copies of a list that say different things of a picture.

    Raises:
        DataError: with the first of them.
    """
    common = [name for name in one.rows if name in other.rows]
    mine, theirs = one.values[[one.rows[name] for name in common]], other.values[[other.rows[name] for name in common]]
    differ = mine.shape != theirs.shape or np.flatnonzero(_differ(mine, theirs).any(axis=1))
    if differ is True or len(differ):
        first = f" of {_printable(common[differ[0]])}" if differ is not True else ""
        raise DataError(f"{one.path} and {other.path} say different things{first}; keep one of them")


def stem(name: str) -> str:
    """A name without its extension; "1.jpg 0", from a line with more numbers than its header has names, has none."""
    before, extension = os.path.splitext(name)
    return name if " " in extension else before


def _checked(path: Path, header: tuple[str, ...], files: list[str], lines: list[int], values: NDArray[Any]) -> Table:
    rows = {stem(name): row for row, name in enumerate(files)}
    if len(rows) < len(files):  # named twice: allowed where both lines say the same
        last = np.array([rows[stem(name)] for name in files])
        clash = np.flatnonzero(_differ(values, values[last]).any(axis=1))
        if len(clash) > 0:
            one, other = clash[0], last[clash[0]]
            raise DataError(
                f"{path} says different things of {len(clash)} pictures (first: {_printable(files[one])}, "
                f"{_text(values[one])} and {_text(values[other])} in lines {lines[one]} and {lines[other]}); keep one "
                "line for each"
            )
    return Table(path, header, files, lines, rows, values)


def _differ(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray((one != other) & ~((one != one) & (other != other)))  # unknown is like unknown


def _cells(line: str, commas: bool) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line]))] if commas else line.split()
    except csv.Error:  # a cell without an end
        return [line]


def _comma_separated(line: str, name_at: int, places: Sequence[int], width: int) -> list[str]:
    """[name, number, ...] of a line; what is left empty is unknown."""
    cells = _cells(line, True)
    return [cells[name_at], *(cells[k] or "nan" for k in places)] if len(cells) == width else cells[:1]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> float | None:
    """A number that is finite, or NaN; no spelling that only Python knows."""
    if not _is_number(text) or "_" in text or not text.isascii() or math.isinf(float(text)):
        return None
    return float(text)


def _text(values: NDArray[Any]) -> str:
    return " ".join(f"{value:.17g}" if isinstance(value, float) else str(value) for value in values[:10].tolist())


def _printable(name: str) -> str:
    return printable(os.fsencode(name))
