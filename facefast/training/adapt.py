"""What a source model can be told of the user's pictures without training: how far to blur them, the BatchNorm
statistics, where the embeddings lie, and how those of one person scatter. How much of each is chosen on people left
out, since it costs where it does not help.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import FaceIndex
from facefast.data.subsets import joined
from facefast.models import FaceModel
from facefast.models.fold import LinearMap, fold
from facefast.models.smoothing import REFERENCE, Deviations, Smoothing
from facefast.recipe import AdaptConfig
from facefast.runtime.process import Runtime
from facefast.training.leftout import FAR, Labels, Trial, choose, groups_of_people, rows_to_ask, tar_of_people
from facefast.training.restate import Statistics, layers, restate
from facefast.training.whiten import (
    Scatter,
    Whitening,
    added,
    centring,
    finite,
    map_rows,
    mean_of,
    sums_of,
    whitening,
    within_scatter,
)

BLURS = (Deviations(1.2, 4.0), Deviations(2.5, 4.0))
"""Of the pictures, tried beside none."""
WEIGHTS = ((0.5, 0.5), (1.0, 0.0), (1.0, 1.0))
"""Of the user's BatchNorm statistics at the first layer and the last, tried beside none."""
SHRINKAGES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)
"""Tried, on centred embeddings, beside changing nothing; 1 only centres."""
FEW_SHRINKAGES = (1.0, 0.5)
"""Enough to compare BatchNorm statistics by."""
FOLDS = 5
FEW_FOLDS = 3
"""Of half of the people."""
FEW_EACH = 6
"""Pictures of a person by which blurs and BatchNorm statistics are compared: each is embedded once for every one."""
LEAST_PEOPLE = 10
"""With two pictures or more: with fewer left out, a gain cannot be told from chance."""


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What was done to a model, and on which grounds."""

    luma: float = 0.0
    """Standard deviation of a blur of lightness, in pixels of a picture 112 high; 0 takes pictures as they are."""
    chroma: float = 0.0
    """The same for colour."""
    batchnorm: float = 0.0
    """Weight of the pictures' own BatchNorm statistics at the first layer; 0 keeps the source's."""
    batchnorm_last: float = 0.0
    """At the last layer."""
    centre: bool = False
    """Whether the embeddings' mean was subtracted."""
    shrinkage: float = 1.0
    """Of the within-person covariance; 1 whitens nothing."""
    people: int = 0
    """With two pictures or more, among whom those are who were left out in turn; 0 where nothing was tried."""
    trials: tuple[Trial, ...] = ()
    why: str = ""
    """Why nothing was tried, where something was to be."""

    @property
    def changes(self) -> bool:
        """Whether the model is another one."""
        return max(self.luma, self.chroma, self.batchnorm, self.batchnorm_last) > 0 or self.centre or self.shrinkage < 1

    def told(self) -> Iterator[str]:
        """For people."""
        if self.why:
            yield f"the source model stays as it is: {self.why}"
        elif not self.changes:
            yield (
                "the source model stays as it is: nothing that was tried on people left out raises "
                f"TAR at FAR {FAR:.0%} by more than chance does"
            )
        else:
            done = [blur_named(Deviations(self.luma, self.chroma))]
            done += [statistics_named(self.batchnorm, self.batchnorm_last)]
            done += [_map_named(self.shrinkage, self.centre)]
            yield f"the source model is adapted: {' and '.join(filter(None, done))}"
        for trial in self.trials:
            yield trial.told()


def too_few(people: int) -> str:
    """Why nothing can be chosen."""
    return f"{people} people have two pictures or more; {LEAST_PEOPLE} are needed to choose an adaptation by"


def blur_named(blur: Deviations) -> str:
    """A blur by its deviations, for people."""
    return f"pictures blurred, lightness by {blur.luma:g} and colour by {blur.chroma:g} pixels of {REFERENCE}" * any(
        blur
    )


def statistics_named(first: float, last: float) -> str:
    """BatchNorm statistics by their weights, for people."""
    if first == last:
        return f"BatchNorm statistics of these pictures, weight {first:g}" if first else ""
    return f"BatchNorm statistics of these pictures, weight {first:g} at the first layer to {last:g} at the last"


def _map_named(shrinkage: float, centre: bool) -> str:
    return " and ".join(["centred"] * centre + [f"whitened, shrinkage {shrinkage:g}"] * (shrinkage < 1))


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
        known: the model's embeddings of `index`, as `embed` gives them; they are changed.
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
        return Adaptation(why=too_few(people)), known
    statistical = bool(layers(model))
    blur, weights = Deviations(config.luma, config.chroma), (config.batchnorm, config.batchnorm_last)
    trials: tuple[Trial, ...] = ()
    told: tuple[Tensor, Tensor] | None = None
    # Each is judged with what was chosen before it, and broadcast: two kinds of processors may round to either side of
    # chance.
    if config.choose == "auto":
        told = embed(model, index, False) if plain is None else (plain, known[1])
        blur, trials = choose_blur(model, index, told, embed, seed)
        blur = Deviations(*run.broadcast(tuple(blur)))
    if any(blur):
        blurred(model, blur)
        told = None
    if config.choose == "auto" and statistical:
        weights, tried = choose_statistics(model, index, unnamed, told, embed, measure, seed)
        weights, trials = run.broadcast(weights), trials + tried
    elif any(weights) and not statistical:
        raise ValueError(
            f"adapt.batchnorm {weights[0]:g} and adapt.batchnorm_last {weights[1]:g} have no effect: "
            f"{model.config.backbone} has no BatchNorm"
        )
    if any(weights):
        restate(model, measure(model, _with(index, unnamed)), *weights)
    if any(blur) or any(weights):
        known = embed(model, index, True)
    mapped = adapt_embeddings(*known, index.labels, config, run, seed)
    if mapped.map is not None:
        fold(model, mapped.map, mapped.mean, mapped.variance)
    return Adaptation(*blur, *weights, mapped.centre, mapped.shrinkage, people, trials + mapped.trials), known


class Mapped(NamedTuple):
    """What was done to embeddings."""

    centre: bool
    shrinkage: float
    trials: tuple[Trial, ...] = ()
    map: LinearMap | None = None
    """None where nothing was done."""
    mean: Tensor = torch.zeros(0, dtype=torch.float64)
    """[D] of the mapped embeddings, and"""
    variance: Tensor = torch.zeros(0, dtype=torch.float64)
    """[D]."""


def adapt_embeddings(
    embeddings: Tensor, seen: Tensor, labels: Labels, config: AdaptConfig, run: Runtime, seed: int
) -> Mapped:
    """Centres and whitens embeddings in place, a block at a time: it needs hardly any memory beside them.

    Args:
        embeddings: [N, D] float32 of any length.
        seen: [N] bool, False for rows that hold no embedding.
        labels: [N], below 0 for rows without a person; `LEAST_PEOPLE` have two pictures where the config chooses.
        config: what to do.
        run: whose ranks do the same.
        seed: of what is drawn.

    Raises:
        ValueError: a shrinkage is given, and there is no scatter.
    """
    centre, shrinkage = config.centre, config.shrinkage
    trials: tuple[Trial, ...] = ()
    if config.choose == "given" and shrinkage == 1 and not centre:
        return Mapped(centre, shrinkage)
    labels = np.where(seen.numpy() & finite(embeddings), labels, -1)
    groups = groups_of_people(labels, FOLDS, seed)
    people = gather(embeddings, seen, labels, groups, FOLDS, centre=centre or config.choose == "auto")
    if config.choose == "auto":
        chosen, trials = choose_map(embeddings, labels, groups, people, seed)
        chosen = run.broadcast(chosen)
        if chosen is None:
            return Mapped(False, 1.0, trials)
        centre, shrinkage = True, chosen
    middle = mean_of(people.sums)
    mapped = centring(middle)
    if shrinkage < 1:
        scatter = added(people.scatters)
        if not scatter.spreads:
            raise ValueError(
                f"adapt.shrinkage {shrinkage:g} has no effect: no person has two pictures that differ; set 1"
            )
        mapped = whitening(scatter, shrinkage, middle if centre else None)
    return Mapped(centre, shrinkage, trials, mapped, *map_rows(mapped, embeddings, seen))


def _with(index: FaceIndex, unnamed: FaceIndex | None) -> FaceIndex:
    return index if unnamed is None else joined(index, [unnamed])


class People(NamedTuple):
    """What is known of embeddings by groups of people."""

    sums: Tensor
    """Of `sums_of`; the last group is that of rows without a person, who are left out of nothing."""
    scatters: list[Scatter]


def gather(
    embeddings: Tensor, seen: Tensor, labels: Labels, groups: NDArray[np.int64], count: int, *, centre: bool
) -> People:
    """Sums embeddings up.

    Args:
        embeddings: [N, D] of any length.
        seen: [N] bool, False for rows that hold no embedding.
        labels: [N], below 0 for rows that do not count.
        groups: [C] the group of each person.
        count: groups.
        centre: whether they are centred before they are made 1 long.
    """
    sums = sums_of(embeddings, seen, np.where(labels >= 0, groups[labels.clip(min=0)], count), count + 1)
    # One middle for all scatters, for which it hardly matters whose it is: else each would be summed anew.
    return People(sums, within_scatter(embeddings, labels, groups, count, mean_of(sums) if centre else None))


def tars_left_out(
    embeddings: Tensor,
    labels: Labels,
    groups: NDArray[np.int64],
    people: People,
    shrinkages: Sequence[float],
    seed: int,
) -> list[Tensor]:
    """TARs [P] of people whose pictures are mapped by what the people of other groups say, in turn: as they are, then
    centred and whitened with each shrinkage.

    Args:
        embeddings: [N, D] of any length.
        labels: [N], below 0 for rows that do not count.
        groups: [C] the group of each person.
        people: what `gather` gives for the groups, centred.
        shrinkages: 1 only centres.
        seed: whose pictures are asked where there are too many for all.
    """
    sums, scatters = people
    found: list[list[Tensor]] = [[] for _ in range(1 + len(shrinkages))]
    for group in range(len(scatters)):
        rows = rows_to_ask(labels, groups == group, (seed, group))
        if not len(rows):
            continue
        others = added([*scatters[:group], *scatters[group + 1 :]])
        centre = mean_of(torch.cat([sums[:group], sums[group + 1 :]]))
        asked = embeddings[torch.from_numpy(rows)].double()
        found[0].append(tar_of_people(asked, labels[rows]))
        maps = Whitening(others) if others.spreads else None
        for tars, shrinkage in zip(found[1:], shrinkages, strict=True):
            mapped = centring(centre) if maps is None or shrinkage == 1 else maps.map(shrinkage, centre)
            tars.append(tar_of_people(mapped(asked), labels[rows]))
    return [torch.cat(tars) if tars else torch.zeros(0, dtype=torch.float64) for tars in found]


def tars_with_few_maps(embeddings: Tensor, seen: Tensor, labels: Labels, seed: int) -> list[Tensor]:
    """TARs [P] of `tars_left_out` for `FEW_SHRINKAGES`, by which blurs and BatchNorm statistics are compared.

    Args:
        embeddings: [N, D] of any length.
        seen: [N] bool, False for rows that hold no embedding.
        labels: [N], below 0 for rows that do not count.
        seed: which people are in which group.
    """
    folds = groups_of_people(labels, FEW_FOLDS, seed)
    known = np.where(seen.numpy(), labels, -1)
    people = gather(embeddings, seen, known, folds, FEW_FOLDS, centre=True)
    return tars_left_out(embeddings, known, folds, people, FEW_SHRINKAGES, seed)


def best_tars(embeddings: Tensor, seen: Tensor, labels: Labels, seed: int) -> Tensor:
    """TARs [P] of people left out with the one of a few maps that is best on the whole; arguments as for
    `tars_with_few_maps`."""
    return max(tars_with_few_maps(embeddings, seen, labels, seed), key=lambda each: float(each.nanmean()))


def choose_map(
    embeddings: Tensor, labels: Labels, groups: NDArray[np.int64], people: People, seed: int
) -> tuple[float | None, tuple[Trial, ...]]:
    """How far to whiten centred embeddings, by leaving out one group of people at a time; arguments as for
    `tars_left_out`.

    Returns:
        The shrinkage, 1 where centring alone is best, None where nothing gains above chance; and what was tried.
    """
    spreads = added(people.scatters).spreads
    shrinkages = SHRINKAGES if spreads else (1.0,)
    before, *after = tars_left_out(embeddings, labels, groups, people, shrinkages, seed)
    names = [_map_named(shrinkage, True) for shrinkage in shrinkages]
    best, trials = choose(list(zip(names, after, strict=True)), before)
    return (shrinkages[best] if best >= 0 else None), trials


def blurred(model: FaceModel, blur: Deviations) -> None:
    """Lets a model blur its pictures, in place of what blur it had."""
    model.smoothing = Smoothing(model.image, blur).to(model.pixel_mean.device)


def choose_blur(
    model: FaceModel, index: FaceIndex, plain: tuple[Tensor, Tensor] | None, embed: Embedding, seed: int
) -> tuple[Deviations, tuple[Trial, ...]]:
    """How far to blur the pictures, each judged with the map that goes best with it.

    Args:
        model: unchanged afterwards.
        index: the pictures.
        plain: the model's embeddings of `index` without mirror images, [N, D], and [N] whether they could be read,
            where they are there already.
        embed: as for `adapt`.
        seed: which people are left out together.

    Returns:
        The deviations, 0 where nothing is gained above chance; and what was tried.
    """
    rows = rows_to_ask(index.labels, np.ones(index.num_classes, np.bool_), seed, FEW_EACH)
    asked = index.select(rows)
    changed = copy.deepcopy(model)
    before = best_tars(*_of_rows(changed, asked, rows, plain, embed), asked.labels, seed)
    tried = []
    for blur in BLURS:
        blurred(changed, blur)
        tried.append((blur_named(blur), best_tars(*embed(changed, asked, False), asked.labels, seed)))
    place, trials = choose(tried, before)
    return (BLURS[place] if place >= 0 else Deviations(0, 0)), trials


def _of_rows(
    model: FaceModel, asked: FaceIndex, rows: NDArray[np.int64], plain: tuple[Tensor, Tensor] | None, embed: Embedding
) -> tuple[Tensor, Tensor]:
    return embed(model, asked, False) if plain is None else (plain[0][rows], plain[1][rows])


def choose_statistics(
    model: FaceModel,
    index: FaceIndex,
    unnamed: FaceIndex | None,
    plain: tuple[Tensor, Tensor] | None,
    embed: Embedding,
    measure: Measuring,
    seed: int,
) -> tuple[tuple[float, float], tuple[Trial, ...]]:
    """How much of the pictures' own BatchNorm statistics to take: those of one half of the people serve to verify the
    other half.

    Each weight is judged with the map that goes best with it: whitening mends much of what other statistics would, and
    they are worth only what they add to it.

    Args:
        model: unchanged afterwards.
        index: the pictures; those without a name belong to both halves.
        unnamed: more of the same kind, which do so too.
        plain: as for `choose_blur`.
        embed, measure: as for `adapt`.
        seed: which people are in which half.

    Returns:
        The weights at the first layer and the last, 0 where nothing is gained above chance; and what was tried.
    """
    groups = groups_of_people(index.labels, 2, seed)
    tars: dict[tuple[float, float], list[list[Tensor]]] = {weights: [] for weights in ((0.0, 0.0), *WEIGHTS)}
    for half in range(2):
        others = index.select((index.labels < 0) | (groups[index.labels] != half))
        statistics = measure(model, _with(others, unnamed))
        rows = rows_to_ask(index.labels, groups == half, (seed, half), FEW_EACH)
        asked = index.select(rows)
        changed = copy.deepcopy(model)
        for weights, found in tars.items():
            if any(weights):
                changed.load_state_dict(model.state_dict())
                restate(changed, statistics, *weights)
                embeddings, seen = embed(changed, asked, False)
            else:
                embeddings, seen = _of_rows(model, asked, rows, plain, embed)
            found.append(tars_with_few_maps(embeddings, seen, asked.labels, seed))
    # Of each weight the best of its maps, over both halves.
    best_of = {
        weights: max((torch.cat(one) for one in zip(*found, strict=True)), key=lambda each: float(each.nanmean()))
        for weights, found in tars.items()
    }
    before = best_of.pop((0.0, 0.0))
    tried = [(statistics_named(*weights), found) for weights, found in best_of.items()]
    best, trials = choose(tried, before)
    return (WEIGHTS[best] if best >= 0 else (0.0, 0.0)), trials
