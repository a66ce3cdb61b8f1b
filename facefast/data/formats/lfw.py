"""Reads Labeled Faces in the Wild, and pairs.txt files in its format for any folder of people.

Format: the README of LFW (Huang et al., 2007).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from facefast.data.formats.folder import read_folder
from facefast.data.index import FaceIndex, PairSet
from facefast.runtime.exits import DataError

PAIRS = "pairs.txt"
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
    people = next((base / name for name in FOLDERS if (base / name).is_dir()), base)
    index = read_folder(people)
    return index, read_pairs(index, listing)


def recognises_lfw(root: Path) -> bool:
    """Whether `root` holds a pairs.txt."""
    return (root / PAIRS).is_file()


def read_pairs(index: FaceIndex, path: str | os.PathLike[str]) -> PairSet:
    """Pairs of `index` from a file in LFW's format.

    A line is `name i j` (pictures i and j of one person) or `name i other j`, between tabs or
    blanks; picture i of a person is a file `name_%04d` with any extension in any folder. The first
    line may give the number of folds, and of pairs of each kind in a fold; else there are 10 folds.

    Raises:
        DataError: a line is damaged or names a picture that is not in the index.
    """
    text = Path(path).read_text(encoding="utf-8-sig")
    lines = [_words(line) for line in text.split("\n") if line.strip()]
    head = [int(word) for word in lines.pop(0)] if lines and _is_head(lines[0]) else []
    bad = [words for words in lines if not _is_pair(words)]
    if bad:
        raise DataError(
            f"{path}: {len(bad)} of {len(lines)} lines are no pairs (first: "
            f"{' '.join(bad[0])[:80]!r}); write `name i j` or `name i other j`"
        )
    if len(head) == 2 and len(lines) != head[0] * 2 * head[1]:
        raise DataError(
            f"{path} announces {head[0]} folds of 2 x {head[1]} pairs and has {len(lines)} pairs; "
            "take a whole copy, or leave the first line out"
        )
    left = [_picture(words[0], words[1]) for words in lines]
    right = [_picture(words[0 if len(words) == 3 else 2], words[-1]) for words in lines]
    rows = {_stem(path): row for row, path in enumerate(index.paths.tolist())}
    absent = [name for pair in zip(left, right, strict=True) for name in pair if name not in rows]
    if absent:
        raise DataError(
            f"{path} names {len(absent)} pictures that are not in {index.root} (first: "
            f"{absent[0]}); give the folder that the pairs were made for"
        )
    same = np.array([len(words) == 3 for words in lines], bool)
    folds = head[0] if len(head) == 2 else 10
    return PairSet.of([rows[name] for name in left], [rows[name] for name in right], same, folds)


def _words(line: str) -> list[str]:
    return [word.strip() for word in (line.split("\t") if "\t" in line else line.split())]


def _is_head(words: list[str]) -> bool:
    return len(words) <= 2 and all(word.isdecimal() for word in words)


def _is_pair(words: list[str]) -> bool:
    return len(words) in (3, 4) and words[1].isdecimal() and words[-1].isdecimal()


def _picture(name: str, number: str) -> str:
    return f"{name}_{int(number):04d}"


def _stem(path: bytes) -> str:
    return os.path.splitext(os.path.basename(os.fsdecode(path)))[0]
