"""An int8 copy of a model that is refused where it recognises worse: `python -m facefast.compress MODEL
--data.root DIR --out OUT`.

OUT becomes a package: `model-int8.onnx`, which `facefast.load`, every command and, like what `facefast.export` writes,
any other program reads; `int8.json` (how it was quantised, and what the gate found), `model.json`, `recipe.json`
without paths, and `manifest.json`. Nothing is written where the embeddings or the verification accuracy moved further
than allowed. `facefast.deploy.int8` says how it is quantised.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from facefast.data import FaceIndex, PairSet, make_loader
from facefast.data.formats.pairs import only_named
from facefast.data.prepare import Locate, read_photographs
from facefast.data.subsets import which_are_in
from facefast.deploy import onnx_file, package
from facefast.deploy.gate import Array, Gate, compare, seconds_per_picture
from facefast.evaluation.sets import find_evaluation_set
from facefast.faces.align import locator
from facefast.models import FaceModel, checkpoint, exported, provenance
from facefast.recipe import DataConfig, EvalConfig, Reading, to_json
from facefast.recipe.options import parse, typed
from facefast.recipe.ranges import LARGEST_SEED, MOST, require
from facefast.runtime import exits, files, manifest, process
from facefast.runtime.terminal import say

FORMAT = 2
PACKAGE = (exported.INT8, "int8.json", "model.json", "recipe.json", "manifest.json")
"""The files of OUT."""
FEWEST = 16
"""Photographs without which nothing can be calibrated, let alone checked."""
MOST_UNPAIRED = 2000
"""Photographs whose embeddings are compared where they make no pairs."""
BATCH = 32
SLACK = 0.002
"""Cosine above the gate's that the choice of layers aims at, because the gate looks at other photographs."""


@dataclass(frozen=True)
class CompressArguments:
    """`python -m facefast.compress`."""

    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, an exported package or a source model's weights file."""
    out: Path
    """The folder to write."""
    data: DataConfig = field(default_factory=DataConfig)
    min_cosine: float = 0.98
    """Least mean cosine between int8 and float32 embeddings."""
    max_loss: float = 0.005
    """Greatest loss of verification accuracy, against MODEL and against `original`."""
    original: Path | None = None
    """The model that MODEL was distilled or pruned from: the result is held against it too."""
    original_min_cosine: float = 0.9
    """Least mean cosine to the embeddings of `original`."""
    photographs: int = 256
    """Photographs that the ranges of activations are taken from, at most half of those there are: others judge."""
    pairs: int = 6000
    """Verification pairs of the gate, half of one identity, half of two."""
    seed: int = 0
    """Of the photographs and of the pairs."""

    def __post_init__(self) -> None:
        require(self, min_cosine=(-1, 1), original_min_cosine=(-1, 1), max_loss=(0, 1))
        require(self, photographs=(FEWEST, MOST), pairs=(2, MOST), seed=(0, LARGEST_SEED))


def read_pictures(index: FaceIndex, model: FaceModel, reading: Reading) -> Iterator[tuple[Array, Tensor]]:
    """Readable pictures [B, 3, H, W] as the model takes them, and their rows [B]."""
    with make_loader(
        index,
        model.image,
        batch_size=min(BATCH, len(index)),
        channels_last=False,
        **dataclasses.asdict(reading),
    ) as loader:
        for batch in loader:
            valid = batch.rows >= 0
            yield batch.images[valid].numpy(), batch.rows[valid]


def divide(
    given: CompressArguments,
    model: FaceModel,
    reading: Reading,
    said: frozenset[str] = frozenset(),
    locate: Locate | None = None,
) -> tuple[FaceIndex, FaceIndex, PairSet | None]:
    """Photographs to calibrate on, photographs for the gate, and the gate's pairs where there are any.

    Nothing is judged by what it was calibrated on: at most half of the photographs calibrate where they are few, those
    in no pair first, and a pair of any that do is left out. Only where no pairs of both kinds remain are all kept.

    Args:
        said: options that were typed, though they may be at their default.

    Raises:
        ValueError: no photographs were named, or they are too few.
    """
    if not given.data.root:
        raise ValueError("compress needs photographs: --data.root DIR, of the kind that the model will see")
    index = read_photographs(given.data, reading, locate)
    if len(index) < FEWEST:
        raise ValueError(
            f"{given.data.root} holds {len(index)} readable photographs; int8 needs at least {FEWEST}, some hundred "
            "are better"
        )
    shuffled = np.random.default_rng(given.seed).permutation(len(index))
    wanted = min(given.photographs, len(index) // 2)
    labels = index.labels[index.labels >= 0]
    counts = np.unique(labels, return_counts=True)[1]
    evaluation_set = None
    if len(counts) > 1 and counts.max() > 1:
        config = EvalConfig(pairs=given.pairs)
        said |= {"eval.pairs"} if "pairs" in said else set()
        evaluation_set = find_evaluation_set(
            given.model, model, given.data, config, given.seed, reading.threads, said, locate
        )
    if evaluation_set is None or evaluation_set.verification is None or evaluation_set.pairs is None:
        return index.select(shuffled[:wanted]), index.select(shuffled[wanted:][::-1][:MOST_UNPAIRED]), None
    judged, pairs = only_named(evaluation_set.verification, evaluation_set.pairs)  # each photograph is embedded once
    in_pairs = which_are_in(index, judged)[shuffled]
    order = np.concatenate([shuffled[~in_pairs], shuffled[in_pairs]])
    free = len(index) - int(in_pairs.sum())
    calibration = index.select(order[: min(given.photographs, max(wanted, free))])
    spent = which_are_in(judged, calibration)
    apart = ~(spent[pairs.left] | spent[pairs.right])
    if spent.any() and len(np.unique(pairs.same[apart])) == 2:
        kept = PairSet.of(pairs.left[apart], pairs.right[apart], pairs.same[apart], int(pairs.folds.max()) + 1)
        judged, pairs = only_named(judged, kept)
    return calibration, judged, pairs


def compress(
    given: CompressArguments,
    model: FaceModel,
    threads: int,
    said: frozenset[str] = frozenset(),
    locate: Locate | None = None,
) -> dict[str, Any]:
    """Quantises `model`, holds it against its parent and writes `given.out` where it passes.

    Args:
        said: options that were typed, though they may be at their default.

    Returns:
        What int8.json says.

    Raises:
        ValueError: too few photographs, ONNX's packages are missing, the gate refuses, or OUT holds something else.
        StorageError: OUT cannot be written.
    """
    try:
        import onnx  # noqa: F401 -- the export needs it first

        from facefast.deploy import int8, onnx_graph
    except ImportError as error:
        raise ValueError("compress needs ONNX's packages: pip install 'facefast[onnx]'") from error
    package.require_weights(model, "compressed")
    _check_out(given.out)
    reading = given.data.reading(threads)
    calibration, judged, pairs = divide(given, model, reading, said, locate)
    parent = onnx_file.network_of(model)
    original = _load_original(given.original, model) if given.original else None
    pictures = np.concatenate([images for images, _ in read_pictures(calibration, model, reading)])
    pictures = np.random.default_rng(given.seed).permutation(pictures)
    found = int8.quantise(parent, pictures, given.min_cosine + SLACK, threads)
    before, after = onnx_graph.session(parent, threads), onnx_graph.session(found.model, threads)
    gate = compare(before, after, read_pictures(judged, model, reading), len(judged), pairs)
    gate.check(given.min_cosine, given.max_loss, "its parent")
    against: Gate | None = None
    if original is not None:
        first = onnx_graph.session(onnx_file.network_of(original), threads)
        against = compare(first, after, read_pictures(judged, model, reading), len(judged), pairs)
        against.check(given.original_min_cosine, given.max_loss, str(given.original))
    one = pictures[:1]
    embedder = onnx_file.Embedder(model).eval()
    embedder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster one
    tensor = torch.from_numpy(one).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        seconds = seconds_per_picture(
            {
                "torch float32": lambda: embedder(tensor),
                "onnxruntime float32": lambda: before.run(None, {"images": one}),
                "onnxruntime int8": lambda: after.run(None, {"images": one}),
            }
        )
    recipe = package.without_paths(checkpoint.read_recipe(given.model))
    for graph in (parent, found.model):
        onnx_file.complete(graph, model, recipe=recipe)
    size_before, content = parent.ByteSize(), found.model.SerializeToString()
    document = {
        "format": FORMAT,
        "image": to_json(model.image),
        "embedding_size": model.embedding_size,
        "input": "images",
        "output": "embeddings",
        "calibration": {
            "photographs": len(pictures),
            "in_gate": int(which_are_in(judged, calibration).sum()),
            "method": found.method,
            "weight_bits": int8.WEIGHT_BITS,
        },
        "layers_in_float": list(found.in_float),
        "gate": dataclasses.asdict(gate) | {"min_cosine": given.min_cosine, "max_loss": given.max_loss},
        "gate_original": against and dataclasses.asdict(against) | {"min_cosine": given.original_min_cosine},
        "bytes_before": size_before,
        "bytes_after": len(content),
        "seconds_per_picture": {name: round(value, 6) for name, value in seconds.items()},
        "threads": threads,
    }
    documents = {"int8": document, "model": model.to_config()} | ({} if recipe is None else {"recipe": recipe})
    _write(given.out, content, documents)
    return document


def _load_original(path: Path, model: FaceModel) -> FaceModel:
    original = checkpoint.load_model(path)
    package.require_weights(original, "held against: --original is what was distilled or pruned")
    ours, theirs = (model.image, model.embedding_size), (original.image, original.embedding_size)
    if ours != theirs:
        raise ValueError(
            f"{path} takes {theirs[0]} and gives {theirs[1]} numbers, the model {ours[0]} and {ours[1]}: their "
            "embeddings cannot be compared; leave --original out"
        )
    return original


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out names a folder")
    others = sorted(file.name for file in out.iterdir() if file.name not in PACKAGE) if out.exists() else []
    if others:
        raise ValueError(f"{out} holds {others[0]}, which is no part of an int8 model; choose an empty folder")
    files.require_writable(out, folder=True)


def _write(out: Path, content: bytes, documents: dict[str, Any]) -> None:
    with files.replacing_folder(out, len(content)) as aside:  # OUT appears whole or not at all
        (aside / exported.INT8).write_bytes(content)
        for stem, document in documents.items():
            files.write_json(aside / f"{stem}.json", document)
        manifest.write(aside, step=0)


def gate_text(document: dict[str, Any]) -> str:
    """What the command prints."""
    gate, seconds = document["gate"], document["seconds_per_picture"]
    rows = [
        ("", "float32", "int8"),
        ("MiB", f"{document['bytes_before'] / 2**20:.2f}", f"{document['bytes_after'] / 2**20:.2f}"),
    ]
    if gate["verification_before"] is not None:
        for name in ("verification_accuracy", "tar@1e-2", "tar@1e-3", "auc"):
            rows.append((name, f"{gate['verification_before'][name]:.2%}", f"{gate['verification_after'][name]:.2%}"))
    times = {name: f"{1e3 * value:.2f}" for name, value in seconds.items()}
    rows.append(
        (f"ms per picture, {document['threads']} threads", times["onnxruntime float32"], times["onnxruntime int8"])
    )
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:{width}}{before:>12}{after:>12}" for name, before, after in rows]
    lines.append(f"torch needs {times['torch float32']} ms per picture")
    lines.append(
        f"cosine of int8 to float32 embeddings: mean {gate['cosine_mean']:.4f}, 1st percentile "
        f"{gate['cosine_p01']:.4f} on {gate['photographs']} photographs, "
        f"{document['calibration']['in_gate'] or 'none'} of which calibrated it"
    )
    if against := document["gate_original"]:
        lines.append(
            f"cosine to the original's embeddings: mean {against['cosine_mean']:.4f}, 1st percentile "
            f"{against['cosine_p01']:.4f}"
        )
        if against["verification_before"]:
            before, after = (against[f"verification_{k}"]["verification_accuracy"] for k in ("before", "after"))
            lines.append(f"verification: the original {before:.2%}, int8 {after:.2%}")
    if gate["verification_before"] is None:
        lines.append("there are no pairs to verify: the gate went by the cosine alone")
    if document["layers_in_float"]:
        lines.append(f"left in float32: {', '.join(document['layers_in_float'])}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(CompressArguments, arguments, "compress")
        with process.start("cpu") as run:
            if run.world.size > 1:
                raise ValueError(f"compress runs in one process, not in {run.world.size}; start it without torchrun")
            threads = process.decode_threads(0, run.world)
            said, model = typed(CompressArguments, arguments), checkpoint.load_model(given.model)
            document = compress(given, model, threads, said, locator(model.image, model.faces, given.data.detect, run))
        say(gate_text(document))
        say(f"{given.out}: passed; {provenance.sentence(model.provenance)}")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
