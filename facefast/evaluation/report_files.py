"""What a report is made of: the files of a run folder, as far as they are there and sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facefast.runtime import files
from facefast.runtime.lines import read_lines

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

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """The files of a run.

        Raises:
            ValueError: it is no run folder.
        """
        if not (folder / "status.json").is_file():
            what = "is no run folder" if folder.is_dir() else "does not exist" if not folder.exists() else "is a file"
            raise ValueError(f"{folder} {what}: there is no status.json; give the folder that train was given as --out")
        points = [folder / "checkpoints" / link / "model.json" for link in ("best", "last")]
        return cls(
            folder=folder,
            name=folder.resolve().name,
            status=files.read_object(folder / "status.json"),
            recipe=files.read_object(folder / "recipe.json"),
            plan=files.read_object(folder / "plan.json"),
            environment=files.read_object(folder / "environment.json"),
            evaluation=files.read_object(folder / EVALUATION),
            model=next((found for path in points if (found := files.read_object(path))), {}),
            lines=read_lines(folder / "metrics.jsonl"),
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
        """The row of the model that is handed on."""
        return str(self.best.get("phase", ""))
