"""Which weights a model began from and under what licence: what travels with it, from checkpoint to package to ONNX.

Code and weights have licences of their own, and nothing in a weights file tells its: whoever trains says it
(`--model.source-licence`), or whoever exports. Where nobody did, it is unknown, and every command says that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from facefast.models.weights.source import Source

FIELDS = {"source": str, "sha256": str, "licence": str, "before": dict, "teacher": dict}
"""Entries of the document and their types; each may be null. `before` is what a source that is a facefast model says
of itself."""


class Told(Protocol):
    """What has a provenance: a `FaceModel`."""

    provenance: dict[str, Any] | None


def of_run(source: Source | None, licence: str = "", teacher: Told | None = None) -> dict[str, Any]:
    """The document of a model that starts from `source`, or from random weights.

    Args:
        source: its weights.
        licence: of the source, or without one of the teacher, in the user's words; empty takes what they say
            themselves.
        teacher: the model that it is distilled from.
    """
    theirs = None if teacher is None else dict(teacher.provenance or {"source": "unknown", "licence": None})
    if source is None:
        if theirs is not None and licence:
            theirs["licence"] = licence
        return {"source": None, "sha256": None, "licence": None, "before": None, "teacher": theirs}
    before = dict(source.provenance) if source.provenance else None
    return {
        "source": Path(source.name).name if Path(source.name).exists() else source.name,  # no path of its owner's
        "sha256": source.sha256 or None,
        "licence": licence or (licence_of(before) if before else None),
        "before": before,
        "teacher": theirs,
    }


def licence_of(document: Mapping[str, Any]) -> str | None:
    """The licence of the weights that a model began from, its teacher's where it began from none; None where nobody
    told."""
    own = document.get("licence")
    teacher = document.get("teacher") or {}
    if not own and document.get("source") is None and teacher:
        return licence_of(teacher)
    return str(own) if own else None


def with_licence(document: Mapping[str, Any] | None, licence: str) -> dict[str, Any]:
    """The document of a model whose source's licence is told now.

    Raises:
        ValueError: the model began from no weights.
    """
    known = dict(document or {"source": "unknown", "sha256": None, "before": None, "teacher": None})
    if known.get("source") is not None:
        return known | {"licence": licence}
    if not known.get("teacher"):
        raise ValueError(
            f"the model was trained from random weights: a licence of source weights, {licence!r:.80}, has no effect; "
            "leave it out"
        )
    return known | {"teacher": with_licence(known["teacher"], licence)}


def sentence(document: Mapping[str, Any] | None) -> str:
    """For people."""
    if document is None:
        return "source weights unknown, their licence unknown"
    said = licence_of(document) or "unknown: nobody told"
    if document.get("source") is not None:
        digest = document.get("sha256")
        return f"source weights {document['source']}{f' (SHA-256 {digest[:12]}...)' if digest else ''}, licence {said}"
    teacher = document.get("teacher")
    if teacher:
        name = teacher.get("source") or "trained from random weights"
        return f"trained from random weights, distilled from a teacher ({name}), licence {said}"
    return "trained from random weights"


def require_sound(document: Mapping[str, Any] | None, depth: int = 0) -> None:
    """Refuses what is no such document.

    Raises:
        ValueError: naming the entry.
    """
    if document is None:
        return
    for name, value in document.items():
        if name not in FIELDS or not isinstance(value, FIELDS[name] | None) or depth > 100:
            raise ValueError(
                f"model.json: provenance has {name!r:.80} {value!r:.80}; this facefast knows no such entry"
            )
        if isinstance(value, dict):
            require_sound(value, depth + 1)
