"""What a model is worth: closed-set accuracy and open-set verification, on all ranks, with exact counts.

`train` calls `evaluate` after each epoch; `python -m facefast.evaluate MODEL --data.root DIR` does it for a finished
model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from facefast.data import FaceIndex, PairSet, make_loader, read_bin, read_lfw
from facefast.data.prepare import Exam, check_budget, divide, read_photographs
from facefast.evaluation import metrics
from facefast.evaluation.baselines import Gallery, baseline_accuracies
from facefast.models import FaceModel, checkpoint
from facefast.recipe import (
    DataConfig,
    EvalConfig,
    Phase,
    Recipe,
    from_json,
)
from facefast.runtime import exits, process
from facefast.runtime.process import Runtime, decode_threads
from facefast.training.step import Precision


def embed_rows(
    model: FaceModel,
    index: FaceIndex,
    run: Runtime,
    precision: Precision,
    *,
    batch_size: int,
    threads: int = 0,
    mirror: bool = True,
    max_bad_fraction: float = 0.01,
    max_pixels: int = DataConfig.max_pixels,
) -> tuple[Tensor, Tensor]:
    """Embeddings of every readable row, the same on every rank.

    Returns:
        [N, D] float32 on the CPU, before normalisation, the mean of picture and mirror image where `mirror`; and [N]
        bool, False for rows that could not be read.
    """
    found: Tensor | None = None
    seen = torch.zeros(len(index))
    batch_size = min(batch_size, math.ceil(len(index) / run.world.size))  # what few pictures cannot fill is padded
    model.eval()
    with (
        torch.inference_mode(),
        precision.autocast(run.device),
        make_loader(
            index,
            model.image,
            batch_size=batch_size,
            rank=run.world.rank,
            world=run.world.size,
            device=run.device,
            dtype=torch.float32,
            channels_last=precision.channels_last,
            threads=decode_threads(threads, run.world),
            max_bad_fraction=max_bad_fraction,
            max_pixels=max_pixels,
        ) as loader,
    ):
        for batch in loader:
            embeddings = model.encode(batch.images).float()  # [B, D]
            if mirror:
                embeddings = (embeddings + model.encode(batch.images.flip(3)).float()) / 2
            rows = batch.rows.cpu()
            if found is None:
                found = torch.zeros(len(index), embeddings.shape[1])
            found[rows[rows >= 0]] = embeddings.cpu()[rows >= 0]
            seen[rows[rows >= 0]] = 1
    assert found is not None, "an index without rows has nothing to embed"
    if run.world.size > 1:
        found, seen = _sum_over_ranks(found, run), _sum_over_ranks(seen, run)
    return found.clone(), seen > 0  # a tensor of inference mode could not be changed


def _sum_over_ranks(values: Tensor, run: Runtime) -> Tensor:
    on_device = values.to(run.device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def evaluate(
    model: FaceModel,
    exam: Exam,
    config: EvalConfig,
    run: Runtime,
    precision: Precision,
    *,
    threads: int = 0,
    max_bad_fraction: float = 0.01,
    max_pixels: int = DataConfig.max_pixels,
    gallery: Gallery | None = None,
) -> dict[str, float]:
    """Every number the exam has, the same on every rank.

    Args:
        gallery: embeddings of the training pictures by this model, where its `baselines` are wanted too.

    Returns:
        Closed set: loss, top1, top5, per_class, test_rows, and those of `baselines`. Attributes: NAME/accuracy,
        NAME/auc and NAME/tar@1e-2 of a yes, or NAME/mae and NAME/within5 of a level; tasks, the mean of the AUCs and
        of 1 - mae over the range. Verification: verification_accuracy (with its standard
        deviation over folds), tar@1e-2, tar@1e-3, auc, threshold, pairs; their names start with "known_" where the
        identities were trained on.
    """

    def embed(index: FaceIndex) -> tuple[Tensor, Tensor]:
        return embed_rows(
            model,
            index,
            run,
            precision,
            batch_size=config.batch_size,
            threads=threads,
            max_bad_fraction=max_bad_fraction,
            max_pixels=max_pixels,
        )

    was_training = model.training
    results: dict[str, float] = {}
    cached: tuple[Tensor, Tensor] | None = None
    if exam.test is not None:
        cached = embed(exam.test)
        labels = torch.tensor(exam.test.labels, dtype=torch.long).where(cached[1], -1)
        if model.head is not None:
            results |= _closed_set(model, cached[0], labels, run.device)
        if model.attribute_heads is not None and exam.test.attribute_names == model.attribute_heads.names:
            results |= _attributes(model, *cached, torch.tensor(exam.test.attributes), run.device)
        if gallery is not None and bool((labels >= 0).any()):
            results |= baseline_accuracies(gallery, cached[0][labels >= 0], labels[labels >= 0])
    if exam.verification is not None and exam.pairs is not None:
        embeddings, seen = cached if cached and exam.verification is exam.test else embed(exam.verification)
        found = verification(embeddings, seen, exam.pairs)
        prefix = "" if exam.held_out else "known_"
        results |= {prefix + name: value for name, value in found.items()}
    model.train(was_training)
    return results


def _closed_set(model: FaceModel, embeddings: Tensor, labels: Tensor, device: torch.device) -> dict[str, float]:
    """The head on [N, D] embeddings with a label, a block at a time so that many classes need no N x C memory."""
    seen = labels >= 0
    target, found, loss = labels[seen], [], 0.0
    with torch.inference_mode():
        for block, label in zip(embeddings[seen].split(1024), target.split(1024), strict=True):
            logits = model.classify(block.to(device)).float().cpu() * model.scale  # [b, C]
            found.append(metrics.label_ranks(logits, label))
            loss += float(torch.nn.functional.cross_entropy(logits, label, reduction="sum"))
    ranks = torch.cat(found).numpy()
    per_class = metrics.per_class_accuracy(ranks, target.numpy(), model.num_classes)
    return {
        "loss": loss / len(ranks),
        "top1": metrics.topk_accuracy(ranks),
        "top5": metrics.topk_accuracy(ranks, 5),
        "per_class": float(np.nanmean(per_class)),
        "test_rows": len(ranks),
    }


def _attributes(
    model: FaceModel, embeddings: Tensor, seen: Tensor, values: Tensor, device: torch.device
) -> dict[str, float]:
    """The attribute heads on the rows of [N, D] embeddings whose values [N, A] are known."""
    assert model.attribute_heads is not None
    with torch.inference_mode():
        told = model.tell(embeddings.to(device))
    results: dict[str, float] = {}
    scores = []
    for column, spec in enumerate(model.attribute_heads.specs):
        known = seen & ~values[:, column].isnan()
        truth, answer = values[known, column].numpy(), told[spec.name].cpu()[known].numpy()
        if spec.levels and len(truth):
            errors = np.abs(answer - truth)
            found = {"mae": float(errors.mean()), "within5": float((errors <= 5).mean())}
            scores.append(1 - found["mae"] / (spec.levels[-1] - spec.levels[0]))
        elif 0 < truth.sum() < len(truth):
            found = {
                "accuracy": float(((answer > 0.5) == (truth > 0.5)).mean()),
                "auc": metrics.auc(answer, truth > 0.5),
                "tar@1e-2": metrics.tar_at_far(answer, truth > 0.5, 1e-2).tar,
            }
            scores.append(found["auc"])
        else:
            continue
        results |= {f"{spec.name}/{name}": value for name, value in found.items()}
    if scores:
        results["tasks"] = float(np.mean(scores))
    return results


def verification(embeddings: Tensor, seen: Tensor, pairs: PairSet) -> dict[str, float]:
    """Verification numbers from [N, D] embeddings; pairs with an unreadable picture are left out and counted.

    Raises:
        ValueError: no pair is left.
    """
    left, right = torch.from_numpy(pairs.left), torch.from_numpy(pairs.right)
    whole = seen[left] & seen[right]
    unit = torch.nn.functional.normalize(embeddings, dim=1).numpy()
    scores = metrics.pair_scores(unit, pairs.left, pairs.right)[whole.numpy()]
    keep = whole.numpy()
    same, folds = pairs.same[keep], pairs.folds[keep]
    accuracy = metrics.kfold_verification(scores, same, folds)
    at_1e2 = metrics.tar_at_far(scores, same, 1e-2)
    return {
        "verification_accuracy": accuracy.accuracy,
        "verification_std": accuracy.std,
        "tar@1e-2": at_1e2.tar,
        "tar@1e-3": metrics.tar_at_far(scores, same, 1e-3).tar,
        "auc": metrics.auc(scores, same),
        "threshold@far1e-2": at_1e2.threshold,
        "pairs": len(scores),
    }


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


def find_exam(arguments: EvaluateArguments, model: FaceModel, threads: int) -> Exam:
    """The pairs asked for, or else what the model's own recipe kept for testing, or else random pairs of everybody.

    Raises:
        ValueError: no photographs were named, or two sets of pairs.
    """
    if arguments.pairs and arguments.bin:
        raise ValueError("give --pairs or --bin, not both")
    if arguments.pairs or arguments.bin:
        if arguments.bin:
            index, pairs = read_bin(arguments.bin)
        else:
            assert arguments.pairs is not None
            index, pairs = read_lfw(arguments.data.root, arguments.pairs)
        index = index.scanned(threads=threads, max_pixels=arguments.data.max_pixels)
        check_budget(index, arguments.data.max_bad_fraction)
        return Exam(test=None, verification=index, pairs=pairs, held_out=True)
    if not arguments.data.root:
        raise ValueError("evaluate needs photographs: --data.root DIR, or --bin SET")
    trained = _asked_again(_recipe_of(arguments.model), arguments.data)
    index = read_photographs(trained, threads)
    known = set(model.class_names) & set(index.class_names)
    if known or trained.learns_attributes:
        exam = divide(index, trained, _exam_phase(trained)).exam
        if exam.test is not None and exam.test.class_names == model.class_names:
            return exam
    everybody = index.select(index.labels >= 0).compact()
    config = arguments.eval
    pairs = PairSet.random(everybody, config.pairs, config.folds, arguments.seed)
    return Exam(test=None, verification=everybody, pairs=pairs, held_out=not known)


def _asked_again(trained: Recipe, data: DataConfig) -> Recipe:
    """The recipe that a model was trained with, for an exam on `data`.

    How pictures are divided stays, unless it is given anew. On the photographs that the model was trained on, so does
    what the recipe knows of them: corrections, further folders, attributes, whom to say yes to; others have their own.
    """
    default = DataConfig()
    names = [f.name for f in dataclasses.fields(default)]
    given = {name: getattr(data, name) for name in names if getattr(data, name) != getattr(default, name)}
    merged = dataclasses.replace(trained.data, **given | {"format": data.format})
    if Path(data.root).resolve() == Path(trained.data.root).resolve():
        return dataclasses.replace(trained, data=merged)
    merged = dataclasses.replace(merged, more=(), corrections=data.corrections, labels=data.labels)
    return Recipe(
        data=merged, image=trained.image, phases=(_exam_phase(trained),), eval=trained.eval, seed=trained.seed
    )


def _exam_phase(trained: Recipe) -> Phase:
    """The last phase without what only training needs: its exam is the same."""
    return Phase(name=trained.phases[-1].name, split=trained.phases[-1].split, start="scratch")


def _recipe_of(model: Path) -> Recipe:
    """The recipe a model was trained with; a plain one for a source model's weights."""
    saved = checkpoint.read_recipe(model)
    return Recipe(phases=(Phase(start="scratch"),)) if saved is None else from_json(Recipe, saved)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = tyro.cli(EvaluateArguments, args=arguments, prog="facefast.evaluate")
        with process.start() as run:
            threads = decode_threads(0, run.world)
            model = checkpoint.load_model(given.model, run.device)
            precision = Precision.choose(_recipe_of(given.model), run.device)
            exam = find_exam(given, model, threads)
            results = evaluate(
                model,
                exam,
                given.eval,
                run,
                precision,
                threads=threads,
                max_bad_fraction=given.data.max_bad_fraction,
                max_pixels=given.data.max_pixels,
            )
            if run.is_main and given.json:
                print(json.dumps(results))
            elif run.is_main:
                width = max(map(len, results))
                print(*(f"{name:{width}}  {value:.6g}" for name, value in results.items()), sep="\n")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
