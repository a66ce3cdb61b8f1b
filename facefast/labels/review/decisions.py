"""What a person has decided, kept on disk after each key, and the table for training that comes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from facefast.data.corrections import Correction, is_name, write_corrections, write_labels
from facefast.labels.review.items import Item, Review
from facefast.runtime import files
from facefast.runtime.terminal import escape_letter

LOG = "decisions.jsonl"
RESULTS = {"audit": "corrections.csv", "label": "labels.csv"}
"""The table for training that a review writes."""
LONGEST_NAME = 200
"""Letters of a name that is typed."""
SHARE = 20
"""The table is written anew when this many times as long has gone by as that took: a large one does not slow answers
down, and the last one is always written."""

Action = Literal["keep", "drop", "move", "merge"]


@dataclass(frozen=True)
class Decision:
    """An answer to one question."""

    action: Action
    """keep: it is right. drop: without it. move: it shows `to`. merge: its person and `to` are one."""
    to: str = ""
    into: str = ""
    """Key of the group that `to` was the name of when the answer was given; empty where it was no group's."""


class UnwritableName(ValueError):
    """A name that UTF-8 has no bytes for: half of a surrogate pair, which JSON can hold and no table."""


def _is_writable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require_writable(name: str) -> None:
    if not _is_writable(name):
        raise UnwritableName(
            f"the name {shown(name[:LONGEST_NAME])} has half a letter (a lone surrogate), which no table can hold; "
            "type it anew"
        )


def shown(name: str) -> str:
    """A name that cannot break a line or turn what is written after it."""
    return "".join(map(escape_letter, name))


class Decisions:
    """The answers to a review, in the order they were given.

    Args:
        review: the questions.
        folder: where answers given before are, and new ones go.

    Raises:
        ValueError: the file of answers is damaged.
        StorageError: it cannot be written.
    """

    def __init__(self, review: Review, folder: Path) -> None:
        self.review, self.folder = review, folder
        self.people = review.people()
        self.current: dict[int, Decision] = {}
        self._exact = set(self.people)
        self._by_name = {_folded(name): name for name in self.people}
        self._number = {item.key: number for number, item in enumerate(review.items)}
        self._history: list[tuple[int, Decision | None]] = []  # what was decided before
        self._moved: dict[str, int] = {}
        self.foreign = 0
        """Answers to findings that this audit does not have: they stay in the file, and have no part in the table."""
        self.unwritable = 0
        """Answers whose name no table can hold: they stay in the file, and were not given again."""
        self.torn = 0
        """Last answers that a crash had cut off: 0 or 1."""
        self._written = self._cost = -1e9
        self._replay()

    @property
    def result(self) -> Path:
        """The table for training."""
        return self.folder / RESULTS[self.review.task]

    def decide(self, number: int, action: str, to: str = "") -> Decision:
        """Takes an answer, which replaces an earlier one to the same question.

        Raises:
            UnwritableName: `to` has a letter that no text has.
            ValueError: it cannot be an answer to that.
            StorageError: it cannot be kept; then it was not given.
        """
        if not 0 <= number < len(self.review.items):
            raise ValueError(f"there is no item {number + 1}; there are {len(self.review.items)}")
        item = self.review.items[number]
        _require_writable(to)
        to = self._target(item, action, to)
        decision = Decision(cast(Action, action), to, self._group_called(number, action, to))
        self._refuse_contradiction(number, item, decision)
        self._keep({"item": item.key, **dataclasses.asdict(decision)})
        self._set(number, decision)
        self.write_result()
        return decision

    def undo(self) -> int | None:
        """Takes the last answer back; the number of the question, None where there is nothing to take back.

        Raises:
            StorageError: that cannot be kept; then the answer stands.
        """
        if not self._history:
            return None
        self._keep({"undo": True})
        number = self._undo()
        self.write_result()
        return number

    def counts(self) -> dict[str, int]:
        """How many questions were answered, and how."""
        return {"items": len(self.review.items), "decided": len(self.current)} | Counter(
            decision.action for decision in self.current.values()
        )

    def corrections(self) -> list[Correction]:
        """The answers to an audit as lines of suspects.csv, in the order of the questions; open ones have none."""
        return [_correction(self.review.items[number], decision) for number, decision in sorted(self.current.items())]

    def names(self) -> dict[str, str]:
        """What each group's pictures are called by now; empty: dropped."""
        given = {self.review.items[number].person: decision for number, decision in self.current.items()}
        person = {item.key: item.person for item in self.review.items}

        def follow(name: str) -> str:
            seen: list[str] = []
            while name in given and name not in seen:
                seen.append(name)
                decision = given[name]
                if decision.action == "drop":
                    return ""
                if decision.action == "keep":
                    return name
                if decision.action == "move":
                    return decision.to
                name = person.get(decision.into, decision.to)
            if name not in seen:
                return name
            # Groups that were merged in a circle are one: they take a name that was typed, or the one that comes first.
            circle = seen[seen.index(name) :]
            return min([given[one].to for one in circle if given[one].to not in circle] or circle)

        return {item.person: follow(item.person) for item in self.review.items}

    def write_result(self, last: bool = False) -> None:
        """Writes the table, if that is due.

        Raises:
            StorageError: it cannot be written.
        """
        began = time.monotonic()
        if not last and began < self._written + SHARE * self._cost:
            return
        if self.review.task == "audit":
            write_corrections(self.result, self.corrections())
        else:
            names = self.names()
            changed = (dataclasses.replace(label, identity=names[label.identity]) for label in self.review.proposed)
            # What nobody was sure of is nobody's, and a name that a person gave is sure.
            write_labels(
                self.result, (line if line.identity else dataclasses.replace(line, confidence=0) for line in changed)
            )
        self._written = time.monotonic()
        self._cost = self._written - began

    def find(self, text: str, most: int = 20) -> list[str]:
        """People whose name holds a text, those that begin with it first."""
        wanted = _folded(text)
        begin: list[str] = []
        hold: list[str] = []
        for name in self.people:
            place = _folded(name).find(wanted)
            if place == 0:
                begin.append(name)
                if len(begin) == most:
                    break
            elif place > 0 and len(hold) < most:
                hold.append(name)
        return (begin + hold)[:most]

    def _target(self, item: Item, action: str, to: str) -> str:
        """Whom an answer is about, by the name that the set has for them; empty where about nobody."""
        if action not in get_args(Action):
            raise ValueError(f"action is {action!r:.80}; it must be one of {', '.join(get_args(Action))}")
        if item.kind == "merge" and action in ("drop", "move"):
            raise ValueError(f"{action} is for pictures; two people are merged or kept apart")
        if action in ("keep", "drop"):
            return ""
        if action == "merge" and not item.person:
            raise ValueError("this picture is nobody's; move it to a person")
        name = self._name(to, new=item.kind == "group" and action == "move")
        if name == item.person and not (item.kind == "group" and action == "move"):
            raise ValueError(f"this is {shown(name)} already")
        return name

    def _group_called(self, number: int, action: str, to: str) -> str:
        """Key of the group that `to` names, by the name it was found with or, to merge with, one it was given."""
        items = self.review.items
        if items[number].kind != "group" or not to or to in self.review.index.class_names:
            return ""  # a person of the set is the same whatever was grouped
        found = [item.key for item in items if item.person == to]
        if action == "merge":
            named = (other for other, before in self.current.items() if before.action == "move" and before.to == to)
            found += [items[other].key for other in named if other != number]
        return found[0] if found else ""

    def _fits(self, number: int, decision: Decision) -> bool:
        """Whether an answer of an earlier time can be given to this question: its person may be gone, or be a name of
        another group by now."""
        if decision.into and decision.into not in self._number:
            return False
        with contextlib.suppress(ValueError):
            return self._target(self.review.items[number], decision.action, decision.to) == decision.to
        return False

    def _name(self, text: str, new: bool) -> str:
        text = text.strip()
        if text in self._exact:
            return text
        # What people type differs from what they read by letters' case, blanks, and how accents are put together.
        if _folded(text) in self._by_name:
            return self._by_name[_folded(text)]
        if not new:
            who = f"nobody here is called {shown(text[:LONGEST_NAME])!r}" if text else "nobody was named"
            raise ValueError(f"{who}; choose one of the {len(self.people)} people of this set")
        if not is_name(text) or len(text) > LONGEST_NAME:
            raise ValueError(f"a name has 1 to {LONGEST_NAME} letters on one line")
        return text

    def _refuse_contradiction(self, number: int, item: Item, decision: Decision) -> None:
        if item.kind == "group" or decision.action != "move":
            return
        for other, before in self.current.items():
            same = other != number and before.action == "move" and before.to != decision.to
            if same and self.review.items[other].rows == item.rows:
                raise ValueError(
                    f"this picture was moved to {shown(before.to)} already, in item {other + 1}; change that one first"
                )

    def _set(self, number: int, decision: Decision) -> None:
        self._history.append((number, self.current.get(number)))
        self.current[number] = decision
        if decision.to and decision.to not in self._exact:
            self._exact.add(decision.to)
            self._by_name.setdefault(_folded(decision.to), decision.to)
            self.people = (*self.people, decision.to)

    def _undo(self) -> int:
        number, before = self._history.pop()
        if before is None:
            self.current.pop(number, None)
        else:
            self.current[number] = before
        return number

    def _keep(self, entry: dict[str, Any]) -> None:
        """Adds a line to the file of answers, which is on the disk then."""
        content = (json.dumps(entry) + "\n").encode()
        path = self.folder / LOG
        with files.storing(path, len(content)), open(path, "ab") as file:
            before = file.tell()
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(path, before)  # half a line would spoil the next one
                raise

    def _replay(self) -> None:
        """Gives the answers of the file again."""
        path = self.folder / LOG
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        self.torn = len(lines) - len(whole)
        if self.torn:  # the process or the machine died while it wrote the last line
            with files.replacing(path) as aside:
                aside.write_bytes(b"".join(whole))
        undone: list[bool | None] = []  # whether each answer so far is one of ours; None: no table can hold its name
        for place, line in enumerate(whole, 1):
            try:
                entry = json.loads(line)
                if entry.get("undo"):
                    if undone and undone.pop():
                        self._undo()
                    continue
                number = self._number.get(entry["item"])
                decision = Decision(entry["action"], str(entry["to"]), str(entry.get("into", "")))
                if not _is_writable(decision.to):
                    undone.append(None)
                    continue
                ours = number is not None and self._fits(number, decision)
                undone.append(ours)
                if number is not None and ours:
                    self._set(number, decision)
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {place}, is no answer to this review ({error}); delete the line, or the file to "
                    "begin anew"
                ) from error
        self.foreign, self.unwritable = undone.count(False), undone.count(None)


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", shown(name)).casefold().split())


def _correction(item: Item, decision: Decision) -> Correction:
    line = item.correction()
    if decision.action == "merge" and item.kind != "merge":
        return Correction("merge", line.path, line.identity, decision.to, "merge")
    action = {"move": "relabel"}.get(decision.action, decision.action)
    return dataclasses.replace(line, action=action, suggested=decision.to or line.suggested)


def read_back(decisions: Decisions) -> list[str]:
    """What of the answers given before could not be taken up again; nothing where all could."""
    path, lines = decisions.folder / LOG, []
    if decisions.unwritable:
        lines.append(
            f"{decisions.unwritable} earlier answers in {path} name somebody with half a letter (a lone surrogate), "
            "which no table can hold; they were passed over, so answer these items anew"
        )
    if decisions.torn:
        lines.append(
            f"the last line of {path} was cut off, as by a crash, and was left out: look whether the last answer is "
            "there"
        )
    return lines


def summary(decisions: Decisions) -> str:
    """What was decided, and what to do with it."""
    counts, task, data = decisions.counts(), decisions.review.task, decisions.review.data
    parts = ", ".join(f"{counts[name]} to {name}" for name in get_args(Action) if counts.get(name))
    lines = [f"{counts['decided']} of {counts['items']} decided{': ' if parts else ''}{parts}"]
    if decisions.foreign:
        lines.append(
            f"{decisions.foreign} earlier answers are about findings that are gone; they stay in "
            f"{decisions.folder / LOG} and have no part in the table"
        )
    lines += read_back(decisions)
    rest = counts["items"] - counts["decided"]
    if rest:
        fate = "are not in the table" if task == "audit" else "keep the names that were proposed"
        lines.append(f"{rest} are open and {fate}; --review without MODEL goes on with them")
    form = f" --data.format {data.format}" if data.format != "auto" else ""
    option = "corrections" if task == "audit" else "labels"
    table = shlex.quote(str(decisions.result))
    lines += [
        f"{decisions.result} is written; train on it with",
        f"  facefast train --data.root {shlex.quote(data.root)}{form} --data.{option} {table}",
    ]
    return "\n".join(lines)
