"""An int8 copy of a model that is refused where it recognises worse: `python -m facefast.compress MODEL
--data.root DIR --out OUT`.

OUT becomes a folder of `model-int8.onnx` (`images` in, `embeddings` of length 1 out, as `facefast.export` has it),
`int8.json` (the pictures that it takes, and what the gate found) and `manifest.json`. Nothing is written where the
embeddings or the verification accuracy moved further than allowed. How it is quantised stands in `int8`.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from facefast import export
from facefast.data import FaceIndex, PairSet, make_loader
from facefast.data.prepare import read_photographs
from facefast.evaluate import EvaluateArguments, find_exam, verification
from facefast.models import FaceModel, checkpoint
from facefast.recipe import DataConfig, EvalConfig, Phase, Recipe, to_json
from facefast.runtime import exits, files, process

Array = NDArray[np.float32]
FORMAT = 1
PACKAGE = ("model-int8.onnx", "int8.json", "manifest.json")
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
    """Photographs that the ranges of activations are taken from."""
    pairs: int = 6000
    """Verification pairs of the gate, half of one identity, half of two."""
    seed: int = 0
    """Of the photographs and of the pairs."""

    def __post_init__(self) -> None:
        if max(abs(self.min_cosine), abs(self.original_min_cosine)) > 1 or not 0 <= self.max_loss <= 1:
            raise ValueError(
                f"min_cosine is {self.min_cosine}, original_min_cosine {self.original_min_cosine} and max_loss "
                f"{self.max_loss}; cosines must lie in [-1, 1] and the loss in [0, 1]"
            )
        if self.photographs < FEWEST or self.pairs < 2:
            raise ValueError(
                f"photographs is {self.photographs} and pairs {self.pairs}; they must be at least {FEWEST} and 2"
            )


@dataclass(frozen=True)
class Gate:
    """What an int8 model is worth beside its float32 parent."""

    cosine_mean: float
    cosine_p01: float
    """First percentile over the photographs."""
    photographs: int
    verification_before: dict[str, float] | None
    """As `evaluate.verification`, of embeddings without mirror images; None without pairs."""
    verification_after: dict[str, float] | None

    @property
    def loss(self) -> float | None:
        """Lost verification accuracy, in parts of 1; None without pairs."""
        if self.verification_before is None or self.verification_after is None:
            return None
        return self.verification_before["verification_accuracy"] - self.verification_after["verification_accuracy"]

    def check(self, min_cosine: float, max_loss: float, other: str) -> None:
        """Lets a model pass that is near enough to the `other` one.

        Raises:
            ValueError: it is worse than allowed.
        """
        if not self.cosine_mean >= min_cosine:
            raise ValueError(
                f"the int8 model gives other embeddings than {other}: mean cosine {self.cosine_mean:.4f} (1st "
                f"percentile {self.cosine_p01:.4f}) on {self.photographs} photographs, at least {min_cosine} is asked "
                "for; nothing was written. Calibrate on more photographs of the kind that the model will see "
                "(--photographs), or lower --min-cosine"
            )
        if self.loss is not None and not self.loss <= max_loss:
            assert self.verification_before is not None and self.verification_after is not None
            raise ValueError(
                f"the int8 model verifies worse than {other}: accuracy "
                f"{self.verification_after['verification_accuracy']:.4f} after "
                f"{self.verification_before['verification_accuracy']:.4f} on {self.verification_after['pairs']} pairs, "
                f"a loss of at most {max_loss} is allowed; nothing was written. Calibrate on more photographs "
                "(--photographs), or raise --max-loss"
            )


def read_pictures(index: FaceIndex, model: FaceModel, data: DataConfig, threads: int) -> Iterator[tuple[Array, Tensor]]:
    """Readable pictures [B, 3, H, W] as the model takes them, and their rows [B]."""
    with make_loader(
        index,
        model.image,
        batch_size=min(BATCH, len(index)),
        channels_last=False,
        threads=threads,
        max_bad_fraction=data.max_bad_fraction,
        max_pixels=data.max_pixels,
    ) as loader:
        for batch in loader:
            valid = batch.rows >= 0
            yield batch.images[valid].numpy(), batch.rows[valid]


def compare(
    before: Any,
    after: Any,
    pictures: Iterator[tuple[Array, Tensor]],
    number: int,
    pairs: PairSet | None,
) -> Gate:
    """Holds two sessions against each other on pictures that are read once.

    Args:
        pictures: of `read_pictures`.
        number: rows of their index.
        pairs: of rows of their index; None leaves verification out.
    """
    found: list[Tensor] = []
    seen = torch.zeros(number, dtype=torch.bool)
    for images, rows in pictures:
        for place, session in enumerate((before, after)):
            embeddings = torch.from_numpy(session.run(None, {"images": images})[0])
            if len(found) == place:
                found.append(torch.zeros(number, embeddings.shape[1]))
            found[place][rows] = embeddings
        seen[rows] = True
    cosines = (found[0][seen] * found[1][seen]).sum(1).numpy()
    results = [None, None] if pairs is None else [verification(embeddings, seen, pairs) for embeddings in found]
    return Gate(float(cosines.mean()), float(np.percentile(cosines, 1)), len(cosines), results[0], results[1])


def divide(given: CompressArguments, model: FaceModel, threads: int) -> tuple[FaceIndex, FaceIndex, PairSet | None]:
    """Photographs to calibrate on, photographs for the gate, and the gate's pairs where there are any.

    Calibration takes photographs that are in no pair first.

    Raises:
        ValueError: no photographs were named, or they are too few.
    """
    if not given.data.root:
        raise ValueError("compress needs photographs: --data.root DIR, of the kind that the model will see")
    index = read_photographs(Recipe(data=given.data, phases=(Phase(start="scratch"),)), threads)
    if len(index) < FEWEST:
        raise ValueError(
            f"{given.data.root} holds {len(index)} readable photographs; int8 needs at least {FEWEST}, some hundred "
            "are better"
        )
    shuffled = np.random.default_rng(given.seed).permutation(len(index))
    labels = index.labels[index.labels >= 0]
    counts = np.unique(labels, return_counts=True)[1]
    exam = None
    if len(counts) > 1 and counts.max() > 1:
        asked = EvaluateArguments(given.model, given.data, eval=EvalConfig(pairs=given.pairs), seed=given.seed)
        exam = find_exam(asked, model, threads)
    if exam is None or exam.verification is None or exam.pairs is None:
        judged = index.select(shuffled[::-1][:MOST_UNPAIRED])
        return index.select(shuffled[: given.photographs]), judged, None
    rows, places = np.unique(np.concatenate([exam.pairs.left, exam.pairs.right]), return_inverse=True)
    left, right = places[: len(exam.pairs)], places[len(exam.pairs) :]
    judged = exam.verification.select(rows)
    known = set(zip(judged.paths.tolist(), judged.offsets.tolist(), strict=True))
    place = zip(index.paths.tolist(), index.offsets.tolist(), strict=True)
    in_pairs = np.array([key in known for key in place])[shuffled]
    order = np.concatenate([shuffled[~in_pairs], shuffled[in_pairs]])
    return index.select(order[: given.photographs]), judged, dataclasses.replace(exam.pairs, left=left, right=right)


def seconds_per_picture(runs: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Medians over rounds in which every contender runs once, so that a busy machine is slow for all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):  # the first two warm up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number > 1:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def compress(given: CompressArguments, model: FaceModel, threads: int) -> dict[str, Any]:
    """Quantises `model`, holds it against its parent and writes `given.out` where it passes.

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
    _check_out(given.out)
    calibration, judged, pairs = divide(given, model, threads)
    parent, size_before = _exported(model)
    original = _load_original(given.original, model) if given.original else None
    pictures = np.concatenate([images for images, _ in read_pictures(calibration, model, given.data, threads)])
    pictures = np.random.default_rng(given.seed).permutation(pictures)
    found = int8.quantise(parent, pictures, given.min_cosine + SLACK, threads)
    before, after = onnx_graph.session(parent, threads), onnx_graph.session(found.model, threads)
    gate = compare(before, after, read_pictures(judged, model, given.data, threads), len(judged), pairs)
    gate.check(given.min_cosine, given.max_loss, "its parent")
    against: Gate | None = None
    if original is not None:
        first = onnx_graph.session(_exported(original)[0], threads)
        against = compare(first, after, read_pictures(judged, model, given.data, threads), len(judged), pairs)
        against.check(given.original_min_cosine, given.max_loss, str(given.original))
    one = pictures[:1]
    embedder = export.Embedder(model).eval()
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
    content = found.model.SerializeToString()
    document = {
        "format": FORMAT,
        "image": to_json(model.image),
        "embedding_size": model.embedding_size,
        "input": "images",
        "output": "embeddings",
        "calibration": {"photographs": len(pictures), "method": found.method, "weight_bits": int8.WEIGHT_BITS},
        "layers_in_float": list(found.in_float),
        "gate": dataclasses.asdict(gate) | {"min_cosine": given.min_cosine, "max_loss": given.max_loss},
        "gate_original": against and dataclasses.asdict(against) | {"min_cosine": given.original_min_cosine},
        "bytes_before": size_before,
        "bytes_after": len(content),
        "seconds_per_picture": {name: round(value, 6) for name, value in seconds.items()},
        "threads": threads,
    }
    _write(given.out, content, document)
    return document


def _exported(model: FaceModel) -> tuple[Any, int]:
    """The ONNX model in float32, and its bytes."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        export.export(model, "onnx", path)
        return onnx.load(path), path.stat().st_size


def _load_original(path: Path, model: FaceModel) -> FaceModel:
    original = checkpoint.load_model(path)
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


def _write(out: Path, content: bytes, document: dict[str, Any]) -> None:
    aside = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        (aside / "model-int8.onnx").write_bytes(content)
        files.write_json(aside / "int8.json", document)
        checkpoint.write_manifest(aside, step=0)
        files.replace_folder(aside, out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise exits.StorageError(f"cannot write {out}: {error}; choose another --out") from error


def table(document: dict[str, Any]) -> str:
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
        f"{gate['cosine_p01']:.4f} on {gate['photographs']} photographs"
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
        given = tyro.cli(CompressArguments, args=arguments, prog="facefast.compress")
        with process.start("cpu") as run:
            if run.world.size > 1:
                raise ValueError(f"compress runs in one process, not in {run.world.size}; start it without torchrun")
            threads = process.decode_threads(0, run.world)
            document = compress(given, checkpoint.load_model(given.model), threads)
        print(table(document))
        print(f"{given.out}: passed")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
