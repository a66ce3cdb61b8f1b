"""Names the people in photographs, or embeds them: `python -m facefast.predict MODEL IMAGE|DIR...`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from facefast.data.index import advice, printable
from facefast.data.walk import loose_photographs
from facefast.deploy.annotate import ADVICE, annotate, places
from facefast.deploy.photographs import UNKNOWN, Naming, answer
from facefast.evaluation.measured import header
from facefast.models import checkpoint
from facefast.recipe.options import parse
from facefast.recipe.ranges import MOST, require
from facefast.runtime import exits, files, process
from facefast.runtime.terminal import complain, message, say

OTHER = "choose another --embeddings, or make room"


@dataclass(frozen=True)
class PredictArguments:
    """`python -m facefast.predict`."""

    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, an exported package or ONNX file, or a source model's weights file."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Photographs, or folders of them."""
    detect: str = "auto"
    """Where faces are: auto finds out whether the pictures are aligned as the model wants them, and looks for every
    face where they are not; mtcnn, or the .onnx file of YuNet, looks through all pictures; none takes their middle."""
    embeddings: Path | None = None
    """Write paths, boxes and embeddings of length 1, a row for each face, to this .npz."""
    top: int = 1
    """Names given per face."""
    gallery: Path | None = None
    """Name people by those enrolled here (`facefast gallery enroll`) instead of those the model was trained on."""
    threshold: str = "auto"
    """From which score on a face gets a name instead of unknown: far@1e-2 names 1 % of strangers; auto takes the upper
    end of that threshold's interval; a number is a score (a cosine); none names everybody."""
    json: bool = False
    """Print one JSON object a picture."""
    annotate: Path | None = None
    """Write the photographs with boxes, names and "unknown" on them to this folder, as JPEGs."""
    html: bool = False
    """With --annotate: also a page of them, index.html."""

    def __post_init__(self) -> None:
        require(self, top=(1, MOST))
        if self.html and self.annotate is None:
            raise ValueError("--html has no effect without --annotate DIR, where the page and its pictures go")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(PredictArguments, arguments, "predict")
        if given.embeddings is not None:
            files.require_writable(files.npz(given.embeddings), advice=OTHER, parents=False)
        where: dict[str, Path] = {}
        if given.annotate is not None:
            files.require_writable(given.annotate, folder=True, advice=ADVICE)
            where = places(given.images, given.annotate)
        with process.start() as run:
            model = checkpoint.load_model(given.model, run.device)
            knows = model.num_classes or model.attribute_heads is not None or given.gallery is not None
            if not knows and given.embeddings is None and given.annotate is None:
                raise ValueError(
                    f"{given.model} knows no identities; give --gallery G, --embeddings OUT.npz or --annotate DIR"
                )
            precision = checkpoint.precision_of(given.model, model)
            complain(message(header(given.model, model)))
            naming = Naming.of(model, str(given.model), given.top, given.threshold, given.gallery)
            if not given.images:
                raise ValueError("predict needs photographs: facefast predict MODEL IMAGE|DIR...")
            index = loose_photographs(given.images)
            answers = list(answer(model, index, run, precision, naming, given.detect))
        embedded = [each for each in answers if "embedding" in each]
        if given.embeddings is not None:
            write_embeddings(given.embeddings, embedded)
        if given.annotate is not None:
            drawn = annotate(answers, where, given.annotate, given.html)
            for note in drawn.said():
                complain(message(note))
        for each in answers:
            for holder in (each, *each.get("faces", ())):
                holder.pop("embedding", None)
            say(json.dumps(each) if given.json else _lines(each))
        if not embedded:
            raise exits.DataError(f"none of {len(answers)} pictures could be embedded")
    return outcome.code


def write_embeddings(path: Path, answers: list[dict[str, Any]]) -> None:
    """Paths [N], boxes [N, 4] (NaN where no face was looked for) and embeddings [N, D] of N faces to an .npz.

    Raises:
        StorageError: it cannot be written; a file that was there is as it was.
    """
    faces = [(each["path"], face) for each in answers for face in each["faces"]]
    arrays: dict[str, Any] = {
        "paths": np.array([path for path, _ in faces]),
        "boxes": np.array([face.get("box", [np.nan] * 4) for _, face in faces], np.float32),
        "embeddings": np.array([face["embedding"] for _, face in faces], np.float32),
    }
    needed = sum(array.nbytes for array in arrays.values())
    with files.replacing(files.npz(path), needed, OTHER) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)


def _lines(said_of: dict[str, Any]) -> str:
    """A line for each face of a picture; where there are several, each has its box."""
    path = printable(os.fsencode(said_of["path"]))
    if "fault" in said_of:
        return f"{path}  not read: {said_of['fault']}{advice(said_of['fault'])}"
    lines = []
    for face in said_of["faces"]:
        said = [_said(face, place) for place in range(len(face.get("names", ())))]
        attributes = (f"{name} {value:.4g}" for name, value in face.get("attributes", {}).items())
        where = ["at {:.0f},{:.0f} {:.0f}x{:.0f}".format(*face["box"])] if len(said_of["faces"]) > 1 else []
        lines.append("  ".join([path, *where, *said, *attributes]))
    return "\n".join(lines)


def _said(face: dict[str, Any], place: int) -> str:
    name = face["names"][place]
    if name == UNKNOWN and "nearest" in face:
        near = f", nearest {face['nearest'][0]}" if face["nearest"] else ""
        return f"{UNKNOWN} (score {face['score']:.3f}{near})"
    return (
        f"{name} {face['probabilities'][place]:.1%}"
        if "probabilities" in face
        else f"{name} {face['scores'][place]:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
