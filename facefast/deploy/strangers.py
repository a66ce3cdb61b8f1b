"""The enrolled as strangers to each other: a gallery's own threshold of naming, and people enrolled under two names.

A stranger has more chances to be taken for somebody among many people, so a gallery's own threshold is the right one.
In a small gallery every picture is a probe; in a large one as many as are drawn, each compared with everybody.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from facefast.evaluation.openset import (
    BLOCK,
    MOST_SCORES,
    Join,
    OpenSetScores,
    double_pairs,
    leave_one_out,
    naming_thresholds,
    without_double_names,
)
from facefast.evaluation.thresholds import RULE_OF_30, NamingThreshold, Thresholds

OWN_ROWS = 20_000
"""Pictures up to which every one is a probe, which takes their square in comparisons; never more are drawn."""
MOST_OF_ONE = 20
"""Pictures of a person that are drawn; more of them say little."""
SEED = 0
"""Of the draw: a gallery has one threshold, not another at each search."""


class Enrolled(Protocol):
    """What is asked of a gallery; as `Gallery` says it."""

    names: tuple[str, ...]
    people: NDArray[np.int32]
    embeddings: NDArray[Any]
    thresholds: Thresholds

    def __len__(self) -> int: ...
    @property
    def counts(self) -> NDArray[np.int64]: ...
    def block(self, begin: int, end: int) -> Tensor: ...
    def entries(self, join: Join) -> Iterator[tuple[Tensor, NDArray[np.int32], NDArray[np.int64]]]: ...


def doubles(gallery: Enrolled) -> list[tuple[str, str]] | None:
    """`double_pairs` of a gallery, by name; None where nobody looks, because it has more than `OWN_ROWS` pictures."""
    if len(gallery) > OWN_ROWS:
        return None
    pairs = double_pairs(_all(gallery, "max")) if len(gallery.names) > 1 else []
    return [(gallery.names[one], gallery.names[other]) for one, other in pairs]


def naming(gallery: Enrolled, fpir: float, join: Join) -> NamingThreshold:
    """As `Gallery.naming`."""
    own: NamingThreshold | None = None
    if len(gallery.names) > 1:
        drawn = None if len(gallery) <= OWN_ROWS else draw(gallery.people, probes_for(len(gallery), fpir))
        scores, _ = without_double_names(_all(gallery, join) if drawn is None else scores_of_rows(gallery, drawn, join))
        (own,) = naming_thresholds(scores, [fpir])
        if own.value is not None:
            return own
    try:
        of_model = gallery.thresholds.name(fpir)
        if len(gallery.names) > of_model.people:
            raise ValueError(
                f"it was found on {of_model.people} people, and among the {len(gallery.names)} that are enrolled "
                "strangers would be named more often"
            )
        return of_model
    except ValueError as error:
        why = own.why if own else f"{len(gallery)} pictures of {len(gallery.names)} people"
        raise ValueError(f"no threshold for naming at FPIR {fpir:g}: {why}; of the model: {error}") from error


def _all(gallery: Enrolled, join: Join) -> OpenSetScores:
    return leave_one_out(torch.from_numpy(np.array(gallery.embeddings, np.float32)), gallery.people, join)


def probes_for(pictures: int, fpir: float) -> int:
    """How many pictures of a large gallery are probes: enough to make the rate firm, or as many as take no longer than
    all of `OWN_ROWS` pictures do."""
    return min(OWN_ROWS, max(OWN_ROWS**2 // pictures, math.ceil(RULE_OF_30 / max(fpir, 1e-9))))


def draw(people: NDArray[np.int32], wanted: int) -> NDArray[np.int64]:
    """Rows of people drawn at random, rising: all of a person's pictures or `MOST_OF_ONE`, until there are enough.

    Whole people, because who is enrolled under two names is told by several pictures.

    Args:
        people: [N] of each row, never falling, from 0 on.
        wanted: rows, at least 1; a little more or less come.
    """
    rng = np.random.default_rng(SEED)
    begins = np.flatnonzero(np.diff(people, prepend=-1))
    counts = np.diff(begins, append=len(people))
    order = rng.permutation(len(begins))
    taken = np.minimum(counts[order], MOST_OF_ONE).cumsum()
    rows = []
    for who in order[: int(np.searchsorted(taken, wanted)) + 1].tolist():
        own = np.arange(begins[who], begins[who] + counts[who])
        rows.append(own if len(own) <= MOST_OF_ONE else rng.choice(own, MOST_OF_ONE, replace=False))
    return np.sort(np.concatenate(rows))


def scores_of_rows(gallery: Enrolled, rows: NDArray[np.int64], join: Join) -> OpenSetScores:
    """As `leave_one_out` of a gallery, for some of its pictures as probes; memory holds them and a block of it.

    Args:
        gallery: of two people or more.
        rows: [Q] rising.
        join: of a person's pictures.
    """
    probes = torch.from_numpy(gallery.embeddings[rows].astype(np.float32))
    entry = gallery.people[rows].astype(np.int64)
    own = _own_scores(gallery, rows, join)
    ranks = np.zeros(len(rows), np.int64)
    best = np.full(len(rows), -np.inf, np.float32)
    nearest = np.zeros(len(rows), np.int64)
    for block, people, starts in gallery.entries(join):
        names = people[starts].astype(np.int64)  # rising, without a gap
        size = max(1, min(BLOCK, MOST_SCORES // len(block)))
        for begin in range(0, len(rows), size):
            part = slice(begin, begin + size)
            scores = (probes[part] @ block.T).numpy()
            if len(starts) < len(people):
                scores = np.maximum.reduceat(scores, starts, axis=1)
            place = entry[part] - names[0]
            here = np.flatnonzero((place >= 0) & (place < len(names)))
            scores[here, place[here]] = -np.inf
            ranks[part] += (scores >= own[part, None]).sum(1)
            top = scores.argmax(1)
            found = scores[np.arange(len(top)), top]
            better = found > best[part]
            best[part], nearest[part] = np.where(better, found, best[part]), np.where(better, names[top], nearest[part])
    known = gallery.counts[entry] > 1
    return OpenSetScores(
        own[known].astype(np.float64), ranks[known], best.astype(np.float64), entry[known], entry, nearest
    )


def _own_scores(gallery: Enrolled, rows: NDArray[np.int64], join: Join) -> NDArray[np.float32]:
    """[Q] score of each picture with the others of its person; nothing to go by for one that is alone."""
    people = gallery.people[rows]
    found = np.zeros(len(rows), np.float32)
    starts = np.flatnonzero(np.diff(people, prepend=-1))
    for begin, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        first, last = np.searchsorted(gallery.people, people[begin] + np.arange(2))
        pictures = gallery.block(int(first), int(last))
        at = torch.from_numpy(rows[begin:end] - first)
        if join == "mean":
            others = pictures.double().sum(0) - pictures[at].double()
            scores = (pictures[at].double() * F.normalize(others, dim=1)).sum(1)
        else:
            alike = pictures[at] @ pictures.T
            alike[torch.arange(len(at)), at] = -torch.inf
            scores = alike.amax(1)
        found[begin:end] = scores.numpy()
    return found
