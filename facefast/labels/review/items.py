"""What a person is asked: a finding of an audit, or a group of pictures that got one name, and the pictures beside it.

It lies in a folder: `review.npz`, an index of the pictures that are shown, and `review.jsonl`, a question a line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from facefast.data import FaceIndex
from facefast.data.corrections import Correction, Label, read_label_lines, write_labels
from facefast.labels.clustering import Floats, Numbers, neighbours
from facefast.labels.sheets import Album
from facefast.labels.suspects import Suspects
from facefast.recipe import Photographs
from facefast.runtime import files
from facefast.runtime.untrusted import open_regular

PICTURES, QUESTIONS, PROPOSED = "review.npz", "review.jsonl", "proposed.csv"
FORMAT = 1
MATES = 6
"""Pictures of a person that are shown beside the one in doubt."""
MEMBERS = 12
"""Pictures of a group that are shown."""

Task = Literal["audit", "label"]


def digest(texts: Iterable[str]) -> str:
    """Twelve bytes, in hexadecimal, that other texts do not have."""
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Item:
    """One question. Rows are those of the index of the review."""

    kind: str
    """wrong_label, duplicate, merge: a suspect. group: pictures that got one name."""
    rows: list[int]
    """What it is about: one picture, or the most and the least typical ones of a group."""
    mates: list[int]
    """Other pictures of `person`, the nearest first."""
    others: list[int]
    """Pictures of `suggested`, the nearest first; of a duplicate the picture that it is a copy of."""
    person: str
    """Whose picture it is labelled as; the name that a group was given. Empty: nobody's."""
    suggested: str
    """Whom it seems to show instead, or who comes nearest. Empty: nobody."""
    confidence: float
    score: float | None
    other_score: float | None
    size: int = 1
    """Pictures that the answer is about."""
    line: dict[str, Any] | None = None
    """The finding as a line of suspects.csv; None of a group."""
    members: str = ""
    """`digest` of the pictures of a group that the answer is about; empty of a finding."""

    @property
    def key(self) -> str:
        """The same for the same finding of another audit, or the same pictures of another clustering, and for no other
        one."""
        line = self.line or {}
        # Not whom it seems to show: that may change when more pictures come, and the answer is about this picture.
        other = self.suggested if self.kind == "merge" else str(line.get("other_path", ""))
        told = [self.kind, str(line.get("path", "")), self.person, other]
        # Clusters are numbered anew each time: the name of a group says nothing of whom it shows.
        return digest([*told, self.members] if self.members else told)

    def correction(self) -> Correction:
        """The finding, which it has where it is no group."""
        values: dict[str, Any] = {name: np.nan if value is None else value for name, value in (self.line or {}).items()}
        return Correction(**values)


@dataclass(frozen=True)
class Review:
    """All questions of one audit or clustering."""

    task: Task
    data: Photographs
    """Where they were found, as it was given."""
    index: FaceIndex
    """The pictures that are shown, with the names of all people."""
    items: tuple[Item, ...]
    proposed: tuple[Label, ...] = ()
    """Of a clustering: every picture that got a name, and which."""

    def people(self) -> tuple[str, ...]:
        """Everybody who has a name, those of groups included."""
        groups = [item.person for item in self.items if item.kind == "group"]
        return tuple(dict.fromkeys([*self.index.class_names, *groups]))

    def save(self, folder: Path) -> None:
        """Writes it; answers to an earlier one of this folder stay.

        Raises:
            StorageError: it cannot be written.
        """
        self.index.save(folder / PICTURES, parents=True)
        if self.task == "label":
            write_labels(folder / PROPOSED, self.proposed)
        header = {"format": FORMAT, "task": self.task, "root": self.data.root, "layout": self.data.format}
        lines = [header, *(dataclasses.asdict(item) for item in self.items)]
        content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
        with files.replacing(folder / QUESTIONS, len(content)) as aside:
            aside.write_bytes(content)

    @classmethod
    def load(cls, folder: Path) -> Review:
        """Reads what `save` wrote.

        Raises:
            ValueError: there is no review, or it is damaged or of another version.
        """
        path = folder / QUESTIONS
        if not path.is_file():
            raise ValueError(
                f"there is nothing to review in {folder}: it has no {QUESTIONS}; give MODEL and --data.root"
            )
        try:
            with open_regular(path) as file:
                header, *rest = map(json.loads, file)
            if header["format"] != FORMAT:
                raise ValueError(f"it has format {header['format']}, this version reads {FORMAT}")
            index, task = FaceIndex.load(folder / PICTURES), header["task"]
            items = tuple(Item(**item) for item in rest)
            for item in items:
                _check(item, index, task)
            proposed = tuple(read_label_lines(folder / PROPOSED)) if task == "label" else ()
            return cls(task, Photographs(str(header["root"]), header["layout"]), index, items, proposed)
        except (KeyError, TypeError, ValueError, RecursionError, OSError) as error:
            raise ValueError(f"{path} is no review that can be gone on with ({error}); run the command anew") from error


def _check(item: Item, index: FaceIndex, task: str) -> None:
    rows = [*item.rows, *item.mates, *item.others]
    if not item.rows or not all(isinstance(row, int) and 0 <= row < len(index) for row in rows):
        raise ValueError("an item shows pictures that are not in the index")
    if (task, item.kind == "group") not in (("audit", False), ("label", True)):
        raise ValueError(f"an item of kind {item.kind!r} does not belong to {task!r}")
    if item.line is not None:
        item.correction()


def audit_review(
    index: FaceIndex, unit: Floats, suspects: Suspects, lines: Sequence[Correction], data: Photographs
) -> Review:
    """The findings of an audit as questions, the surest of each kind first.

    Args:
        index: N pictures, those that were audited.
        unit: [N, D] of length 1.
        suspects: what was found among them.
        lines: the same as lines of suspects.csv.
        data: where they were found, as it was given.
    """
    doubts = suspects.doubt
    album = Album(index, unit, doubts.wrong)

    def mates(row: int, label: int) -> list[int]:
        return album.like(row, label, MATES) if label >= 0 else []

    items = []
    for suspect, line in zip(suspects.found, lines, strict=True):
        # Who comes nearest is shown also where it is not sure enough to be suggested.
        other = suspect.suggested
        if suspect.kind == "wrong_label" and other < 0:
            other = int(doubts.suggested[suspect.row])
        others = mates(suspect.row, other)
        if suspect.kind != "wrong_label":
            others = [suspect.other_row, *(mates(suspect.other_row, other) if suspect.kind == "merge" else [])]
        items.append(
            Item(
                suspect.kind,
                [suspect.row],
                mates(suspect.row, suspect.label),
                others,
                line.identity,
                index.class_names[other] if other >= 0 else "",
                line.confidence,
                _known(line.score),
                _known(line.other_score),
                1 if suspect.kind != "merge" else len(album.of(suspect.label)),
                files.strict(dataclasses.asdict(line)),
            )
        )
    return _shown("audit", data, index, items)


def label_review(
    index: FaceIndex, unit: Floats, identities: Sequence[str], confidences: Floats, data: Photographs
) -> Review:
    """The pictures that got a name, a group for each name, as questions: the largest groups first.

    Args:
        index: N pictures, those without a name included that got none.
        unit: [N, D] of length 1.
        identities: [N] the names proposed; of pictures that had one, theirs.
        confidences: [N] of the names.
        data: where they were found, as it was given.
    """
    names, group = np.unique(np.array(identities, object).astype(str), return_inverse=True)
    group = group.reshape(-1).astype(np.int64)
    known = np.array([name == given for name, given in zip(index.identities(), identities, strict=True)])
    means = np.zeros((len(names), unit.shape[1]), np.float32)
    np.add.at(means, group, unit)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)
    means[names == ""] = 0
    nearest, cosines = _nearest(means)
    order = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[order], np.arange(len(names) + 1))
    typical = np.einsum("nd,nd->n", unit, means[group])

    def rows_of(place: int, new: bool | None, most: int) -> list[int]:
        rows = order[ends[place] : ends[place + 1]]
        if new is not None:
            rows = rows[known[rows] != new]
        rows = rows[np.argsort(-typical[rows], kind="stable")]
        # From the most typical to the least: who does not belong is among the last.
        return list(rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64))].tolist())

    found = []
    for place, name in enumerate(names.tolist()):
        whole = order[ends[place] : ends[place + 1]]
        new = whole[~known[whole]]
        if not name or not len(new):
            continue
        other = int(nearest[place])
        found.append(
            Item(
                "group",
                rows_of(place, True, MEMBERS),
                rows_of(place, False, MATES),
                rows_of(other, None, MATES) if other >= 0 else [],
                name,
                str(names[other]) if other >= 0 else "",
                float(confidences[new].mean()),
                float(typical[new].mean()),
                float(cosines[place]) if other >= 0 else None,
                len(new),
                members=digest(sorted(map(index.name, new.tolist()))),
            )
        )
    found.sort(key=lambda item: (-item.size, item.person))
    labels = tuple(
        Label(index.name(row), identities[row], float(confidences[row]))
        for row in range(len(index))
        if identities[row] and not known[row]
    )
    return dataclasses.replace(_shown("label", data, index, found), proposed=labels)


def _nearest(means: Floats) -> tuple[Numbers, Floats]:
    """[C] the mean most like each other one, -1 without one, and their cosine; a mean of zeros is nobody's."""
    nearest, cosines = np.full(len(means), -1), np.zeros(len(means), np.float32)
    there = np.flatnonzero(np.abs(means).sum(1) > 0)
    if len(there) > 1:
        places, values = neighbours(means[there], 1)
        nearest[there], cosines[there] = there[places[:, 0]], values[:, 0]
    return nearest, cosines


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _shown(task: Task, data: Photographs, index: FaceIndex, items: Iterable[Item]) -> Review:
    """With an index of no more pictures than are shown."""
    items = list(items)
    rows = sorted({row for item in items for row in (*item.rows, *item.mates, *item.others)})
    place = {row: number for number, row in enumerate(rows)}

    def placed(old: list[int]) -> list[int]:
        return [place[row] for row in old]

    moved = tuple(
        dataclasses.replace(item, rows=placed(item.rows), mates=placed(item.mates), others=placed(item.others))
        for item in items
    )
    return Review(task, data, index.select(np.array(rows, np.int64)), moved)
