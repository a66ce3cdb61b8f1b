"""What a model is worth: closed-set accuracy and open-set verification, on all ranks, with exact counts.

`train` calls `evaluate` after each epoch; `python -m facefast.evaluate MODEL --data.root DIR` does it for a finished model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from facefast import checkpoint, cli, metrics, runtime
from facefast.data import FaceIndex, PairSet, make_loader, read_bin, read_index, read_pairs
from facefast.models import FaceModel
from facefast.recipe import DataConfig, EvalConfig
from facefast.runtime import Runtime, decode_threads
from facefast.step import Precision


@dataclass(frozen=True)
class Exam:
    """What a model is asked: pictures of known identities to name, and pairs of pictures to verify."""

    test: FaceIndex | None
    """Labels are the model's classes."""
    verification: FaceIndex | None
    pairs: PairSet | None
    held_out: bool
    """Whether the verified identities were kept out of training."""


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
) -> tuple[Tensor, Tensor]:
    """Embeddings of every readable row, the same on every rank.

    Returns:
        [N, D] float32 on the CPU, before normalisation, the mean of picture and mirror image where `mirror`; and [N]
        bool, False for rows that could not be read.
    """
    found: Tensor | None = None
    seen = torch.zeros(len(index))
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
    return found, seen > 0


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
) -> dict[str, float]:
    """Every number the exam has, the same on every rank.

    Returns:
        Closed set: loss, top1, top5, per_class, test_rows. Verification: verification_accuracy (with its standard
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
        )

    was_training = model.training
    results: dict[str, float] = {}
    cached: tuple[Tensor, Tensor] | None = None
    if exam.test is not None:
        cached = embed(exam.test)
        results |= _closed_set(model, *cached, torch.from_numpy(exam.test.labels).long(), run.device)
    if exam.verification is not None and exam.pairs is not None:
        embeddings, seen = cached if cached and exam.verification is exam.test else embed(exam.verification)
        found = verification(embeddings, seen, exam.pairs)
        prefix = "" if exam.held_out else "known_"
        results |= {prefix + name: value for name, value in found.items()}
    model.train(was_training)
    return results


def _closed_set(
    model: FaceModel, embeddings: Tensor, seen: Tensor, labels: Tensor, device: torch.device
) -> dict[str, float]:
    """The head on [N, D] embeddings, a block at a time so that many classes need no N x C memory."""
    seen = seen & (labels >= 0)
    ranks, losses = [], 0.0
    with torch.inference_mode():
        for block, target in zip(embeddings[seen].split(1024), labels[seen].split(1024), strict=True):
            logits = model.classify(block.to(device)).float().cpu()  # [b, C]
            ranks.append((logits > logits.gather(1, target[:, None])).sum(1))
            losses += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    rank = torch.cat(ranks)
    correct = (rank == 0).double()
    counts = torch.bincount(labels[seen])
    per_class = torch.bincount(labels[seen], weights=correct)[counts > 0] / counts[counts > 0]
    return {
        "loss": losses / len(rank),
        "top1": float(correct.mean()),
        "top5": float((rank < 5).double().mean()),
        "per_class": float(per_class.mean()),
        "test_rows": len(rank),
    }


def verification(embeddings: Tensor, seen: Tensor, pairs: PairSet) -> dict[str, float]:
    """Verification numbers from [N, D] embeddings; pairs with an unreadable picture are left out and counted.

    Raises:
        ValueError: no pair is left.
    """
    left, right = torch.from_numpy(pairs.left), torch.from_numpy(pairs.right)
    whole = seen[left] & seen[right]
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    scores = (unit[left] * unit[right]).sum(1)[whole].double().numpy()
    keep = whole.numpy()
    same, folds = pairs.same[keep], pairs.folds[keep]
    accuracy = metrics.kfold_verification(scores, same, folds)
    at_1e2 = metrics.tar_at_far(scores, same, 1e-2)
    return {
        "verification_accuracy": accuracy.mean,
        "verification_std": accuracy.std,
        "tar@1e-2": at_1e2.tar,
        "tar@1e-3": metrics.tar_at_far(scores, same, 1e-3).tar,
        "auc": metrics.auc(scores, same),
        "threshold@far1e-2": at_1e2.threshold,
        "pairs": len(scores),
    }
