"""What a model is worth: closed-set accuracy and open-set verification, on all ranks, with exact counts."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import FaceIndex, PairSet
from facefast.data.divide import EvaluationSet
from facefast.evaluation import metrics
from facefast.evaluation.baselines import LabelledEmbeddings, baseline_accuracies
from facefast.evaluation.calibration import expected_calibration_error
from facefast.evaluation.embed import Embed, embed_rows, single
from facefast.models import FaceModel
from facefast.models.heads import CosineHead
from facefast.models.precision import Precision
from facefast.recipe import EvalConfig, Reading
from facefast.runtime.process import Runtime


def evaluate(
    model: FaceModel,
    evaluation_set: EvaluationSet,
    config: EvalConfig,
    run: Runtime,
    precision: Precision,
    reading: Reading,
    known: LabelledEmbeddings | None = None,
    embed: Embed | None = None,
) -> dict[str, float]:
    """Every number the evaluation has, the same on every rank.

    Args:
        known: embeddings of the training pictures by this model, where its `baselines` are wanted too.
        embed: gives the embeddings of an index, where the caller keeps them; `embed_rows` without it.

    Returns:
        Closed set: loss, top1 with its 95 % interval top1_low to top1_high, top5, per_class, ece (the expected
        calibration error), test_rows, and those of `baselines`. Attributes: NAME/accuracy,
        NAME/auc and NAME/tar@1e-2 of a yes, or NAME/mae and NAME/within5 of a level; tasks, the mean of the AUCs and
        of 1 - mae over the range. Verification: verification_accuracy (with its standard
        deviation over folds), tar@1e-2, tar@1e-3, auc, threshold, pairs; their names start with "known_" where the
        identities were trained on.
    """

    def embed_now(index: FaceIndex) -> tuple[Tensor, Tensor]:
        return embed_rows(model, index, run, precision, reading, batch_size=config.batch_size)

    embed = embed or embed_now
    was_training = model.training
    results: dict[str, float] = {}
    cached: tuple[Tensor, Tensor] | None = None
    if evaluation_set.test is not None:
        cached = embed(evaluation_set.test)
        labels = torch.tensor(evaluation_set.test.labels, dtype=torch.long).where(cached[1], -1)
        if model.head is not None and bool((labels >= 0).any()):
            results |= _closed_set(model, single(cached[0], model.embedding_size), labels, run.device)
        if model.attribute_heads is not None and evaluation_set.test.attribute_names == model.attribute_heads.names:
            plain = single(cached[0], model.embedding_size)
            results |= _attributes(model, plain, cached[1], torch.tensor(evaluation_set.test.attributes), run.device)
        if known is not None and bool((labels >= 0).any()):
            results |= baseline_accuracies(known, cached[0][labels >= 0], labels[labels >= 0], run.device)
    if evaluation_set.verification is not None and evaluation_set.pairs is not None:
        embeddings, seen = (
            cached  # pictures of known identities may serve both: they are embedded once
            if cached and evaluation_set.verification is evaluation_set.test
            else embed(evaluation_set.verification)
        )
        found = verification(embeddings, seen, evaluation_set.pairs)
        prefix = "" if evaluation_set.held_out else "known_"
        results |= {prefix + name: value for name, value in found.items()}
    model.train(was_training)
    return results


class Answers(NamedTuple):
    """What the head answers on R labelled pictures."""

    rows: NDArray[np.int64]
    """[R] their places among the embeddings."""
    labels: NDArray[np.int64]
    """[R] the right classes."""
    ranks: NDArray[np.int64]
    """[R] classes that stand before the right one; 0 is found first."""
    predicted: NDArray[np.int64]
    """[R] the most probable class; -1 where the head lies on several ranks and the answer is wrong: none knows it."""
    sure: NDArray[np.float64]
    """[R] probability of the most probable class."""
    loss: float
    """Mean cross entropy, without the margin, which belongs to training: this is what the model would answer."""


def answers(model: FaceModel, embeddings: Tensor, labels: Tensor, device: torch.device) -> Answers:
    """The head on [N, D] embeddings with a label [N] of at least 0, a block at a time so that many classes need no
    N x C memory; with a divided head on all ranks together."""
    seen = labels >= 0
    target, found, best, sure, loss = labels[seen], [], [], [], 0.0
    with torch.inference_mode():
        for block, label in zip(embeddings[seen].split(1024), target.split(1024), strict=True):
            if isinstance(model.head, CosineHead) and model.head.divided:  # no rank has the logits of all classes
                standing = model.head.standing(block.to(device), label.to(device), model.scale)
                found.append(standing.before.cpu())
                best.append(label.where(found[-1] == 0, -1))
                sure.append(standing.sure.cpu())
                loss += float(standing.loss.sum())
                continue
            logits = model.classify(block.to(device)).float().cpu() * model.scale  # [b, C]
            found.append(metrics.label_ranks(logits, label))
            best.append(logits.argmax(1))
            sure.append(logits.softmax(1).amax(1))
            loss += float(torch.nn.functional.cross_entropy(logits, label, reduction="sum"))
    return Answers(
        rows=seen.nonzero()[:, 0].numpy(),
        labels=target.numpy(),
        ranks=torch.cat(found).numpy(),
        predicted=torch.cat(best).numpy(),
        sure=torch.cat(sure).double().numpy(),
        loss=loss / len(target),
    )


def _closed_set(model: FaceModel, embeddings: Tensor, labels: Tensor, device: torch.device) -> dict[str, float]:
    found = answers(model, embeddings, labels, device)
    ranks = found.ranks
    low, high = metrics.wilson_interval(int((ranks == 0).sum()), len(ranks))
    per_class = metrics.per_class_accuracy(ranks, found.labels, model.num_classes)
    return {
        "loss": found.loss,
        "top1": metrics.topk_accuracy(ranks),
        "top1_low": low,
        "top1_high": high,
        "top5": metrics.topk_accuracy(ranks, 5),
        "per_class": float(np.nanmean(per_class)),
        "ece": expected_calibration_error(found.sure, ranks == 0),
        "test_rows": len(ranks),
    }


def _attributes(
    model: FaceModel, embeddings: Tensor, seen: Tensor, values: Tensor, device: torch.device
) -> dict[str, float]:
    """The attribute heads on the rows of [N, D] embeddings whose values [N, A] are known."""
    assert model.attribute_heads is not None
    with torch.inference_mode():
        attributes = model.predict_attributes(embeddings.to(device))
    results: dict[str, float] = {}
    scores = []
    for column, spec in enumerate(model.attribute_heads.specs):
        known = seen & ~values[:, column].isnan()
        truth, answer = values[known, column].numpy(), attributes[spec.name].cpu()[known].numpy()
        if spec.levels and len(truth):
            errors = np.abs(answer - truth)
            found = {"mae": float(errors.mean()), "within5": float((errors <= 5).mean())}
            scores.append(1 - found["mae"] / (spec.levels[-1] - spec.levels[0]))
        elif 0 < truth.sum() < len(truth):  # both answers must occur, or the AUC is not defined
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
    """Verification numbers from [N, D] embeddings; pairs with an unreadable picture are left out.

    Returns:
        What the pairs that are left can show: without two folds that hold pairs of both kinds there is no accuracy (it
        is NaN), without pairs of both kinds nothing but their number.
    """
    # Left out, not counted as wrong: which pictures are readable says nothing about the model.
    left, right = torch.from_numpy(pairs.left), torch.from_numpy(pairs.right)
    whole = seen[left] & seen[right]
    unit = torch.nn.functional.normalize(embeddings, dim=1).numpy()
    scores = metrics.pair_scores(unit, pairs.left, pairs.right)[whole.numpy()]
    keep = whole.numpy()
    same, folds = pairs.same[keep], pairs.folds[keep]
    if same.all() or not same.any():
        return {"pairs": len(scores)}
    kinds = [set(same[folds != fold].tolist()) for fold in np.unique(folds)]
    accuracy, spread = math.nan, math.nan
    if len(kinds) > 1 and all(kind == {True, False} for kind in kinds):
        found = metrics.kfold_verification(scores, same, folds)
        accuracy, spread = found.accuracy, found.std
    at_1e2 = metrics.tar_at_far(scores, same, 1e-2)
    return {
        "verification_accuracy": accuracy,
        "verification_std": spread,
        "tar@1e-2": at_1e2.tar,
        "tar@1e-3": metrics.tar_at_far(scores, same, 1e-3).tar,
        "auc": metrics.auc(scores, same),
        "threshold@far1e-2": at_1e2.threshold,
        "pairs": len(scores),
    }
