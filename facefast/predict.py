"""Names the people in photographs, or embeds them: `python -m facefast.predict MODEL IMAGE|DIR...`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from facefast.data import FaceIndex, oracle
from facefast.data.index import FAULTS, advice, printable
from facefast.data.walk import DECODED, list_pictures, require_there
from facefast.evaluation.embed import embed_rows
from facefast.faces.detect import Detector
from facefast.models import FaceModel, checkpoint
from facefast.models.precision import Precision
from facefast.recipe import Reading
from facefast.recipe.options import parse
from facefast.recipe.ranges import MOST, require
from facefast.runtime import exits, files, process
from facefast.runtime.terminal import say

OTHER = "choose another --embeddings, or make room"


@dataclass(frozen=True)
class PredictArguments:
    """`python -m facefast.predict`."""

    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, an exported package or a source model's weights file."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Photographs, or folders of them."""
    detect: Path | None = None
    """OpenCV's YuNet detector (.onnx): finds the largest face and its landmarks, for pictures that are not aligned."""
    embeddings: Path | None = None
    """Write paths and embeddings of length 1 to this .npz."""
    top: int = 1
    """Names given per picture."""
    json: bool = False
    """Print one JSON object a picture."""

    def __post_init__(self) -> None:
        require(self, top=(1, MOST))


def find_images(given: tuple[Path, ...]) -> list[Path]:
    """The photographs that paths and folders name, folders in sorted order, by the rules of `data.walk`.

    Raises:
        ValueError: a path that is not there, or nothing to look at.
    """
    if not given:
        raise ValueError("predict needs photographs: facefast predict MODEL IMAGE|DIR...")
    found: list[Path] = []
    for path in given:
        require_there(path)
        if os.path.isdir(path):
            found += [path / os.fsdecode(inside) for inside in list_pictures(path)]
        elif os.path.isfile(path):
            found.append(path)
        else:
            raise ValueError(f"{path} is neither a photograph nor a folder")
    if not found:
        endings = ", ".join(sorted(map(os.fsdecode, DECODED)))
        raise ValueError(f"no photographs in {', '.join(map(str, given))}; they end in {endings}")
    return found


def index_of(paths: list[Path], detector: Detector | None) -> FaceIndex:
    """A scanned index of loose photographs, with the detector's landmarks where there is one."""
    # Loose photographs may lie anywhere: the file system's root is the one folder that holds all of them.
    names = [os.fsencode(os.path.abspath(path)).lstrip(b"/") for path in paths]
    index = FaceIndex.build("/", names, np.full(len(names), -1), ()).scanned()
    if detector is None:
        return index
    points = np.full((len(index), 5, 2), np.nan, np.float32)
    for row in np.flatnonzero(index.faults == 0).tolist():
        with contextlib.suppress(ValueError):  # a header can be sound and the rest not: `predict` says so
            points[row] = detector.landmarks(oracle.decode(index.path(row)))
    return dataclasses.replace(index, landmarks=points)


def predict(
    model: FaceModel, index: FaceIndex, run: process.Runtime, precision: Precision, top: int = 1
) -> Iterator[dict[str, Any]]:
    """One answer a row: path, names with probabilities and attributes, or what kept the picture from being read.

    An index with landmarks comes from a detector: a picture without them shows no face, and no name is given.
    """
    sound = np.flatnonzero(index.faults == 0)
    answers: dict[int, dict[str, Any]] = {}
    if len(sound):
        part = index.select(sound)
        reading = Reading(process.decode_threads(0, run.world), max_bad_fraction=1.0)  # each fault is an answer
        embeddings, seen = embed_rows(model, part, run, precision, reading, batch_size=64)
        for place, row in enumerate(sound.tolist()):
            if not seen[place]:
                answers[row] = {"fault": "it could not be decoded"}
                continue
            if part.landmarks is not None and not np.isfinite(part.landmarks[place]).all():
                answers[row] = {"fault": "no face was found"}
                continue
            unit = torch.nn.functional.normalize(embeddings[place], dim=0)
            answers[row] = {"embedding": unit.numpy()}
            with torch.inference_mode():
                attributes = model.predict_attributes(embeddings[place : place + 1].to(run.device))
            if attributes:
                answers[row]["attributes"] = {name: round(float(value), 6) for name, value in attributes.items()}
            if model.num_classes:
                with torch.inference_mode():
                    logits = model.classify(embeddings[place : place + 1].to(run.device)).float() * model.scale
                best = torch.softmax(logits[0].cpu(), 0).topk(min(top, model.num_classes))
                names = model.class_names or tuple(map(str, range(model.num_classes)))
                answers[row]["names"] = [names[k] for k in best.indices.tolist()]
                answers[row]["probabilities"] = [round(p, 6) for p in best.values.tolist()]
    for row in range(len(index)):
        fault = {"fault": FAULTS[index.faults[row]]}
        yield {"path": index.path(row), **answers.get(row, fault)}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(PredictArguments, arguments, "predict")
        if given.embeddings is not None:
            files.require_writable(_npz(given.embeddings), advice=OTHER, parents=False)
        with process.start() as run:
            model = checkpoint.load_model(given.model, run.device)
            if not model.num_classes and model.attribute_heads is None and given.embeddings is None:
                raise ValueError(f"{given.model} knows no identities; ask for --embeddings OUT.npz")
            if given.detect and model.image.template == "none":
                raise ValueError(f"{given.model} takes pictures that are not aligned; --detect would change nothing")
            detector = Detector(given.detect) if given.detect else None
            index = index_of(find_images(given.images), detector)
            answers = list(predict(model, index, run, checkpoint.precision_of(given.model, model), given.top))
        embedded = [answer for answer in answers if "embedding" in answer]
        if given.embeddings is not None:
            write_embeddings(given.embeddings, embedded)
        for answer in answers:
            answer.pop("embedding", None)
            say(json.dumps(answer) if given.json else _line(answer))
        if not embedded:
            raise exits.DataError(f"none of {len(answers)} pictures could be embedded")
    return outcome.code


def write_embeddings(path: Path, answers: list[dict[str, Any]]) -> None:
    """Paths [N] and embeddings [N, D] to an .npz.

    Raises:
        StorageError: it cannot be written; a file that was there is as it was.
    """
    arrays: dict[str, Any] = {
        "paths": np.array([answer["path"] for answer in answers]),
        "embeddings": np.array([answer["embedding"] for answer in answers], np.float32),
    }
    needed = sum(array.nbytes for array in arrays.values())
    with files.replacing(_npz(path), needed, OTHER) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)


def _npz(path: Path) -> Path:
    """As numpy names it."""
    return path if path.suffix == ".npz" or path.exists() and not path.is_file() else Path(f"{path}.npz")


def _line(answer: dict[str, Any]) -> str:
    path = printable(os.fsencode(answer["path"]))
    if "fault" in answer:
        return f"{path}  not read: {answer['fault']}{advice(answer['fault'])}"
    pairs = zip(answer.get("names", []), answer.get("probabilities", []), strict=True)
    attributes = (f"{name} {value:.4g}" for name, value in answer.get("attributes", {}).items())
    return "  ".join([path, *(f"{name} {probability:.1%}" for name, probability in pairs), *attributes])


if __name__ == "__main__":
    sys.exit(main())
