"""What people decide about a data set, as CSV files that can be edited, and applying them to an index.

suspects.csv has a line for each finding about a label: lines that are not true are deleted, or their action is changed.
labels.csv has a line for each picture that got a name.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from facefast.data.index import FaceIndex
from facefast.runtime.files import replacing
from facefast.runtime.untrusted import open_regular

ACTIONS = ("drop", "keep", "relabel", "merge")
KINDS = ("wrong_label", "duplicate", "merge")
SHOWN = 5
"""Lines that an error names."""
MOST_LINES = 1 << 26
LONGEST_LINE = 1 << 18
"""Bytes; a cell may have half as many (the csv module's own limit)."""

T = TypeVar("T")


@dataclass(frozen=True)
class Correction:
    """A line of suspects.csv; its fields are the columns."""

    kind: str
    """wrong_label: the picture shows another person. duplicate: it is a copy of `other_path`. merge: `identity` and
    `suggested` are one person."""
    path: str
    """The picture, as `FaceIndex.name` writes it; of a merge, a typical one of `identity`."""
    identity: str
    """What it is labelled as; empty without a label."""
    suggested: str
    """The identity it seems to show; empty where it is none of this set."""
    action: str
    """drop leaves the picture out; relabel gives it the name `suggested`; merge gives that to all of `identity`; keep
    changes nothing."""
    confidence: float = 1.0
    """How sure this is, 0 to 1."""
    score: float = math.nan
    """Cosine of the picture with the rest of its identity; empty without a rest."""
    other_score: float = math.nan
    """Cosine with `suggested`, or with `other_path` for a copy."""
    other_path: str = ""
    """The picture that stays, of two copies; a typical one of `suggested`, of a merge."""


@dataclass(frozen=True)
class Label:
    """A line of labels.csv; its fields are the columns."""

    path: str
    identity: str
    """Empty where no name was sure enough."""
    confidence: float
    """How sure this is, 0 to 1."""


def write_corrections(path: str | os.PathLike[str], corrections: Iterable[Correction]) -> None:
    """Writes suspects.csv.

    Raises:
        StorageError: it cannot be written.
    """
    _write(Path(path), Correction, corrections)


def write_labels(path: str | os.PathLike[str], labels: Iterable[Label]) -> None:
    """Writes labels.csv.

    Raises:
        StorageError: it cannot be written.
    """
    _write(Path(path), Label, labels)


def read_corrections(path: str | os.PathLike[str]) -> list[tuple[int, Correction]]:
    """(line number, correction) of each line; columns may be in any order, and those with a default may be missing.

    Raises:
        ValueError: the file is no such table, or a line has an action, a kind or a number that does not exist.
    """
    lines = list(_read(Path(path), Correction, "facefast audit"))
    faults = _Faults()
    for number, line in lines:
        for name, value, allowed in (("action", line.action, ACTIONS), ("kind", line.kind, KINDS)):
            if value not in allowed:
                faults.append((number, f"{name} {value!r:.80} is none of {', '.join(allowed)}"))
    _check(Path(path), faults)
    return lines


def read_label_lines(path: str | os.PathLike[str]) -> list[Label]:
    """The lines of labels.csv, whether or not they fit any index.

    Raises:
        ValueError: the file is no such table.
    """
    return [line for _, line in _read(Path(path), Label, "facefast label")]


def apply_corrections(index: FaceIndex, path: str | os.PathLike[str], counts: Counter[str] | None = None) -> FaceIndex:
    """The index without the pictures to drop, with labels changed and identities merged as suspects.csv says.

    A picture that one line drops is dropped, whatever others say. A merge takes along what is relabelled to it.
    Identities that are left without a picture are gone from the class names.

    Args:
        counts: is told how many pictures were `dropped` and how many of the others `renamed`.

    Raises:
        ValueError: the file is no such table, or lines do not fit the index: a picture or an identity that is not
            there, a picture with another identity than the line says, or lines that contradict each other.
    """
    path = Path(path)
    rows = _rows_by_name(index)
    names = {name: label for label, name in enumerate(index.class_names)}
    labels = index.labels.astype(np.int64)
    dropped = np.zeros(len(index), bool)
    relabelled: dict[int, int] = {}
    merged: dict[int, int] = {}
    faults = _Faults()
    for number, line in read_corrections(path):
        if line.action == "keep":
            continue
        fault = _misfit(line, index, rows, names)
        if fault:
            faults.append((number, fault))
        elif line.action == "drop":
            dropped[rows[line.path]] = True
        elif line.action == "relabel":
            row, label = rows[line.path], names[line.suggested]
            if relabelled.setdefault(row, label) != label:
                faults.append((number, f"{line.path} is relabelled twice, to {line.suggested} here"))
        else:
            one, other = _last(merged, names[line.identity]), _last(merged, names[line.suggested])
            if one != other:
                merged[one] = other
    _check(path, faults)
    # Relabel first, then merge: a picture that was relabelled to a merged identity goes along with it.
    for row, label in relabelled.items():
        labels[row] = label
    # The last entry is for label -1, which as an index is the last place.
    final = np.array([_last(merged, label) for label in range(index.num_classes)] + [-1])
    labels = final[labels]
    changed = dataclasses.replace(index, labels=labels.astype(np.int32))
    if dropped.all():
        raise ValueError(f"{path} drops all {len(index)} pictures; delete lines from it")
    if counts is not None:
        counts.update(dropped=int(dropped.sum()), renamed=int((~dropped & (labels != index.labels)).sum()))
    return changed.select(~dropped).compact()


def read_labels(index: FaceIndex, path: str | os.PathLike[str], min_confidence: float = 0.0) -> FaceIndex:
    """The index with identities for pictures that had none; new names are numbered after the known ones.

    Lines without an identity or below `min_confidence` change nothing; nor do lines that repeat a known identity.

    Raises:
        ValueError: the file is no such table, lines do not fit the index (a picture that is not there, one that has
            another identity, one named twice, a confidence outside [0, 1]), or `min_confidence` is outside [0, 1].
    """
    path = Path(path)
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"the least confidence of labels is {min_confidence}; it must lie in [0, 1]")
    rows = _rows_by_name(index)
    given: dict[int, str] = {}
    faults = _Faults()
    for number, line in _read(path, Label, "facefast label"):
        if not line.identity or line.confidence < min_confidence:
            continue
        row = rows.get(line.path, -1)
        label = int(index.labels[row]) if row >= 0 else -1
        if not 0 <= line.confidence <= 1:
            faults.append((number, f"the confidence of {line.path} is {line.confidence}, which lies outside [0, 1]"))
        elif not is_name(line.identity):
            faults.append((number, f"the identity {line.identity!r} holds a line end or a terminal's code"))
        elif row < 0:
            faults.append((number, f"{line.path} is no picture of {index.root}"))
        elif label >= 0 and index.class_names[label] != line.identity:
            faults.append((number, f"{line.path} is {index.class_names[label]} already, {line.identity} here"))
        elif given.setdefault(row, line.identity) != line.identity:
            faults.append((number, f"{line.path} is {given[row]} on a line above, {line.identity} here"))
    _check(path, faults)
    class_names = (*index.class_names, *sorted(set(given.values()) - set(index.class_names)))
    names = {name: label for label, name in enumerate(class_names)}
    labels = index.labels.copy()
    for row, name in given.items():
        labels[row] = names[name]
    return dataclasses.replace(index, labels=labels, class_names=class_names)


def is_name(text: str) -> bool:
    """Whether a person can be called so in labels.csv: a line end or a terminal's code is no part of a name."""
    return bool(text) and not any(unicodedata.category(letter) == "Cc" for letter in text)


def _rows_by_name(index: FaceIndex) -> dict[str, int]:
    rows = {index.name(row): row for row in range(len(index))}
    if len(rows) < len(index):
        twice = next(name for name, count in Counter(map(index.name, range(len(index)))).items() if count > 1)
        raise ValueError(f"{index.root} has {twice} twice, so that a line cannot tell which it means; index it anew")
    return rows


def _misfit(line: Correction, index: FaceIndex, rows: dict[str, int], names: dict[str, int]) -> str:
    """What is wrong with a line, for this index; empty if nothing is."""
    if line.action == "merge" and line.identity not in names:
        return f"there is no identity {line.identity!r} to merge"
    if line.action in ("relabel", "merge") and line.suggested not in names:
        return f"{line.action} needs an identity of this set in the column suggested, not {line.suggested!r}"
    if line.action == "merge":
        return ""
    if line.path not in rows:
        return f"{line.path} is no picture of {index.root}"
    label = int(index.labels[rows[line.path]])
    name = index.class_names[label] if label >= 0 else ""
    return "" if name == line.identity else f"{line.path} is {name or 'nobody'} here, {line.identity or 'nobody'} there"


def _last(merged: dict[int, int], label: int) -> int:
    while label in merged:
        label = merged[label]
    return label


class _Faults:
    """What is wrong with the lines of a table: the first of them, and how many there are."""

    def __init__(self) -> None:
        self.first: list[tuple[int, str]] = []
        self.count = 0

    def append(self, fault: tuple[int, str]) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((fault[0], f"{fault[1]:.1000}"))


def _check(path: Path, faults: _Faults) -> None:
    if faults.count:
        listed = "".join(f"\n  line {number}: {fault}" for number, fault in faults.first)
        more = f"\n  and {faults.count - SHOWN} more" if faults.count > SHOWN else ""
        raise ValueError(
            f"{path}: {faults.count} lines do not fit; mend or delete them, or write the file anew for these "
            f"photographs:{listed}{more}"
        )


# What a spreadsheet takes for a formula and runs, behind any apostrophes that an earlier cell of this kind has; the
# apostrophe that is put before it shows as nothing there, and `_value` takes it away again.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def _write(path: Path, kind: type[Any], lines: Iterable[Any]) -> None:
    columns = [field.name for field in dataclasses.fields(kind)]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([_text(getattr(line, column)) for column in columns] for line in lines)
    content = text.getvalue().encode()
    with replacing(path, len(content), parents=True) as aside:
        aside.write_bytes(content)


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return "'" + value if _FORMULA.match(value) else value
    return "" if math.isnan(value) else f"{value:.4f}"


def _read(path: Path, kind: Callable[..., T], command: str) -> Iterator[tuple[int, T]]:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    try:
        with open_regular(path) as file:
            yield from _lines(path, file, kind, fields, command)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {command} writes it") from error


def _texts(path: Path, file: BinaryIO, command: str) -> Iterator[str]:
    """Line after line, for a table may be longer than memory."""
    for number in range(1, MOST_LINES + 1):
        line = file.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise ValueError(f"{path}, line {number}, has more than {LONGEST_LINE} bytes; {command} writes it anew")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, is no CSV file in UTF-8 ({error.reason}); {command} writes it"
            ) from error
    raise ValueError(f"{path} has more than {MOST_LINES} lines; {command} writes it anew")


def _lines(
    path: Path, file: BinaryIO, kind: Callable[..., T], fields: Sequence[Any], command: str
) -> Iterator[tuple[int, T]]:
    reader = csv.DictReader(_texts(path, file, command))
    faults = _Faults()
    try:
        columns = list(reader.fieldnames or ())
        _check_columns(path, columns, fields, command)
        for values in reader:
            try:
                if None in values:
                    raise ValueError(f"it has more cells than the {len(columns)} columns; is a comma without quotes?")
                read = kind(**{f.name: _value(f, values[f.name]) for f in fields if values.get(f.name) is not None})
            except (TypeError, ValueError) as error:
                faults.append((reader.line_num, str(error)))
            else:
                yield reader.line_num, read
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}, is no CSV ({error}); {command} writes it") from error
    _check(path, faults)


def _check_columns(path: Path, columns: Sequence[str], fields: Sequence[Any], command: str) -> None:
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in columns]
    if missing:
        mark = "; columns are separated by commas" if any(";" in name or "\t" in name for name in columns) else ""
        raise ValueError(f"{path} has no column {', '.join(missing)}{mark}; {command} writes it")
    twice = [name for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise ValueError(f"{path} has the column {twice[0]} twice; delete one")


def _value(field: dataclasses.Field[Any], text: str) -> str | float:
    if field.type != "float":
        return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
    try:
        number = float(text) if text.strip() else math.nan
    except ValueError:
        raise ValueError(f"{field.name} is {text!r}, which is no number") from None
    if math.isinf(number) or "_" in text:
        raise ValueError(f"{field.name} is {text!r}, which is no number")
    return number
