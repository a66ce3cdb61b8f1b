"""A first look at few pictures of each person: whether it is worth asking all of them for an adaptation, which takes
longer than many a training. Pictures like the source's are let through; for others the whole choice pays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import FaceIndex
from facefast.models import FaceModel
from facefast.runtime.process import Runtime
from facefast.training.adapt import (
    BLURS,
    FOLDS,
    LEAST_PEOPLE,
    Embedding,
    Measuring,
    best_tars,
    blur_named,
    blurred,
    choose_map,
    gather,
    statistics_named,
    too_few,
)
from facefast.training.leftout import FAR, Labels, Trial, choose, groups_of_people, some_of_each
from facefast.training.restate import layers, restate

EACH = 3
"""Pictures of a person that are looked at, without their mirror images; of few people more, until there are `MOST`."""
EACH_OF_HEAD = 14
"""Pictures of a person, without their mirror images, whose mean a head starts from. Training does not make up for few:
eight of fifteen cost the default fine-tuning eight test pictures of 994, fourteen cost two (benchmarks/LOG.md)."""
MOST = 720
"""Pictures in all, of whole people. Where there are no more than that, all are asked at once."""
WEIGHT = 0.5
"""Of the pictures' own BatchNorm statistics, at every layer: where much of them helps, so does half."""
FOR_STATISTICS = 128
WORTH = 0.03
"""Gain in TAR that has to be out of the question for the source to be left as it is. Of sets as another camera would
have taken them, which gain 5 to 60 points, the intervals on samples of this size ended at 6.7 points and above; of sets
like the source's at 0.5 to 1.4 (rows `look-` of benchmarks/results/transfer.jsonl)."""

VERIFIED = 0.9
"""TAR from which neither a blur nor BatchNorm statistics are tried: they have cost wherever the source verified so many
(93 to 95 % on sets like the source's and on grey ones)."""


class Look(NamedTuple):
    """What a sample tells."""

    promising: bool
    """Whether the adaptation is to be chosen on all pictures."""
    rows: NDArray[np.int64]
    """[K] the sample."""
    embeddings: Tensor
    """[K, D] of the source, without mirror images."""
    seen: Tensor
    """[K] which could be read."""
    people: int
    verified: float = 0.0
    """TAR of the source on the sample's people, the mean over them."""
    trials: tuple[Trial, ...] = ()
    why: str = ""
    """Why nothing could be tried."""

    def told(self) -> Iterator[str]:
        """For people."""
        if self.why:
            yield f"the source model stays as it is: {self.why}"
            return
        asked = f"{len(self.rows)} pictures of {self.people} people"
        if not self.promising:
            yield (
                f"the source model stays as it is: {asked} rule out that an adaptation raises TAR at FAR {FAR:.0%} of "
                f"people left out by {100 * WORTH:g} points"
                + f" (from {VERIFIED:.0%} on, no blur and no BatchNorm statistics are tried)"
                * (self.verified >= VERIFIED)
            )
        else:
            yield (
                f"{asked} do not rule out that an adaptation raises TAR at FAR {FAR:.0%} of people left out by "
                f"{100 * WORTH:g} points: it is chosen on all pictures"
            )
        for trial in self.trials:
            yield trial.told()


def few_of_each(labels: Labels, each: int, seed: int) -> NDArray[np.int64]:
    """Rows of a few pictures of each person, drawn at random, in order; those of fewer are among those of more.

    Args:
        labels: [N], below 0 for rows that do not count.
        each: pictures of a person at most, but where there are few people.
        seed: of the draw.
    """
    rows = np.flatnonzero(labels >= 0)
    people = len(np.unique(labels[rows]))
    return some_of_each(np.random.Generator(np.random.Philox(seed)), labels, rows, max(each, MOST // max(people, 1)))


def rows_to_look_at(labels: Labels, seed: int) -> NDArray[np.int64]:
    """The sample: of `few_of_each` whole people, drawn at random, those with two pictures or more before others, until
    `MOST` are reached.

    Args:
        labels, seed: as there.
    """
    rows = few_of_each(labels, EACH, seed)
    pictures = np.bincount(labels[rows], minlength=1)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(pictures))
    order = order[np.argsort(pictures[order] < 2, kind="stable")]
    people = order[np.cumsum(pictures[order]) <= MOST]
    return rows[np.isin(labels[rows], people)]


def look(model: FaceModel, index: FaceIndex, embed: Embedding, measure: Measuring, run: Runtime, seed: int) -> Look:
    """Tries on a sample what `adapt` would try on all pictures: every map; and where none of them promises a gain and
    the source verifies few, on one half of the people one blur, and BatchNorm statistics of the other half with one
    weight.

    Args:
        model: the source, in evaluation mode, unchanged afterwards.
        index: the training pictures.
        embed, measure: as for `adapt`.
        run: whose ranks do the same.
        seed: of what is drawn.
    """
    labels = np.where(index.faults == 0, index.labels, -1).astype(np.int64)
    rows = rows_to_look_at(labels, seed)
    people = int((np.bincount(labels[rows], minlength=1) > 1).sum())
    if people < LEAST_PEOPLE:
        return Look(False, rows[:0], torch.zeros(0, model.embedding_size), torch.zeros(0, dtype=torch.bool), people,
                    why=too_few(people))  # fmt: skip
    embeddings, seen = embed(model, index.select(rows), False)
    known = np.where(seen.numpy(), labels[rows], -1)
    groups = groups_of_people(known, FOLDS, seed)
    gathered = gather(embeddings, seen, known, groups, FOLDS, centre=True)
    trials = choose_map(embeddings, known, groups, gathered, seed)[1]
    verified = max((trial.tar - trial.gain for trial in trials), default=0.0)
    # One rank decides: two kinds of processors may round apart.
    if run.broadcast(not _promising(trials) and verified < VERIFIED):
        trials += _networks_tried(model, index.select(rows), known, embeddings, embed, measure, seed)
    return Look(run.broadcast(_promising(trials)), rows, embeddings, seen, people, verified, trials)


def _promising(trials: Sequence[Trial]) -> bool:
    """Whether a gain cannot be ruled out; it cannot where nothing could be told."""
    return not trials or any(trial.high >= WORTH for trial in trials)


def _networks_tried(
    model: FaceModel,
    sample: FaceIndex,
    known: NDArray[np.int64],
    embeddings: Tensor,
    embed: Embedding,
    measure: Measuring,
    seed: int,
) -> tuple[Trial, ...]:
    """What a blur, and what BatchNorm statistics add to the map that goes best with them."""
    theirs = groups_of_people(known, 2, seed)[known.clip(min=0)]
    asked = np.flatnonzero((theirs == 1) & (known >= 0))
    tried = {blur_named(BLURS[0]): copy.deepcopy(model)}
    blurred(tried[blur_named(BLURS[0])], BLURS[0])
    if layers(model):
        draw = np.random.Generator(np.random.Philox(seed)).permutation
        giving = np.sort(draw(np.flatnonzero((theirs == 0) & (known >= 0)))[:FOR_STATISTICS])
        restated = copy.deepcopy(model)
        restate(restated, measure(model, sample.select(giving)), WEIGHT, WEIGHT)
        tried[statistics_named(WEIGHT, WEIGHT)] = restated
    before = best_tars(
        embeddings[torch.from_numpy(asked)], torch.ones(len(asked), dtype=torch.bool), known[asked], seed
    )
    found = []
    for name, network in tried.items():
        after, seen = embed(network, sample.select(asked), False)
        found.append((name, best_tars(after, seen, known[asked], seed)))
    return choose(found, before)[1]
