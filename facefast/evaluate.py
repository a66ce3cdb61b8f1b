"""What a finished model is worth: `python -m facefast.evaluate MODEL --data.root DIR`.

Closed-set accuracy and open-set verification, on all ranks, with exact counts.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from facefast.evaluation.measure import evaluate
from facefast.evaluation.sets import find_evaluation_set, given_pairs
from facefast.models import checkpoint
from facefast.recipe import DataConfig, EvalConfig, Recipe, to_json
from facefast.recipe.options import parse
from facefast.runtime import exits, files, process
from facefast.runtime.process import decode_threads


@dataclass(frozen=True)
class EvaluateArguments:
    """`python -m facefast.evaluate`."""

    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, an exported package or a source model's weights file."""
    data: DataConfig = field(default_factory=DataConfig)
    pairs: Path | None = None
    """LFW's pairs.txt, for the folder in data.root."""
    bin: Path | None = None
    """An InsightFace verification set (.bin)."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    """Of the random pairs, where no list of pairs is given."""
    json: bool = False
    """Print one JSON object and nothing else."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(EvaluateArguments, arguments, "evaluate")
        with process.start(rank_timeout=Recipe.rank_timeout) as run:
            run.require_same(to_json(given))
            reading = given.data.reading(decode_threads(0, run.world))
            model = checkpoint.load_model(given.model, run.device)
            if given.pairs or given.bin:
                evaluation_set = given_pairs(given.data.root, reading, pairs=given.pairs, bin=given.bin)
            else:
                evaluation_set = find_evaluation_set(
                    given.model, model, given.data, given.eval, given.seed, reading.threads
                )
            precision = checkpoint.precision_of(given.model, model)
            results = evaluate(model, evaluation_set, given.eval, run, precision, reading)
            if run.is_main and given.json:
                print(json.dumps(files.strict(results)))
            elif run.is_main:
                width = max(map(len, results))
                print(*(f"{name:{width}}  {value:.6g}" for name, value in results.items()), sep="\n")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
