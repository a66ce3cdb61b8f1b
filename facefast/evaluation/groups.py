"""Error rates of groups of people at one threshold: whom a model fails more often than others."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facefast.data import FaceIndex, PairSet
from facefast.data.lists import read_lines, shown
from facefast.evaluation.intervals import error_interval
from facefast.evaluation.metrics import Interval
from facefast.evaluation.pairs import PairScores
from facefast.evaluation.thresholds import PairThreshold
from facefast.runtime.exits import DataError

MOST_GROUPS = 50
"""Of one attribute or column."""
Words = NDArray[np.str_]


@dataclass(frozen=True)
class GroupErrors:
    """What a threshold does to pairs inside of one group."""

    column: str
    group: str
    pictures: int
    people: int
    genuine: int
    impostors: int
    fnmr: float | None
    fnmr_interval: Interval | None
    fmr: float | None
    fmr_interval: Interval | None

    def to_json(self) -> dict[str, Any]:
        """A JSON value; what no pair can show is null."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def read_groups(wish: str, index: FaceIndex) -> dict[str, Words]:
    """The group of each row, "" where it is not known, by the name of each column.

    Args:
        wish: the name of an attribute of the index, or the path of a CSV file whose first line names its columns: path
            (relative to the index's root) and others, each of which divides the pictures in its own way.
        index: the pictures.

    Raises:
        ValueError: it is neither.
        DataError: a line is damaged, a path stands twice, no picture of the index is named, or groups are too many.
    """
    if wish in index.attribute_names and index.attributes is not None:
        values = index.attributes[:, index.attribute_names.index(wish)].tolist()
        return {wish: _few(wish, np.array(["" if value != value else f"{value:g}" for value in values], np.str_))}
    if not Path(wish).is_file():
        known = ", ".join(index.attribute_names) or "none"
        raise ValueError(f"groups {wish} is neither a CSV file nor an attribute of {index.root} (attributes: {known})")
    lines = read_lines(wish)
    rows = [next(csv.reader([line], skipinitialspace=True), []) for _, line in lines]
    head = [word.strip() for word in rows[0]] if rows else []
    if "path" not in head or len(head) < 2:
        raise DataError(
            f"{wish}: the first line is {shown(','.join(head))}; name the columns, path and others: path,age"
        )
    at = head.index("path")
    found: dict[str, list[str]] = {}
    for (number, line), words in zip(lines[1:], rows[1:], strict=True):
        if len(words) != len(head):
            raise DataError(f"{wish}, line {number}: {shown(line)} has {len(words)} columns instead of {len(head)}")
        path = words[at].strip()
        path = os.path.relpath(path, index.root) if os.path.isabs(path) else os.path.normpath(path)
        if path in found:
            raise DataError(f"{wish}, line {number}: {shown(path)} stands there a second time; take one of them out")
        found[path] = [word.strip() for word in words]
    names = [os.fsdecode(path) for path in index.paths.tolist()]
    if not any(name in found for name in names):
        raise DataError(
            f"{wish} names no picture of {index.root} (it has {names[0]}); paths are relative to --data.root"
        )
    nothing = [""] * len(head)
    table = np.array([found.get(name, nothing) for name in names], np.str_)
    return {column: _few(column, table[:, k]) for k, column in enumerate(head) if k != at}


def _few(column: str, values: Words) -> Words:
    count = len(np.unique(values[values != ""]))
    if not 0 < count <= MOST_GROUPS:
        raise DataError(
            f"{column} has {count} different values; from 1 to {MOST_GROUPS} make groups: give ranges by a CSV"
        )
    return values


def group_errors(
    groups: dict[str, Words],
    index: FaceIndex,
    pairs_of: Callable[[NDArray[np.bool_]], PairScores | None],
    threshold: PairThreshold,
) -> list[GroupErrors]:
    """FMR and FNMR of every group, between two pictures of the group.

    Args:
        groups: of `read_groups`.
        index: the pictures.
        pairs_of: the scored pairs inside of a mask [N] of rows, None where there are none.
        threshold: of all pictures together.
    """
    value = threshold.require()
    found = []
    for column, values in groups.items():
        for group in np.unique(values[values != ""]).tolist():
            inside = values == group
            scored = pairs_of(inside)
            errors: dict[str, Any] = {"fnmr": None, "fnmr_interval": None, "fmr": None, "fmr_interval": None}
            genuine = impostors = 0
            if scored is not None:
                genuine, impostors = int(scored.same.sum()), int((~scored.same).sum())
                missed, accepted = scored.scores[scored.same] < value, scored.scores[~scored.same] >= value
                if genuine:
                    errors |= {"fnmr": float(missed.mean())}
                    errors |= {"fnmr_interval": error_interval(missed, scored.one[scored.same])}
                if impostors:
                    sides = scored.one[~scored.same], scored.other[~scored.same]
                    errors |= {"fmr": float(accepted.mean()), "fmr_interval": error_interval(accepted, *sides)}
            people = len(np.unique(index.labels[inside & (index.labels >= 0)]))
            found.append(GroupErrors(column, group, int(inside.sum()), people, genuine, impostors, **errors))
    return found


def part_of(pairs: PairSet, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[P] whether both pictures of a pair are inside of a mask of rows."""
    both: NDArray[np.bool_] = inside[pairs.left] & inside[pairs.right]
    return both
