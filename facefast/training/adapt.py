"""What a source model can be told of the user's pictures without training: how the embeddings of one person scatter,
and the BatchNorm statistics. How much of either is chosen on people left out, since it costs where it does not help.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import FaceIndex
from facefast.data.subsets import joined
from facefast.models import FaceModel
from facefast.models.fold import fold
from facefast.models.heads import unit
from facefast.recipe import AdaptConfig
from facefast.runtime.process import Runtime
from facefast.training.restate import Statistics, layers, restate
from facefast.training.whiten import Scatter, added, whitening, within_scatter

WEIGHTS = (0.5, 1.0)
"""Of the user's BatchNorm statistics, tried beside 0."""
SHRINKAGES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Tried beside 1, which changes nothing."""
Labels = NDArray[np.int64] | NDArray[np.int32]
FAR = 1e-2
"""At which people left out are verified."""
FOLDS = 5
LEAST_PEOPLE = 10
"""With two pictures or more: with fewer left out, a gain cannot be told from chance."""
MOST_ASKED = 1000
"""Pictures of the people left out, in one fold."""
MOST_EACH = 20
"""Of them, of one person."""
ERRORS = 2.0
"""Standard errors over people by which a gain has to be above 0: about one chance in forty."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one setting does to verification of people left out."""

    name: str
    tar: float
    """At `FAR`, the mean over people."""
    gain: float
    """Over doing nothing."""
    low: float
    high: float
    """`ERRORS` standard errors below and above the gain."""


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What was done to a model, and on which grounds."""

    batchnorm: float
    """Weight of the pictures' own BatchNorm statistics; 0 keeps the source's."""
    shrinkage: float
    """Of the within-person covariance; 1 whitens nothing."""
    people: int = 0
    """With two pictures or more, who were left out in turn; 0 where nothing was tried."""
    trials: tuple[Trial, ...] = ()
    why: str = ""
    """Why nothing was tried, where something was to be."""

    @property
    def changes(self) -> bool:
        """Whether the model is another one."""
        return self.batchnorm > 0 or self.shrinkage < 1

    def told(self) -> Iterator[str]:
        """For people."""
        if self.why:
            yield f"the source model stays as it is: {self.why}"
        elif not self.changes:
            yield (
                f"the source model stays as it is: nothing that was tried on {self.people} people left out raises "
                f"TAR at FAR {FAR:.0%} by more than chance does"
            )
        else:
            done = [f"BatchNorm statistics of these pictures, weight {self.batchnorm:g}"] if self.batchnorm else []
            done += [f"whitened, shrinkage {self.shrinkage:g}"] if self.shrinkage < 1 else []
            yield f"the source model is adapted: {' and '.join(done)}"
        for trial in self.trials:
            yield (
                f"  {trial.name}: TAR at FAR {FAR:.0%} of people left out {trial.tar:.1%}, "
                f"{100 * trial.gain:+.1f} points ({100 * trial.low:+.1f} to {100 * trial.high:+.1f})"
            )


Embedding = Callable[[FaceModel, FaceIndex, bool], tuple[Tensor, Tensor]]
"""Embeddings [N, D] of pictures by a model, with their mirror images or without, and [N] whether they could be
read."""
Measuring = Callable[[FaceModel, FaceIndex], Statistics]


def adapt(
    model: FaceModel,
    index: FaceIndex,
    unnamed: FaceIndex | None,
    config: AdaptConfig,
    known: tuple[Tensor, Tensor],
    embed: Embedding,
    measure: Measuring,
    run: Runtime,
    seed: int,
    plain: Tensor | None = None,
) -> tuple[Adaptation, tuple[Tensor, Tensor]]:
    """Adapts a model to pictures, in place.

    Args:
        model: the source, in evaluation mode.
        index: the training pictures.
        unnamed: more of the same kind, without a name.
        config: what to do.
        known: the model's embeddings of `index`, as `embed` gives them.
        embed: as its type says.
        measure: gives BatchNorm statistics, as `statistics_of` does.
        run: whose ranks do the same.
        seed: of what is drawn.
        plain: [N, D] embeddings of `index` without mirror images, where they are there already.

    Returns:
        What was done, and the adapted model's embeddings of `index`.
    """
    people = int((np.bincount(index.labels[index.labels >= 0], minlength=1) > 1).sum())
    if config.choose == "auto" and people < LEAST_PEOPLE:
        why = f"{people} people have two pictures or more; {LEAST_PEOPLE} are needed to choose an adaptation by"
        return Adaptation(0.0, 1.0, why=why), known
    statistical = bool(layers(model))
    weight, shrinkage = config.batchnorm, config.shrinkage
    trials: tuple[Trial, ...] = ()
    if config.choose == "auto" and statistical:
        told = embed(model, index, False) if plain is None else (plain, known[1])
        weight, trials = choose_statistics(model, index, unnamed, told, embed, measure, seed)
        weight = run.broadcast(weight)  # two kinds of processors may round to either side of chance
    elif weight and not statistical:
        raise ValueError(f"adapt.batchnorm {weight:g} has no effect: {model.config.backbone} has no BatchNorm")
    if weight:
        restate(model, measure(model, _with(index, unnamed)), weight)
        known = embed(model, index, True)
    if config.choose == "given" and shrinkage == 1:
        return Adaptation(weight, shrinkage, people), known
    labels = np.where(known[1].numpy(), index.labels, -1)
    groups = groups_of_people(labels, FOLDS, seed)
    scatters = within_scatter(known[0], labels, groups, FOLDS)
    if config.choose == "auto":
        shrinkage, more = choose_shrinkage(known[0], labels, groups, scatters)
        shrinkage, trials = run.broadcast(shrinkage), trials + more
    if shrinkage < 1:
        scatter = added(scatters)
        if not scatter.spreads:
            raise ValueError(
                f"adapt.shrinkage {shrinkage:g} has no effect: no person has two pictures that differ; set 1"
            )
        mapped = whitening(scatter, shrinkage)
        whitened = mapped(known[0].double())
        read = whitened[known[1]]
        fold(model, mapped, read.mean(0), read.var(0, correction=0))
        known = whitened.float(), known[1]
    return Adaptation(weight, shrinkage, people, trials), known


def _with(index: FaceIndex, unnamed: FaceIndex | None) -> FaceIndex:
    return index if unnamed is None else joined(index, [unnamed])


def tar_of_people(embeddings: Tensor, labels: Labels) -> Tensor:
    """[P] for each person with two pictures, in the order of their labels: the part of pairs of their pictures above
    the threshold that `FAR` of all pairs of different people pass.

    Args:
        embeddings: [N, D] of any length.
        labels: [N], not below 0.
    """
    people, numbers = np.unique(labels, return_inverse=True)
    number = torch.from_numpy(numbers)
    directions = unit(embeddings)
    scores = directions @ directions.T
    same = number[:, None] == number
    different = scores[~same]
    rank = max(1, math.ceil(len(different) * FAR))
    threshold = different.kthvalue(len(different) - rank + 1).values
    above = ((scores >= threshold) & same).sum(1) - 1  # not with itself
    counts = number.bincount()
    passed = torch.zeros(len(people), dtype=torch.float64).index_add_(0, number, above.double())
    several = counts > 1
    return (passed / (counts * (counts - 1)))[several]


def choose(tried: Sequence[tuple[str, Tensor]], before: Tensor) -> tuple[int, tuple[Trial, ...]]:
    """Which of several settings to take, by the same people's TAR under each.

    Args:
        tried: names and [P] TARs of people left out.
        before: [P] their TARs where nothing is changed.

    Returns:
        The place of the one with the largest gain among those whose gain is above chance, -1 where none is; and all.
    """
    trials = []
    for name, tars in tried:
        gains = tars - before
        mean, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
        trials.append(Trial(name, float(tars.mean()), mean, mean - ERRORS * error, mean + ERRORS * error))
    sure = [place for place, trial in enumerate(trials) if trial.low > 0]
    return max(sure, key=lambda place: trials[place].gain, default=-1), tuple(trials)


def groups_of_people(labels: Labels, count: int, seed: int) -> NDArray[np.int64]:
    """[C] int64, the group of each person, drawn at random; those with two pictures are in groups of one size.

    Args:
        labels: [N], below 0 for rows that do not count.
        count: groups.
        seed: of the draw.
    """
    pictures = np.bincount(labels[labels >= 0], minlength=1)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(pictures))
    order = order[np.argsort(pictures[order] < 2, kind="stable")]
    groups = np.empty(len(pictures), np.int64)
    groups[order] = np.arange(len(pictures)) % count
    return groups


def rows_to_ask(labels: Labels, people: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows of people with two pictures or more, whole people until `MOST_ASKED` rows are reached.

    Args:
        labels: [N], below 0 for rows that do not count.
        people: [C] whom to choose among.
    """
    pictures = np.bincount(labels[labels >= 0], minlength=len(people))
    chosen = np.flatnonzero(people & (pictures > 1))
    chosen = chosen[np.cumsum(pictures[chosen].clip(max=MOST_EACH)) <= MOST_ASKED]
    rows = np.flatnonzero(np.isin(labels, chosen))
    rows = rows[np.argsort(labels[rows], kind="stable")]
    place = np.arange(len(rows)) - np.searchsorted(labels[rows], labels[rows])
    return rows[place < MOST_EACH]


def choose_shrinkage(
    embeddings: Tensor, labels: Labels, groups: NDArray[np.int64], scatters: Sequence[Scatter]
) -> tuple[float, tuple[Trial, ...]]:
    """How far to whiten, by leaving out one group of people at a time.

    Args:
        embeddings: [N, D] of any length.
        labels: [N], below 0 for rows that do not count; `LEAST_PEOPLE` have two pictures.
        groups: [C] the group of each person.
        scatters: of each group.

    Returns:
        The shrinkage, 1 where whitening gains nothing above chance; and what was tried.
    """
    before: list[Tensor] = []
    after: dict[float, list[Tensor]] = {shrinkage: [] for shrinkage in SHRINKAGES}
    for group in range(len(scatters)):
        others = added([*scatters[:group], *scatters[group + 1 :]])
        if not others.spreads:
            return 1.0, ()
        rows = rows_to_ask(labels, groups == group)
        asked = embeddings[torch.from_numpy(rows)].double()
        before.append(tar_of_people(asked, labels[rows]))
        for shrinkage, tars in after.items():
            tars.append(tar_of_people(whitening(others, shrinkage)(asked), labels[rows]))
    tried = [(f"whitened, shrinkage {shrinkage:g}", torch.cat(tars)) for shrinkage, tars in after.items()]
    best, trials = choose(tried, torch.cat(before))
    return (SHRINKAGES[best] if best >= 0 else 1.0), trials


def choose_statistics(
    model: FaceModel,
    index: FaceIndex,
    unnamed: FaceIndex | None,
    plain: tuple[Tensor, Tensor],
    embed: Embedding,
    measure: Measuring,
    seed: int,
) -> tuple[float, tuple[Trial, ...]]:
    """How much of the pictures' own BatchNorm statistics to take: those of one half of the people serve to verify the
    other half.

    Args:
        model: unchanged afterwards.
        index: the pictures; those without a name belong to both halves.
        unnamed: more of the same kind, which do so too.
        plain: the model's embeddings of `index` without mirror images, [N, D], and [N] whether they could be read.
        embed, measure: as for `adapt`.
        seed: which people are in which half.

    Returns:
        The weight, 0 where nothing is gained above chance; and what was tried.
    """
    groups = groups_of_people(index.labels, 2, seed)
    before: list[Tensor] = []
    after: dict[float, list[Tensor]] = {weight: [] for weight in WEIGHTS}
    for half in range(2):
        others = index.select((index.labels < 0) | (groups[index.labels] != half))
        statistics = measure(model, _with(others, unnamed))
        rows = rows_to_ask(index.labels, groups == half)
        asked = index.select(rows)
        before.append(_tar_of_readable(plain[0][rows], plain[1][rows], asked))
        changed = copy.deepcopy(model)
        for weight in WEIGHTS:
            changed.load_state_dict(model.state_dict())
            restate(changed, statistics, weight)
            after[weight].append(_tar_of_readable(*embed(changed, asked, False), asked))
    tried = [(f"BatchNorm statistics, weight {weight:g}", torch.cat(tars)) for weight, tars in after.items()]
    best, trials = choose(tried, torch.cat(before))
    return (WEIGHTS[best] if best >= 0 else 0.0), trials


def _tar_of_readable(embeddings: Tensor, seen: Tensor, index: FaceIndex) -> Tensor:
    return tar_of_people(embeddings[seen], index.labels[seen.numpy()])
