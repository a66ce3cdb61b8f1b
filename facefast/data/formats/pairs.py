"""Lists of pairs in any of their forms, and templates (sets of pictures of a person) as the IJB sets have them.

Of pictures, only those that a list names are read.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facefast.data.formats.lfw import is_lfw_line, read_lfw
from facefast.data.index import FaceIndex, PairSet, number_classes, printable
from facefast.data.lists import read_lines, require_text, shown, whole
from facefast.runtime.exits import DataError

SAME = ("1", "true", "yes", "same", "match", "genuine", "1.0")
DIFFERENT = ("0", "-1", "false", "no", "different", "nonmatch", "non-match", "impostor", "0.0", "-1.0")
"""How lists say whether a pair is of one person."""
_PICTURE = ("path", "file", "filename", "image", "img", "picture", "photo", "name")
COLUMNS = {
    "first": ("a", "left", "first", *(f"{word}{end}" for word in _PICTURE for end in "1a")),
    "second": ("b", "right", "second", *(f"{word}{end}" for word in _PICTURE for end in "2b")),
    "label": ("label", "same", "issame", "match", "ismatch", "target", "genuine"),
    "fold": ("fold",),
}
"""Names of the columns of pairs, in small letters and without what is no letter or number."""
MEDIA_COLUMNS = {
    "path": _PICTURE,
    "template": ("templateid", "template", "tid"),
    "subject": ("subjectid", "subject", "sid", "identity", "person"),
    "media": ("mediaid", "media", "mid", "sightingid", "video"),
}
"""Names of the columns of a list of media, likewise."""
TEMPLATE_COLUMNS = {
    "first": ("enrolltemplateid", "template1", "templateid1", "tid1", "t1", "a", "left", "first"),
    "second": ("veriftemplateid", "template2", "templateid2", "tid2", "t2", "b", "right", "second"),
    "label": COLUMNS["label"],
}
"""Names of the columns of pairs of templates, likewise."""
MOST_PAIRS = 2_000_000
"""Of templates, where no list names them."""


def read_pair_list(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> tuple[FaceIndex, PairSet]:
    """The pictures that a list of pairs names, and the pairs.

    The list is LFW's pairs.txt; or has a pair a line, `a b label` or `label a b`, between tabs, commas, semicolons or
    blanks; or columns with names, see `COLUMNS`, of which fold may be missing. Paths are relative to `root`; a label is
    one of `SAME` or `DIFFERENT`. Pictures are of the person whose folder they are in, where that agrees with all pairs,
    else those that pairs of one person connect are of one.

    Raises:
        ValueError: `root` or the list is not there.
        DataError: a line is damaged, pairs a picture with itself, contradicts another, or names a picture that is not
            there.
    """
    if not os.path.isdir(root):
        raise ValueError(
            f"{os.fspath(root) or repr('')} is no folder; give --data.root, that of the pictures in {path}"
        )
    table = _read_table(path, COLUMNS, lfw=True)
    if table.columns is None and is_lfw_line(table.lines[0][1]):
        return only_named(*read_lfw(root, path))
    first, second, label, fold = _columns_of_pairs(table, path)
    pictures = _Pictures(root, path)
    left: list[int] = []
    right: list[int] = []
    same: list[bool] = []
    for number, words in table.lines:
        left.append(pictures.row(words[first], number))
        right.append(pictures.row(words[second], number))
        same.append(_same(words[label], path, number))
        if left[-1] == right[-1]:
            raise DataError(f"{path}, line {number}: {shown(words[first])} is paired with itself; take the line out")
    pictures.require_all()
    _require_agreement(path, table.lines, left, right, same)
    kinds = np.array(same, bool)
    pairs = PairSet.of(left, right, kinds)
    if fold is not None:
        _, folds = np.unique([words[fold] for _, words in table.lines], return_inverse=True)
        pairs = PairSet(pairs.left, pairs.right, kinds, folds.astype(np.int16))
    labels, names = number_classes(_people(pictures.paths, pairs))
    return FaceIndex.build(root, pictures.paths, labels, names), pairs


def only_named(index: FaceIndex, pairs: PairSet) -> tuple[FaceIndex, PairSet]:
    """The rows that pairs name, and the pairs of those."""
    rows, places = np.unique(np.concatenate([pairs.left, pairs.right]), return_inverse=True)
    left, right = np.split(places.astype(np.int64), 2)
    return index.select(rows), PairSet(left, right, pairs.same, pairs.folds)


@dataclass(frozen=True, eq=False)
class TemplateSet:
    """T templates of pictures of one person each, and pairs of templates."""

    index: FaceIndex
    """The pictures; labels are the subjects', where they are known."""
    rows: NDArray[np.int64]
    """[M] picture of each member; one may be in several templates."""
    templates: NDArray[np.int64]
    """[M] the member's template, from 0."""
    media: NDArray[np.int64]
    """[M] the member's medium, numbered through all templates: frames of one video weigh as much as one photograph."""
    names: tuple[str, ...]
    """[T] as the list has them."""
    subjects: NDArray[np.int64]
    """[T] person of each template, -1 where the list does not say."""
    pairs: PairSet
    """Rows are templates."""

    def of(self, index: FaceIndex) -> TemplateSet:
        """The same with another index of the same rows, such as a scanned one."""
        return dataclasses.replace(self, index=index)


def read_templates(
    root: str | os.PathLike[str], media: str | os.PathLike[str], pairs: str | os.PathLike[str] | None = None
) -> TemplateSet:
    """Templates from a list of media, and pairs of them.

    A line of the list is `path template media`, as InsightFace's ijbc_face_tid_mid.txt has it, `path template subject
    media`, or has columns with names, see `MEDIA_COLUMNS`, as the protocols of IJB-A, -B and -C do. A line of `pairs`
    is `template template`, whose label the subjects give, or `template template label`. Without it all pairs of
    templates are taken.

    Raises:
        ValueError: `root` or a list is not there, or there are too many templates for all of their pairs.
        DataError: a line is damaged, a template has two subjects or is not in the list, a picture is not there, or
            nothing tells which pairs are of one person.
    """
    if not os.path.isdir(root):
        raise ValueError(
            f"{os.fspath(root) or repr('')} is no folder; give --data.root, that of the pictures in {media}"
        )
    table = _read_table(media, MEDIA_COLUMNS)
    columns = table.columns or {3: _MEDIA_OF_3, 4: _MEDIA_OF_4}.get(len(table.lines[0][1]), {})
    if not {"path", "template"} <= columns.keys():
        raise DataError(
            f"{media}: {shown(' '.join(table.lines[0][1]))} is no `path template media`; write that, `path template "
            "subject media`, or name the columns FILENAME, TEMPLATE_ID, SUBJECT_ID, MEDIA_ID in the first line"
        )
    pictures = _Pictures(root, media)
    template_numbers: dict[str, int] = {}
    media_numbers: dict[tuple[int, str], int] = {}
    subjects: dict[int, str] = {}
    rows, templates, media_of, subject_of_row = [], [], [], {}
    for number, words in table.lines:
        row = pictures.row(words[columns["path"]], number)
        template = template_numbers.setdefault(words[columns["template"]], len(template_numbers))
        medium = words[columns["media"]] if "media" in columns else f"{row}"
        media_of.append(media_numbers.setdefault((template, medium), len(media_numbers)))
        rows.append(row)
        templates.append(template)
        if "subject" in columns:
            subject = words[columns["subject"]]
            if subjects.setdefault(template, subject) != subject:
                raise DataError(
                    f"{media}, line {number}: template {shown(words[columns['template']])} is of subject "
                    f"{shown(subjects[template])} and of {shown(subject)}; a template is of one person"
                )
            subject_of_row[row] = subject
    pictures.require_all()
    names = [printable(os.fsencode(subject_of_row.get(row, ""))) for row in range(len(pictures.paths))]
    labels, class_names = number_classes(names)
    places = {subject: k for k, subject in enumerate(dict.fromkeys(subjects.values()))}
    people = np.array([places.get(subjects.get(k, ""), -1) for k in range(len(template_numbers))], np.int64)
    return TemplateSet(
        FaceIndex.build(root, pictures.paths, labels, class_names),
        np.array(rows, np.int64),
        np.array(templates, np.int64),
        np.array(media_of, np.int64),
        tuple(template_numbers),
        people,
        _template_pairs(template_numbers, people, media, pairs),
    )


_MEDIA_OF_3 = {"path": 0, "template": 1, "media": 2}
_MEDIA_OF_4 = {"path": 0, "template": 1, "subject": 2, "media": 3}


def _template_pairs(
    numbers: Mapping[str, int],
    people: NDArray[np.int64],
    media: str | os.PathLike[str],
    path: str | os.PathLike[str] | None,
) -> PairSet:
    if path is None:
        if (people < 0).any():
            raise DataError(f"{media} names no subjects, so nothing tells which pairs are of one person; give --pairs")
        count = len(people) * (len(people) - 1) // 2
        if not 0 < count <= MOST_PAIRS:
            raise ValueError(
                f"{len(people)} templates have {count} pairs; from 1 to {MOST_PAIRS} are taken: give --pairs"
            )
        left, right = np.triu_indices(len(people), 1)
        return PairSet.of(left, right, people[left] == people[right])
    table = _read_table(path, TEMPLATE_COLUMNS)
    columns = table.columns or dict(zip(("first", "second", "label"), range(len(table.lines[0][1])), strict=False))
    sides: tuple[list[int], list[int]] = ([], [])
    same = []
    for number, words in table.lines:
        for side, name in zip(sides, ("first", "second"), strict=True):
            word = words[columns[name]] if name in columns else ""
            if word not in numbers:
                raise DataError(
                    f"{path}, line {number}: template {shown(word)} is not in {media}; give both of one set"
                )
            side.append(numbers[word])
        if sides[0][-1] == sides[1][-1]:
            raise DataError(f"{path}, line {number}: template {shown(word)} is paired with itself; take the line out")
        if "label" in columns:
            same.append(_same(words[columns["label"]], path, number))
        elif min(people[sides[0][-1]], people[sides[1][-1]]) < 0:
            raise DataError(f"{path}, line {number}: no label, and {media} names no subjects; add either")
        else:
            same.append(bool(people[sides[0][-1]] == people[sides[1][-1]]))
    return PairSet.of(*sides, np.array(same, bool))


class _Pictures:
    """Pictures below a folder by the paths in a list, numbered in the order of their appearance."""

    def __init__(self, root: str | os.PathLike[str], listing: str | os.PathLike[str]) -> None:
        self.root = os.path.abspath(root)
        self.listing = listing
        self.paths: list[bytes] = []
        self._rows: dict[str, int] = {}
        self._absent: list[tuple[str, int]] = []

    def row(self, word: str, number: int) -> int:
        """The row of a picture that line `number` names."""
        if word not in self._rows:
            inside = os.path.relpath(word, self.root) if os.path.isabs(word) else os.path.normpath(word)
            if inside != word and inside in self._rows:
                self._rows[word] = self._rows[inside]
                return self._rows[word]
            if inside.split("/", 1)[0] == ".." or not os.path.isfile(os.path.join(self.root, inside)):
                self._absent.append((word, number))
            self._rows[word] = self._rows[inside] = len(self.paths)
            self.paths.append(os.fsencode(inside))
        return self._rows[word]

    def require_all(self) -> None:
        """Refuses a list that names pictures which are not there."""
        if self._absent:
            word, number = self._absent[0]
            require_text(self.listing, number, word)
            raise DataError(
                f"{os.fspath(self.listing)} names {len(self._absent)} of {len(self.paths)} pictures that are not in "
                f"{self.root} (first: {shown(word)} in line {number}); paths are relative to --data.root: give the "
                "folder that the list was made for"
            )


@dataclass(frozen=True)
class _Table:
    lines: list[tuple[int, list[str]]]
    """Without the names of columns."""
    columns: dict[str, int] | None
    """Places by what they hold, where the first line names them."""


def _read_table(path: str | os.PathLike[str], known: Mapping[str, Sequence[str]], lfw: bool = False) -> _Table:
    """Lines in columns, all of the same number but in LFW's own form, where that may occur."""
    if not Path(path).exists():
        raise ValueError(f"{os.fspath(path)} does not exist; give the list's file")
    raw = read_lines(path)
    if not raw:
        raise DataError(f"{os.fspath(path)} has no line; give a list of pairs")
    split = _splitter(raw[0][1])
    lines = [(number, [word.strip() for word in split(line)]) for number, line in raw]
    words = [re.sub("[^a-z0-9]", "", word.lower()) for word in lines[0][1]]
    columns = {what: k for what, names in known.items() for k, word in enumerate(words) if word in names}
    named = len(columns) >= 2 and (columns.keys() & {"label", "template", "first"}) and _is_head(lines[0][1])
    if named:
        lines.pop(0)
        if not lines:
            raise DataError(f"{os.fspath(path)} has no line below the names of its columns")
    width = len(words) if named else len(lines[0][1])
    if named or not (lfw and is_lfw_line(lines[0][1])):
        bad = [(number, line) for number, line in lines if len(line) != width]
        if bad:
            number, line = bad[0]
            raise DataError(
                f"{os.fspath(path)}: {len(bad)} of {len(lines)} lines have not {width} columns as the first one has "
                f"(first: {shown(' '.join(line))} in line {number}); where a path holds blanks, write commas or tabs"
            )
    return _Table(lines, columns if named else None)


def _splitter(line: str) -> Callable[[str], list[str]]:
    for mark in "\t,;":
        if mark in line:
            return lambda text: next(csv.reader([text], delimiter=mark, skipinitialspace=True), [])
    return str.split


def _is_head(words: Sequence[str]) -> bool:
    """Names of columns are no paths and no numbers."""
    return not any("/" in word or "." in word or whole(word) is not None for word in words)


def _columns_of_pairs(table: _Table, path: str | os.PathLike[str]) -> tuple[int, int, int, int | None]:
    """Places of both pictures, the label, and the fold where there is one."""
    if table.columns is not None:
        if {"first", "second", "label"} <= table.columns.keys():
            first, second, label = (table.columns[name] for name in ("first", "second", "label"))
            return first, second, label, table.columns.get("fold")
        raise DataError(
            f"{os.fspath(path)}: the first line names columns for {', '.join(table.columns)}; columns of both pictures "
            "and of the label are needed, such as a,b,label"
        )
    number, words = table.lines[0]
    if len(words) == 3:
        if words[2].lower() in SAME + DIFFERENT:
            return 0, 1, 2, None
        if words[0].lower() in SAME + DIFFERENT:
            return 1, 2, 0, None
    raise DataError(
        f"{os.fspath(path)}, line {number} is no pair: {shown(' '.join(words))}; write `a b label` with a label of 1 "
        "or 0, LFW's pairs.txt, or columns with names: a,b,label"
    )


def _same(word: str, path: str | os.PathLike[str], number: int) -> bool:
    if word.lower() not in SAME + DIFFERENT:
        raise DataError(
            f"{os.fspath(path)}, line {number}: the label is {shown(word)}; it must be 1 (one person) or 0 (two)"
        )
    return word.lower() in SAME


def _require_agreement(
    path: str | os.PathLike[str],
    lines: Sequence[tuple[int, list[str]]],
    left: Sequence[int],
    right: Sequence[int],
    same: Sequence[bool],
) -> None:
    labels: dict[tuple[int, int], tuple[bool, int]] = {}
    for (number, _), one, other, kind in zip(lines, left, right, same, strict=True):
        before, where = labels.setdefault((min(one, other), max(one, other)), (kind, number))
        if before != kind:
            raise DataError(
                f"{os.fspath(path)}: lines {where} and {number} are of the same two pictures and have different labels"
            )


def _people(paths: Sequence[bytes], pairs: PairSet) -> list[str]:
    """A name for each picture: its folder, where no pair contradicts that, or the first picture of those that pairs of
    one person connect."""
    folders = [os.path.dirname(path) for path in paths]
    agrees = all(
        bool(folders[one]) and (folders[one] == folders[other]) == kind
        for one, other, kind in zip(pairs.left.tolist(), pairs.right.tolist(), pairs.same.tolist(), strict=True)
    )
    if agrees:
        own = {folder: os.path.basename(folder) for folder in folders}
        short = len(set(own.values())) == len(own)  # as a folder per person is read, where that is unequivocal
        return [printable(own[folder] if short else folder) for folder in folders]
    parent = list(range(len(paths)))

    def top(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for one, other in zip(pairs.left[pairs.same].tolist(), pairs.right[pairs.same].tolist(), strict=True):
        one, other = sorted((top(one), top(other)))
        parent[other] = one
    return [printable(paths[top(row)]) for row in range(len(paths))]
