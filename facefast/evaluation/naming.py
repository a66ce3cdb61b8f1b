"""Who is it, or nobody we know: the score that names are given by, and the thresholds of a model that was trained on
people.

A face's score is the cosine of its embedding with the direction that the head holds for a person. Strangers for the
thresholds are the people themselves: each picture is compared with everybody but its own person. What two names share,
because they are one person's, would pass for a stranger who is known, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facefast.evaluation.baselines import LabelledEmbeddings
from facefast.evaluation.calibration import Calibration, calibrate
from facefast.evaluation.openset import OpenSetScores, naming_thresholds
from facefast.evaluation.pairs import PairScores, pair_thresholds
from facefast.evaluation.thresholds import NamingThreshold, Thresholds
from facefast.models.heads import unit

DEFAULT_FPIR = 0.01
"""Part of strangers that get a name, where nobody asks for another."""
CANDIDATES = 8
"""Entries looked at for the best that is not the same person under another name."""
MOST_PAIRED = 350
"""Pictures of which all pairs are compared."""
BLOCK = 1024


class Decisions(NamedTuple):
    """What a model may say, found on pictures that it was not trained on."""

    thresholds: Thresholds
    calibration: Calibration | None
    """None where no picture could be spared for it."""
    twins: tuple[tuple[int, int], ...]
    """Labels that seem to be one person under two names."""


def decide(weight: Tensor, scale: float, train: LabelledEmbeddings, validation: LabelledEmbeddings | None) -> Decisions:
    """Thresholds for naming and for pairs, and the temperature of the probabilities.

    A threshold for naming is the higher of two: by the validation pictures alone, which are fair but few, and by these
    and the training pictures, which are many but fit their people a little too well.

    Args:
        weight: [C, D] the head's direction of each person.
        scale: of the cosines in the probabilities.
        train: embeddings of training pictures.
        validation: of pictures that were kept out of training; None where there are none.

    Raises:
        ValueError: fewer than two people, or no picture at all.
    """
    fair = train if validation is None else validation
    middle = float(_own(fair, weight).median())
    everything = train if validation is None else _joined(train, validation)
    many, twins = scores(everything, weight, middle)
    naming = naming_thresholds(many)
    if validation is not None:
        naming = tuple(map(_higher, naming, naming_thresholds(scores(validation, weight, middle)[0])))
    pairs = pair_thresholds(_pairs(fair, weight, middle))
    on = f"{_rows(train)} training pictures" + (
        "" if validation is None else f" and {_rows(validation)} kept out of it"
    )
    calibration = None
    if validation is not None:
        labelled = validation.labels >= 0
        logits = scale * unit(validation.embeddings[labelled]) @ unit(weight).T
        calibration = calibrate(logits, validation.labels[labelled])
    return Decisions(Thresholds(pairs, naming, f"{on}, each against all people but its own"), calibration, twins)


def _joined(one: LabelledEmbeddings, other: LabelledEmbeddings) -> LabelledEmbeddings:
    return one._replace(
        embeddings=torch.cat([one.embeddings, other.embeddings]), labels=torch.cat([one.labels, other.labels])
    )


def _rows(known: LabelledEmbeddings) -> int:
    return int((known.labels >= 0).sum())


def _own(known: LabelledEmbeddings, weight: Tensor) -> Tensor:
    """[N] score of each labelled picture with its own person."""
    labelled = known.labels >= 0
    return (unit(known.embeddings[labelled]) * unit(weight[known.labels[labelled]])).sum(1)


def _higher(one: NamingThreshold, other: NamingThreshold) -> NamingThreshold:
    if one.value is None or other.value is None:
        return other if one.value is None else one
    return max(one, other, key=lambda threshold: threshold.value or 0.0)


def scores(known: LabelledEmbeddings, weight: Tensor, same: float) -> tuple[OpenSetScores, tuple[tuple[int, int], ...]]:
    """How labelled pictures score with their own person, and as strangers to everybody else.

    Args:
        known: [N] pictures.
        weight: [C, D] directions of people.
        same: two people whose directions are at least as alike are one, by two names.

    Returns:
        The scores, and the pairs of labels that were taken for one person.

    Raises:
        ValueError: fewer than two people, or no labelled picture.
    """
    labelled = known.labels >= 0
    probes, labels, directions = unit(known.embeddings[labelled]), known.labels[labelled], unit(weight)
    if len(directions) < 2 or not len(probes):
        raise ValueError(f"{len(probes)} pictures of {len(directions)} people; two people are needed for a stranger")
    parts = []
    twins: set[tuple[int, int]] = set()
    for x, y in zip(probes.split(BLOCK), labels.split(BLOCK), strict=True):
        cosines = x @ directions.T  # [b, C]
        mine = cosines.gather(1, y[:, None])
        ranks = (cosines > mine).sum(1)
        others = cosines.scatter(1, y[:, None], -torch.inf)
        best, who = others.topk(min(CANDIDATES, len(directions) - 1), dim=1)
        alike = (directions[who] * directions[y][:, None]).sum(2) >= same
        names = torch.stack([y[:, None].expand_as(who)[alike], who[alike]], 1).sort(1).values
        twins |= {(a, b) for a, b in names.unique(dim=0).tolist()}
        parts.append((mine[:, 0], ranks, best.masked_fill(alike, -1.0).amax(1)))
    genuine, ranks, impostors = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    people = labels.numpy()
    found = OpenSetScores(
        genuine.astype(np.float64), ranks.astype(np.int64), impostors.astype(np.float64), people, people
    )
    return found, tuple(sorted(twins))


def _pairs(known: LabelledEmbeddings, weight: Tensor, same: float) -> PairScores:
    """All pairs of a part of the pictures, but for those of two names of one person."""
    rows = torch.nonzero(known.labels >= 0).flatten()
    rows = rows[torch.linspace(0, len(rows) - 1, min(MOST_PAIRED, len(rows))).round().long()]
    embeddings, labels = unit(known.embeddings[rows]), known.labels[rows]
    left, right = torch.triu_indices(len(rows), len(rows), 1)
    one, other = labels[left], labels[right]
    kept = (one == other) | ((unit(weight[one]) * unit(weight[other])).sum(1) < same)
    left, right, one, other = (column[kept] for column in (left, right, one, other))
    cosines = (embeddings[left] * embeddings[right]).sum(1)
    return PairScores.of(cosines.numpy(), (one == other).numpy(), one.numpy(), other.numpy())


def asked_rate(wish: str) -> float | None:
    """The part of strangers that a wish for a threshold lets through: far@1e-2 is 0.01, auto the default; None for a
    score or none.

    Raises:
        ValueError: it is no such wish.
    """
    if wish == "auto":
        return DEFAULT_FPIR
    kind, at, rate = wish.partition("@")
    if wish == "none" or (not at and _is_number(wish)):
        return None
    if kind in ("far", "fpir") and _is_number(rate) and 0 < float(rate) < 1:
        return float(rate)
    raise ValueError(f"--threshold is {wish!r}; give far@1e-2 (part of strangers named), a score, auto or none")


def score_needed(wish: str, find: Callable[[float], NamingThreshold]) -> float:
    """The score from which on a face gets a name; minus infinity for none.

    Args:
        wish: as for `asked_rate`.
        find: the threshold for a rate.

    Raises:
        ValueError: there is no threshold for that rate; or the wish is none.
    """
    rate = asked_rate(wish)
    if rate is not None:
        return find(rate).require()
    return -math.inf if wish == "none" else float(wish)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


class Name(NamedTuple):
    """What is said of a face."""

    names: tuple[str, ...]
    """The most probable people, best first."""
    probabilities: tuple[float, ...]
    score: float
    """Cosine with the first of them."""


def name_faces(weight: Tensor, logits: Tensor, embeddings: Tensor, class_names: Sequence[str], top: int) -> list[Name]:
    """The most probable people of each face.

    Args:
        weight: [C, D] the head's directions.
        logits: [N, C], scaled.
        embeddings: [N, D] of any length.
        class_names: [C].
        top: people a face.
    """
    found = torch.softmax(logits, 1).topk(min(top, logits.shape[1]), dim=1)
    cosines = (unit(embeddings) * unit(weight[found.indices[:, 0]])).sum(1)
    answers = zip(found.indices.tolist(), found.values.tolist(), cosines.tolist(), strict=True)
    return [Name(tuple(class_names[k] for k in who), tuple(p), score) for who, p, score in answers]
