"""What a finished model is worth: `python -m facefast.evaluate MODEL --data.root DIR`.

Closed-set accuracy and open-set verification, on all ranks, with exact counts; pairs of any list, templates, or
identification in a gallery.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from torch import Tensor

from facefast.data import FaceIndex, read_templates
from facefast.data.graphs import kept_open
from facefast.data.prepare import read_photographs
from facefast.evaluation import exam
from facefast.evaluation.embed import Embed, Mirror, embed_rows, remembering
from facefast.evaluation.measure import evaluate
from facefast.evaluation.measured import header
from facefast.evaluation.overlap import overlap_of
from facefast.evaluation.sets import checked, find_evaluation_set, given_pairs
from facefast.faces.align import Locator, locator
from facefast.models import FaceModel, checkpoint
from facefast.models.precision import Precision
from facefast.recipe import DataConfig, EvalConfig, Photographs, Reading, Recipe, to_json
from facefast.recipe.options import parse, typed
from facefast.recipe.ranges import LARGEST_SEED, MOST, require
from facefast.runtime import exits, files, process
from facefast.runtime.process import decode_threads
from facefast.runtime.terminal import complain, message, say


@dataclass(frozen=True)
class EvaluateArguments:
    """`python -m facefast.evaluate`."""

    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, an exported package or ONNX file, or a source model's weights file."""
    data: DataConfig = field(default_factory=DataConfig)
    pairs: Path | None = None
    """A list of pairs of pictures in data.root: LFW's pairs.txt, `a b label` a line, or CSV; beside templates, of pairs
    of those."""
    bin: Path | None = None
    """An InsightFace verification set (.bin)."""
    templates: Path | None = None
    """A list of media as IJB has them (path, template, subject, medium): sets of pictures are compared."""
    weights: Literal["equal", "length"] = "equal"
    """How pictures weigh in a template: length goes by that of their embeddings."""
    identify: Path | None = None
    """A gallery, a folder per person: who of data.root is found in it, and how many strangers are."""
    join: Literal["mean", "max"] = "mean"
    """How identify scores a person: by the mean of their pictures, or by the one most like the probe."""
    mirror: Mirror = "mean"
    """How the mirror image counts in pairs, templates and identify: the mean of both embeddings, both joined (twice as
    long, as papers with LFW do), or none. A head is asked with the mean."""
    draws: int = 5
    """Draws of random pairs whose spread is told."""
    groups: str = ""
    """An attribute of the photographs, or a CSV file with columns path and others: errors of each group at one
    threshold."""
    hardest: int = 0
    """Pairs of each kind listed that are hardest to tell."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    """Of the random pairs, where no list of pairs is given."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def __post_init__(self) -> None:
        require(self, seed=(0, LARGEST_SEED), draws=(1, 10_000), hardest=(0, MOST))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(EvaluateArguments, arguments, "evaluate")
        _require_sense(given)
        with process.start(rank_timeout=Recipe.rank_timeout) as run, kept_open():
            run.require_same(to_json(given))
            reading = given.data.reading(decode_threads(0, run.world))
            model = checkpoint.load_model(given.model, run.device)
            precision = checkpoint.precision_of(given.model, model)
            if run.is_main:
                complain(message(header(given.model, model)))
            faces = locator(model.image, model.faces, given.data.detect, run)

            def embed(index: FaceIndex) -> tuple[Tensor, Tensor]:
                return embed_rows(
                    model, index, run, precision, reading, batch_size=given.eval.batch_size, mirror=given.mirror
                )

            remembered = remembering(embed)
            if given.templates or given.identify:
                results = _of_sets(given, model, remembered, reading, faces)
            else:
                said = typed(EvaluateArguments, arguments)
                results = _of_pictures(given, said, model, precision, remembered, run, reading, faces)
            if run.is_main and given.json:
                say(json.dumps(files.strict(results), allow_nan=False))
            elif run.is_main:
                say("\n".join(exam.lines(results)))
    return outcome.code


def _require_sense(given: EvaluateArguments) -> None:
    """Refuses options that would have no effect beside others."""
    wishes = {"--identify": given.identify, "--templates": given.templates, "--pairs": given.pairs, "--bin": given.bin}
    named = [name for name, wish in wishes.items() if wish is not None]
    if len(named) > 1 and named != ["--templates", "--pairs"]:
        raise ValueError(f"give {' or '.join(named)}, not both")
    idle = {
        "--join": given.join != "mean" and given.identify is None,
        "--weights": given.weights != "equal" and given.templates is None,
        "--groups": bool(given.groups) and bool(given.identify or given.templates),
        "--hardest": given.hardest != 0 and given.identify is not None,
        "--draws": given.draws != EvaluateArguments.draws and bool(named),
    }
    for name, without_effect in idle.items():
        if without_effect:
            raise ValueError(f"{name} has no effect {'with ' + ' and '.join(named) if named else 'here'}; leave it out")


def _of_sets(
    given: EvaluateArguments, model: FaceModel, embed: Embed, reading: Reading, faces: Locator
) -> dict[str, Any]:
    """Templates, or probes and a gallery."""
    if given.templates:
        templates = read_templates(given.data.root, given.templates, given.pairs)
        templates = templates.of(checked(templates.index, reading, faces))
        found = exam.verify_templates(embed, templates, given.weights == "length", given.hardest)
        return found | _shared(given, model, [templates.index], held_out=True)
    if not given.data.root:
        raise ValueError("identify needs photographs to look for: --data.root DIR")
    probes = read_photographs(given.data, reading, faces)
    gallery = read_photographs(Photographs(root=str(given.identify)), reading, faces)
    found = exam.identify(embed, probes, gallery, given.join)
    return found | _shared(given, model, [probes, gallery], held_out=True)


def _of_pictures(
    given: EvaluateArguments,
    said: frozenset[str],
    model: FaceModel,
    precision: Precision,
    embed: Embed,
    run: process.Runtime,
    reading: Reading,
    faces: Locator,
) -> dict[str, Any]:
    """Test pictures and pairs."""
    if given.pairs or given.bin:
        asked = given_pairs(given.data.root, reading, pairs=given.pairs, bin=given.bin, locate=faces)
    else:
        asked = find_evaluation_set(
            given.model, model, given.data, given.eval, given.seed, reading.threads, said, faces
        )
    results: dict[str, Any] = evaluate(model, asked, given.eval, run, precision, reading, embed=embed)
    if asked.verification is not None and asked.pairs is not None:
        drawn = not (given.pairs or given.bin)
        questions = exam.Questions(given.draws, given.groups, given.hardest, given.seed)
        prefix = "" if asked.held_out else "known_"
        results |= exam.verify_in_full(embed, asked.verification, asked.pairs, questions, drawn=drawn, prefix=prefix)
    elif given.groups or given.hardest:
        raise ValueError(
            "--groups and --hardest need pairs, and there are none: give --pairs, or people with 2 pictures"
        )
    parts = [part for part in (asked.test, asked.verification) if part is not None]
    parts = parts[:1] if len({id(part) for part in parts}) == 1 else parts
    # People of the test part are the model's own; only those of pairs can be meant to be new to it.
    new = [asked.verification] if asked.held_out and asked.verification is not None else []
    return results | _shared(given, model, parts, held_out=bool(new), new=new)


def _shared(
    given: EvaluateArguments,
    model: FaceModel,
    measured: list[FaceIndex],
    held_out: bool,
    new: list[FaceIndex] | None = None,
) -> dict[str, Any]:
    """What the measured pictures share with the training pictures."""
    found = overlap_of(given.model, model, measured, held_out, new=new)
    return {"overlap": found.to_json() if given.json else found.sentence()}


if __name__ == "__main__":
    sys.exit(main())
