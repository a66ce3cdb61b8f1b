"""Who is it, or nobody we know: the score that names are given by, and the thresholds of a model that was trained on
people.

A face's score is the cosine of its embedding with the direction that the head holds for a person. Strangers for the
thresholds are the people themselves: each picture is compared with everybody but its own person. What two names share,
because they are one person's, would pass for a stranger who is known, and is left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facefast.evaluation.baselines import LabelledEmbeddings
from facefast.evaluation.calibration import Calibration, calibrate
from facefast.evaluation.metrics import Interval
from facefast.evaluation.openset import (
    FPIRS,
    OpenSetScores,
    among_people,
    double_pairs,
    naming_thresholds,
    without_double_names,
)
from facefast.evaluation.pairs import PairScores, pair_thresholds
from facefast.evaluation.thresholds import NamingThreshold, Thresholds
from facefast.models.heads import unit

DEFAULT_FPIR = 0.01
"""Part of strangers that get a name, where nobody asks for another."""
TRAINED_SPREAD = 2.0
"""How often strangers are taken for somebody, as a multiple of how often trained people are taken for each other. On
two sets of 40 strangers, 1803 pictures, with thresholds by trained people: 17.1 and 17.1 % at 10 %, 9.5 and 10.0 % at
5 %, 2.2 and 2.9 % at 1 %, 1.0 and 2.6 % at 0.5 %."""
MOST_PAIRED = 350
"""Pictures of which all pairs are compared."""


class Decisions(NamedTuple):
    """What a model may say, found on pictures that it was not trained on."""

    thresholds: Thresholds
    calibration: Calibration | None
    """None where no picture could be spared for it."""
    twins: tuple[tuple[int, int], ...]
    """Labels that seem to be one person under two names."""


def decide(
    weight: Tensor,
    train: LabelledEmbeddings,
    validation: LabelledEmbeddings | None = None,
    logits: Tensor | None = None,
    *,
    trained: bool = True,
) -> Decisions:
    """Thresholds for naming and for pairs, and the temperature of the probabilities.

    Each picture serves as a stranger's to everybody but its own person.

    Args:
        weight: [C, D] the head's direction of each person.
        train: embeddings of training pictures.
        validation: [V] of pictures that were kept out of training; None where there are none.
        logits: [V, C] of those, whose softmax are the model's probabilities; without them there is no temperature.
        trained: whether the model was trained to tell these people apart. They are then mistaken for each other less
            often than strangers are, and a threshold for a rate of strangers is that for less of them.

    Raises:
        ValueError: fewer than two people, or no picture at all.
    """
    fair = train if validation is None else validation
    everything = scores(train if validation is None else train.joined(validation), weight)
    twins = double_pairs(everything)
    naming = _for_strangers(without_double_names(everything)[0], TRAINED_SPREAD if trained else 1.0)
    pairs = pair_thresholds(_pairs(fair, twins))
    on = f"{_rows(train)} training pictures" + (
        "" if validation is None else f" and {_rows(validation)} kept out of it"
    )
    calibration = None
    if validation is not None and logits is not None:
        calibration = calibrate(logits, validation.labels)
    return Decisions(Thresholds(pairs, naming, f"{on}, each against all people but its own"), calibration, tuple(twins))


def _rows(known: LabelledEmbeddings) -> int:
    return int((known.labels >= 0).sum())


def _for_strangers(strangers: OpenSetScores, spread: float) -> tuple[NamingThreshold, ...]:
    """Thresholds for rates of people never seen, by people who pass one `spread` times less often."""
    of_rates = naming_thresholds(strangers)
    if spread == 1:
        return of_rates
    found = []
    for plain, careful in zip(of_rates, naming_thresholds(strangers, [rate / spread for rate in FPIRS]), strict=True):
        if careful.value is not None and careful.rate_interval is not None:
            low, high = (min(1.0, spread * end) for end in careful.rate_interval)
            careful = dataclasses.replace(careful, rate=plain.rate, rate_interval=Interval(low, high))
        elif plain.value is not None and plain.interval is not None:  # so few pictures show the rate, not a part of it
            value = plain.interval.high
            missed, interval = strangers.missed_part(value)
            careful = dataclasses.replace(plain, value=value, missed=missed, missed_interval=interval)
        else:
            careful = plain
        found.append(careful)
    return tuple(found)


def scores(known: LabelledEmbeddings, weight: Tensor) -> OpenSetScores:
    """How labelled pictures score with their own person, and as strangers to everybody else.

    Args:
        known: [N] pictures.
        weight: [C, D] directions of people.

    Raises:
        ValueError: fewer than two people, or no labelled picture.
    """
    labelled = known.labels >= 0
    return among_people(known.embeddings[labelled], known.labels[labelled].numpy(), weight)


def _pairs(known: LabelledEmbeddings, twins: Sequence[tuple[int, int]]) -> PairScores:
    """All pairs of a part of the pictures, but for those of two names of one person."""
    rows = torch.nonzero(known.labels >= 0).flatten()
    rows = rows[torch.linspace(0, len(rows) - 1, min(MOST_PAIRED, len(rows))).round().long()]
    embeddings, labels = unit(known.embeddings[rows]), known.labels[rows].numpy()
    left, right = np.triu_indices(len(rows), 1)
    one, other = labels[left], labels[right]
    apart = set(twins)
    ordered = zip(np.minimum(one, other).tolist(), np.maximum(one, other).tolist(), strict=True)
    kept = np.array([pair not in apart for pair in ordered], bool)
    cosines = (embeddings @ embeddings.T).numpy()[left, right]
    return PairScores.of(cosines[kept], (one == other)[kept], one[kept], other[kept])


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


def strictest(find: Callable[[float], NamingThreshold]) -> NamingThreshold:
    """The threshold for `DEFAULT_FPIR`, or else for the lowest rate above it that there is one for: at the upper end of
    its interval, because a stranger who is named is worse than a friend who is not. How many known people are missed
    there is not known.

    On 159 people of CelebA the threshold itself names 1.8 % of 1803 pictures of 80 strangers, and 92 % of 635 pictures
    of known people get their name.

    Args:
        find: the threshold for a rate.

    Raises:
        ValueError: there is none; saying why there is none for `DEFAULT_FPIR`.
    """
    refused: ValueError | None = None
    for rate in sorted(rate for rate in FPIRS if rate >= DEFAULT_FPIR):
        try:
            threshold = find(rate)
            threshold.require()
            if threshold.interval is not None:
                return dataclasses.replace(threshold, value=threshold.interval.high, missed=None, missed_interval=None)
            return threshold
        except ValueError as error:
            refused = refused or error
    raise refused or ValueError(f"no threshold is known for FPIR {DEFAULT_FPIR:g} or more")


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
