"""What a model says of itself: what it reached when it was handed on, on which pictures, and what had chosen it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from facefast.data import FaceIndex
from facefast.data.divide import EvaluationSet
from facefast.models import FaceModel, exported, provenance
from facefast.runtime import files

HEADLINES = ("top1", "verification_accuracy", "known_verification_accuracy", "tasks")
"""The number that is said in one line: the first of these that there is."""


def document(
    row: str, results: Mapping[str, float], asked: EvaluationSet | None, selected: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`metrics` of model.json.

    Args:
        row: of the table of results.
        results: of the test part, as metrics.jsonl has them, intervals among them.
        asked: the test part; None where it is not known any more.
        selected: metric, value, number of pictures and part (validation, training) that chose the model; None where
            nothing could choose.
    """
    return {
        "row": row,
        "results": dict(files.strict(results)),
        "evaluation_set": None if asked is None else _described(asked),
        "selected": None if selected is None else dict(files.strict(selected)),
    }


def _described(asked: EvaluationSet) -> dict[str, Any]:
    """Name, digest and numbers of an evaluation set; nothing by which a picture or a person is found."""
    parts = {"test": asked.test, "verification": asked.verification}
    facts: list[Any] = [None if part is None else part.fingerprint() for part in parts.values()]
    counts: dict[str, Any] = {name: None if part is None else _counted(part) for name, part in parts.items()}
    if asked.pairs is not None:
        columns = (asked.pairs.left, asked.pairs.right, asked.pairs.same)
        facts += [hashlib.sha256(np.ascontiguousarray(column).tobytes()).hexdigest() for column in columns]
        counts["verification"] |= {"pairs": len(asked.pairs), "held_out": asked.held_out}
    root = next((part.root for part in parts.values() if part is not None), "")
    return {"name": Path(root).name, "digest": hashlib.sha256(json.dumps(facts).encode()).hexdigest(), **counts}


def _counted(index: FaceIndex) -> dict[str, int]:
    return {"people": len(np.unique(index.labels[index.labels >= 0])), "pictures": len(index)}


def sentence(metrics: Mapping[str, Any] | None) -> str:
    """For people; what a file from elsewhere says is taken as it is, or left out where it makes no sense."""
    results = (metrics or {}).get("results")
    name = next((name for name in HEADLINES if isinstance(results, dict) and _is_number(results.get(name))), "")
    if metrics is None or not name or not isinstance(results, dict):
        return "not measured when it was made"
    low, high = results.get(f"{name}_low"), results.get(f"{name}_high")
    interval = f" (95 % interval {low:.2%} to {high:.2%})" if _is_number(low) and _is_number(high) else ""
    asked = metrics.get("evaluation_set")
    on = ""
    if isinstance(asked, dict):
        part = asked.get("test" if name in ("top1", "tasks") else "verification") or {}
        on = f" on {part.get('pictures', '?')} pictures of {part.get('people', '?')} people of {asked.get('name')}"
    selected = metrics.get("selected")
    chose = ""
    if isinstance(selected, dict):
        chose = f", chosen by {selected.get('metric')} of {selected.get('pictures')} {selected.get('part')} pictures"
    return f"{name} {results[name]:.2%}{interval}{on}{chose} when it was made"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def header(path: Path, model: FaceModel) -> str:
    """A line on MODEL as it was given: what it is, where its weights are from, what it reached."""
    kind = model.config.backbone
    if exported.is_exported(model):
        kind += " in int8, with the thresholds of its float parent" if path.is_dir() else " as ONNX"
    people = f"{model.num_classes} people" if model.num_classes else "no people"
    return f"model {path}: {kind}, {people}; {provenance.sentence(model.provenance)}; {sentence(model.metrics)}"
