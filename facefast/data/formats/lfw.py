"""Reads Labeled Faces in the Wild, and pairs.txt files in its format for any folder of people.

Format: the README of LFW (Huang et al., 2007).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from facefast.data.formats.folder import read_folder
from facefast.data.index import FaceIndex, PairSet, printable
from facefast.data.lists import read_lines, require_text, shown
from facefast.data.walk import holds_picture, is_folder, top_entries
from facefast.runtime.exits import DataError

PAIRS = "pairs.txt"
MOST_FOLDS = 1000
FOLDERS = ("lfw", "lfw_funneled", "lfw-funneled", "lfw-deepfunneled", "images")


def read_lfw(root: str | os.PathLike[str], pairs: str | os.PathLike[str] | None = None) -> tuple[FaceIndex, PairSet]:
    """The people in `root`, or in `root/lfw`, and the pairs of `pairs` or else `root/pairs.txt`.

    Raises:
        ValueError: there is no such file of pairs, or no picture.
        DataError: a line of it is damaged or names a picture that is not there.
    """
    base = Path(root)
    listing = base / PAIRS if pairs is None else Path(pairs)
    if not listing.is_file():
        raise ValueError(f"{listing} does not exist; name a pairs.txt, or use format folder")
    people = _people(base)
    index = read_folder(people)
    return index, read_pairs(index, listing)


def recognises_lfw(root: Path) -> bool:
    """Whether `root` holds a pairs.txt."""
    return (root / PAIRS).is_file()


def read_pairs(index: FaceIndex, path: str | os.PathLike[str]) -> PairSet:
    """Pairs of `index` from a file in LFW's format.

    A line is `name i j` (pictures i and j of one person) or `name i other j`, between tabs or
    blanks; picture i of a person is a file `name_%04d` with any extension in any folder, that of the
    person first. The first line may give the number of folds, and of pairs of each kind in a fold, or that of all pairs
    of each kind; without folds there are 10.

    Raises:
        DataError: a line is damaged, pairs a picture with itself or names one that is not in the index.
    """
    lines = [(number, _words(line)) for number, line in read_lines(path)]
    head = [int(word) for word in lines.pop(0)[1]] if lines and _is_head(lines[0][1]) else []
    bad = [(number, words) for number, words in lines if not _is_pair(words)]
    if bad:
        number, words = bad[0]
        raise DataError(
            f"{path}: {len(bad)} of {len(lines)} lines are no pairs (first: "
            f"{shown(' '.join(words))} in line {number}); write `name i j` or `name i other j`, of two different people"
        )
    announced = 2 * head[-1] * (head[0] if len(head) == 2 else 1) if head else len(lines)
    if len(lines) != announced:
        what = f"{head[0]} folds of 2 x {head[1]} pairs" if len(head) == 2 else f"2 x {head[0]} pairs"
        raise DataError(
            f"{path} announces {what} and has {len(lines)} pairs; take a whole copy, or leave the first line out"
        )
    rows = _rows_by_name(index)
    left: list[int] = []
    right: list[int] = []
    absent: list[tuple[int, str]] = []
    for number, words in lines:
        other = words[2] if len(words) == 4 else words[0]
        for side, name, picture in ((left, words[0], words[1]), (right, other, words[-1])):
            row = _row(index, rows, name, picture, f"{path}, line {number}")
            if row is None:
                absent.append((number, _picture(name, picture)))
            side.append(row or 0)
        if len(words) == 3 and int(words[1]) == int(words[2]):
            name = shown(_picture(*words[:2]))
            raise DataError(f"{path}, line {number}: {name} is paired with itself; take the line out")
    if absent:
        number, name = absent[0]
        require_text(path, number, name)
        raise DataError(
            f"{path} names {len(absent)} pictures that are not in {index.root} (first: "
            f"{shown(name)[1:-1]} in line {number}); give the folder that the pairs were made for"
        )
    same = np.array([len(words) == 3 for _, words in lines], bool)
    return PairSet.of(left, right, same, head[0] if len(head) == 2 else 10)


def _people(base: Path) -> Path:
    """The one folder of LFW's pictures in `base`, or `base` itself."""
    holding = [os.fsdecode(entry.name) for entry in top_entries(base) if is_folder(entry) and holds_picture(entry.path)]
    editions = [name for name in FOLDERS if name in holding]
    if editions and len(holding) > 1:
        others = [name for name in holding if name != editions[0]]
        raise DataError(
            f"{base} holds pictures in {editions[0]} and in {len(others)} other folders (first: "
            f"{printable(os.fsencode(others[0]))}); move the others away, or give --data.root {base / editions[0]} and "
            "the pairs by --pairs"
        )
    return base / editions[0] if editions else base


def _rows_by_name(index: FaceIndex) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(index.paths.tolist()):
        rows.setdefault(_stem(path), []).append(row)
    return rows


def _row(index: FaceIndex, rows: dict[str, list[int]], name: str, number: str, where: str) -> int | None:
    """The row of a person's picture; of several of that name, the one in the person's own folder."""
    found = rows.get(_picture(name, number), [])
    if len(found) > 1:
        own = [row for row in found if os.fsdecode(os.path.dirname(index.paths[row])).rpartition("/")[2] == name]
        if len(own) != 1:
            raise DataError(
                f"{where}: {_picture(name, number)} may be {index.name(found[0])} or {index.name(found[1])} in "
                f"{index.root}; leave one of them there"
            )
        found = own
    return found[0] if found else None


def _words(line: str) -> list[str]:
    return [word.strip() for word in (line.split("\t") if "\t" in line else line.split())]


def is_lfw_line(words: Sequence[str]) -> bool:
    """Whether the words of a list's first line are LFW's: the number of folds and pairs, or a pair."""
    return _is_head(words) or _is_pair(words)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 9


def _is_head(words: Sequence[str]) -> bool:
    return len(words) <= 2 and all(map(_is_number, words)) and (len(words) == 1 or 0 < int(words[0]) <= MOST_FOLDS)


def _is_pair(words: Sequence[str]) -> bool:
    numbered = len(words) in (3, 4) and _is_number(words[1]) and _is_number(words[-1])
    return numbered and (len(words) == 3 or words[0] != words[2])


def _picture(name: str, number: str) -> str:
    return f"{name}_{int(number):04d}"


def _stem(path: bytes) -> str:
    return os.path.splitext(os.path.basename(os.fsdecode(path)))[0]
