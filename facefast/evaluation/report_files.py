"""What a report is made of: the files of a run folder, as far as they are there and sound."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facefast.runtime import files
from facefast.runtime.lines import count_unread, read_lines

EVALUATION = "evaluation.json"
"""What the test part tells beyond the lines of metrics.jsonl: of `facefast.evaluation.findings`."""


@dataclass(frozen=True)
class RunFiles:
    """A run's files; an object that is missing or damaged is empty."""

    folder: Path
    name: str
    """For people: the folder's own."""
    status: dict[str, Any]
    recipe: dict[str, Any]
    plan: dict[str, Any]
    environment: dict[str, Any]
    evaluation: dict[str, Any]
    model: dict[str, Any]
    """model.json of the checkpoint that is handed on."""
    lines: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl."""
    faults: tuple[str, ...] = ()
    """What is there and could not be read, a sentence's part each: nothing vanishes from a page without a word."""

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """The files of a run.

        Raises:
            ValueError: it is no run folder.
        """
        if not (folder / "status.json").is_file():
            what = "is no run folder" if folder.is_dir() else "does not exist" if not folder.exists() else "is a file"
            raise ValueError(f"{folder} {what}: there is no status.json; give the folder that train was given as --out")
        faults: list[str] = []

        def read(name: str) -> dict[str, Any]:
            return _object(folder, name, faults)

        status, evaluation = read("status.json"), read(EVALUATION)
        faults += _no_objects("status.json", status, ("best",))
        faults += _no_objects(EVALUATION, evaluation, ("closed_set", "verification", "photographs"))
        return cls(
            folder=folder,
            name=folder.resolve().name,
            status=status,
            recipe=read("recipe.json"),
            plan=read("plan.json"),
            environment=read("environment.json"),
            evaluation=evaluation,
            model=read("checkpoints/best/model.json") or read("checkpoints/last/model.json"),
            lines=_lines(folder / "metrics.jsonl", faults),
            faults=tuple(faults),
        )

    @property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """Rows of the table of results, by name: what the test part gave last."""
        return {str(line.get("phase")): line for line in self.lines if line.get("split") == "test"}

    @property
    def best(self) -> Mapping[str, Any]:
        """What status.json says of the model that is handed on; empty before any evaluation."""
        found = self.status.get("best")
        return found if isinstance(found, dict) else {}

    @property
    def handed_on(self) -> str:
        """The row of the model that is handed on; empty where no file tells."""
        if self.best.get("phase"):
            return str(self.best["phase"])
        # Where nothing was validated status.json may have no best.
        metrics = self.model.get("metrics")
        told = [self.evaluation.get("row"), metrics.get("row") if isinstance(metrics, dict) else None]
        return next((str(row) for row in told if row is not None and str(row) in self.rows), "")


def _object(folder: Path, name: str, faults: list[str]) -> dict[str, Any]:
    path = folder / name
    if not os.path.lexists(path):
        return {}
    try:
        found = files.read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)
        told = why.removeprefix(str(path))  # most say themselves which file they are about
        faults.append(f"{name}{told}" if told != why else f"{name} cannot be read: {why}")
        return {}
    if not isinstance(found, dict):
        faults.append(f"{name} holds a JSON {type(found).__name__}, and must hold an object")
        return {}
    return found


def _no_objects(name: str, document: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [
        f"{name} holds a JSON {type(document[key]).__name__} as {key}, and must hold an object"
        for key in keys
        if document.get(key) is not None and not isinstance(document[key], dict)
    ]


def _lines(path: Path, faults: list[str]) -> list[dict[str, Any]]:
    try:
        found, unread = read_lines(path), count_unread(path)
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    if unread:
        faults.append(f"{unread} of {unread + len(found)} lines of {path.name} are torn or no lines of a run")
    return found
