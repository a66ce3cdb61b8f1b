"""Which pictures show one person: neighbours, clusters, labels for the unlabelled, and how far groupings agree.

Functions of embeddings alone, float32 [N, D] rows of length 1; `assign` says on standard error where it has too little
to go by. Similarities are computed a block of rows at a time: no N x N matrix is held.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from facefast.runtime.terminal import complain

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]

BLOCK_CELLS = 1 << 24
"""Similarities held at a time: 64 MiB of float32."""
SAME_PERSON = 0.3
"""Mean cosine from which two clusters are one person where a model knows no threshold of its own: about one pair of
strangers in a hundred reaches it with networks trained with an angular margin."""
SEVERAL_PICTURES = 50
"""Fewest pictures whose nearest neighbours can show that a set has several people."""
SEVERAL_GAP = 3.0
"""Standard deviations that nearest neighbours lie above what chance gives where there are several people; the pictures
of one person stay below (on celebrities' photographs at most 1.3, sets of ten people or more at least 3.4)."""
FALSE_NAMES = 1e-2
"""Part of strangers that a known person's name may go to where a threshold alone says who is nobody known: the false
match rate of the model's threshold for pairs, too."""
MOST_LOSSES = 1 << 22
"""Similarities that the temperature is fitted on; more rows, evenly chosen, would not change it."""


def unit_rows(embeddings: Floats) -> Floats:
    """`embeddings` [N, D] with every row of length 1.

    Raises:
        ValueError: not a matrix of finite numbers.
    """
    if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        raise ValueError(
            f"embeddings have the shape {embeddings.shape} and {np.count_nonzero(~np.isfinite(embeddings))} numbers "
            "that are not finite; give [N, D] finite numbers: leave out pictures that could not be read"
        )
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.asarray(embeddings / np.maximum(lengths, 1e-12), np.float32)


def similarity_blocks(left: Floats, right: Floats, block: int = 0) -> Iterator[tuple[slice, Floats]]:
    """(rows, left[rows] @ right.T) over all rows of `left`; `block` rows at a time, 0 is what memory allows."""
    block = block or max(1, BLOCK_CELLS // max(1, len(right)))
    matrix = torch.from_numpy(np.ascontiguousarray(right)).T
    for start in range(0, len(left), block):
        rows = slice(start, min(start + block, len(left)))
        yield rows, (torch.from_numpy(np.ascontiguousarray(left[rows])) @ matrix).numpy()


def neighbours(embeddings: Floats, count: int, block: int = 0) -> tuple[Numbers, Floats]:
    """The `count` most similar other rows of each row, and their cosines: [N, K] each, K = min(count, N - 1)."""
    rows = len(embeddings)
    count = min(count, rows - 1)
    places = np.zeros((rows, max(count, 0)), np.int64)
    cosines = np.zeros(places.shape, np.float32)
    if count < 1:
        return places, cosines
    for part, found in similarity_blocks(embeddings, embeddings, block):
        found[np.arange(len(found)), np.arange(part.start, part.stop)] = -np.inf  # a row is no neighbour of its own
        best = torch.from_numpy(found).topk(count, dim=1)
        places[part], cosines[part] = best.indices.numpy(), best.values.numpy()
    return places, cosines


def strangers(embeddings: Floats, seed: int = 0, num_pairs: int = 1 << 18) -> tuple[float, float]:
    """Mean and standard deviation of the cosines of two people's pictures; (0, 0) where there is one row.

    Most random pairs are of two people: the median and the spread below it are theirs, since pairs of one person
    hardly touch them.
    """
    left, right = np.random.default_rng(seed).integers(len(embeddings), size=(2, num_pairs))
    left, right = left[left != right], right[left != right]
    if len(left) == 0:
        return 0.0, 0.0
    parts = [slice(start, start + 4096) for start in range(0, len(left), 4096)]
    cosines = [np.einsum("nd,nd->n", embeddings[left[part]], embeddings[right[part]]) for part in parts]
    middle, low = np.quantile(np.concatenate(cosines), (0.5, NormalDist().cdf(-1)))
    return float(middle), float(middle - low)


def stranger_limit(embeddings: Floats, rate: float = 0.0) -> float:
    """The cosine above which a part of strangers lies, the normal quantile 1 - `rate` of `strangers`; 0 takes 1/N, and
    a row expects one among all N."""
    mean, deviation = strangers(embeddings)
    return mean + deviation * NormalDist().inv_cdf(1 - (rate or 1 / max(len(embeddings), 2)))


def shows_several(embeddings: Floats) -> bool:
    """Whether nearest neighbours are nearer than in a set of one person: random pairs are of strangers then."""
    if len(embeddings) < SEVERAL_PICTURES:
        return False
    nearest = float(np.median(neighbours(embeddings, 1)[1]))
    return nearest >= stranger_limit(embeddings) + SEVERAL_GAP * strangers(embeddings)[1]


def default_similarity(embeddings: Floats, same_person: float | None = None) -> float:
    """Least mean cosine of two clusters that are one person, for a set of any number of people.

    A threshold of pairs holds for a handful of people, or one. Among many pictures each row has more strangers that may
    come near, and `stranger_limit` says how near; but only where most random pairs are of strangers. In a set of one
    person it measures that person, and would leave every picture alone. So it counts only where nearest neighbours are
    nearer than chance makes them in a set of one kind.

    Args:
        embeddings: [N, D] of length 1.
        same_person: the model's threshold for pairs; None takes `SAME_PERSON`.
    """
    base = SAME_PERSON if same_person is None else same_person
    return max(base, stranger_limit(embeddings)) if shows_several(embeddings) else base


def cluster(
    embeddings: Floats,
    *,
    similarity: float | None = None,
    min_size: int = 2,
    num_neighbours: int = 8,
    block: int = 0,
) -> tuple[Numbers, Floats]:
    """Groups rows that look like one person: average linkage over the graph of nearest neighbours.

    Only clusters joined by an edge of the graph may merge, the most similar first, while the mean cosine between their
    rows (exact, from sums of embeddings) stays above `similarity`. On celebrity photographs this beat HDBSCAN
    (Campello et al. 2013) on every measure and left 2 % of the rows alone where HDBSCAN left 6 to 10 %.

    Args:
        embeddings: [N, D].
        similarity: None takes `default_similarity`.
        min_size: smaller clusters are noise.
        num_neighbours: edges of a row.
        block: rows of similarities at a time; changes nothing but memory.

    Returns:
        Labels [N], 0 is the largest cluster, -1 noise; and confidences [N] in [0, 1]: that of a row's own
        cluster against the next one, the row itself left out, by the softmax of `assign`; 0 for noise and for a
        cluster of one. A lone cluster has no next one: its rows are held against a person as near as `similarity`.

    Raises:
        ValueError: embeddings that are not finite, or `min_size` or `num_neighbours` below 1.
    """
    if min_size < 1 or num_neighbours < 1:
        raise ValueError(f"min_size is {min_size} and num_neighbours {num_neighbours}; both must be at least 1")
    # Only pairs among nearest neighbours are candidates, so the work grows with N times K, not with N squared.
    unit = unit_rows(embeddings)
    limit = default_similarity(unit) if similarity is None else similarity
    roots = _merge(unit, *neighbours(unit, num_neighbours, block), limit)
    _, first, inverse, counts = np.unique(roots, return_index=True, return_inverse=True, return_counts=True)
    # The largest cluster first, equal ones by their first row: the numbers are the same each time.
    order = np.lexsort((first, -counts))
    order = order[counts[order] >= min_size]
    number = np.full(len(counts), -1)
    number[order] = np.arange(len(order))
    labels = number[inverse].astype(np.int64)
    # How sure a row is: its own cluster against the nearest other one, as a softmax of the two would have it.
    own, other, _ = own_and_other(unit, labels, len(order), block=block)
    scale = _temperature(unit, labels, len(order), own, block)
    margin = own - np.where(np.isfinite(other), other, limit)
    confidences = np.where(np.isfinite(own), 1 / (1 + np.exp(np.minimum(-scale * margin, 80))), 0)
    return labels, confidences.astype(np.float32)


def _merge(unit: Floats, places: Numbers, cosines: Floats, limit: float) -> Numbers:
    """[N] the number of each row's cluster, arbitrary but the same each time."""
    rows = len(unit)
    links: dict[int, set[int]] = {row: set() for row in range(rows)}
    queue: list[tuple[float, int, int]] = []
    for row, column in np.argwhere(cosines >= limit).tolist():
        other = int(places[row, column])
        if other not in links[row]:
            links[row].add(other)
            links[other].add(row)
            queue.append((-float(cosines[row, column]), min(row, other), max(row, other)))
    heapq.heapify(queue)
    # Rows have length 1, so the mean cosine between two clusters is the product of their sums over the product of their
    # sizes: average linkage without looking at rows again. In float64, since sums of sums are compared with a limit.
    sums = dict(enumerate(unit.astype(np.float64)))
    sizes = dict.fromkeys(range(rows), 1)
    parents = list(range(rows))
    while queue:
        _, one, other = heapq.heappop(queue)
        # Edges are never taken out of the queue. A merged cluster gets a new number, so an edge whose ends are gone is
        # an old one.
        if one not in links or other not in links:
            continue
        new = len(parents)
        parents.append(new)
        parents[one] = parents[other] = new
        sums[new], sizes[new] = sums.pop(one) + sums.pop(other), sizes.pop(one) + sizes.pop(other)
        links[new] = (links.pop(one) | links.pop(other)) - {one, other}
        for near in sorted(links[new]):
            links[near] -= {one, other}
            mean = float(sums[new] @ sums[near]) / (sizes[new] * sizes[near])
            links[near].add(new)  # also below the limit: what grows on either side may bring the mean back above it
            if mean >= limit:
                heapq.heappush(queue, (-mean, near, new))
    # A parent has a greater number than its children: from the top down, one step each leads to the root.
    for node in range(len(parents) - 1, -1, -1):
        parents[node] = parents[parents[node]]
    return np.array(parents[:rows], np.int64)


def class_sums(unit: Floats, labels: Numbers, num_classes: int, weights: Floats | None = None) -> Floats:
    """[C, D] sums of the rows of each class, weighted; rows labelled -1 do not count."""
    known = labels >= 0
    rows = unit[known] if weights is None else unit[known] * weights[known, None]
    sums = torch.zeros(num_classes, unit.shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(labels[known]), torch.from_numpy(rows.astype(np.float64)))
    return sums.numpy().astype(np.float32)


def own_and_other(
    unit: Floats, labels: Numbers, num_classes: int, weights: Floats | None = None, block: int = 0
) -> tuple[Floats, Floats, Numbers]:
    """Cosine of each row with the mean of its own class without it, and of the most similar other class.

    Returns:
        own [N], NaN where nothing else counts in the class or the label is -1; other [N], NaN where there is no other
        class; and that class [N], -1 likewise.
    """
    weights = np.ones(len(unit), np.float32) if weights is None else weights
    sums = class_sums(unit, labels, num_classes, weights)
    own = np.full(len(unit), np.nan, np.float32)
    known = labels >= 0
    # Without the row itself, or it would vouch for its own label: in a class of two by half.
    rest = sums[labels[known]] - weights[known, None] * unit[known]
    mass = np.bincount(labels[known], weights[known], num_classes)[labels[known]] - weights[known]
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (rest * unit[known]).sum(1) / np.linalg.norm(rest, axis=1)
    own[known] = np.where(mass > 1e-3, cosines, np.nan)  # below, the rest is what rounding left
    other, which = np.full(len(unit), np.nan, np.float32), np.full(len(unit), -1)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    means = np.divide(sums, lengths, out=np.zeros_like(sums), where=lengths > 1e-3)
    empty = np.flatnonzero(lengths[:, 0] <= 1e-3)
    for part, found in similarity_blocks(unit, means, block):
        found[:, empty] = -np.inf
        mine = np.flatnonzero(known[part])
        found[mine, labels[part][mine]] = -np.inf  # the best of the others
        if num_classes:
            which[part] = found.argmax(1)
            other[part] = found.max(1)
    lonely = ~np.isfinite(other)
    other[lonely], which[lonely] = np.nan, -1
    return own, other, which


def assign(
    embeddings: Floats,
    labels: Numbers,
    num_classes: int,
    *,
    confidence: float = 0.0,
    rounds: int = 3,
    block: int = 0,
    same_person: float | None = None,
) -> tuple[Numbers, Floats]:
    """Gives rows without a label the identity of known ones, and says how sure that is.

    Class means of the labelled rows classify the others, which then count in every mean by how likely they belong to
    it, and again (expectation maximisation): what is named does not depend on how much is wanted. The confidence is a
    softmax over the cosines whose temperature makes the labelled rows, each left out in turn, most likely (Guo et al.
    2017), times the probability that the row shows a person who is known at all: a mixture fitted to the rows without a
    label of what labelled rows score with their own class and with the best of the others.

    One known person, or one picture of each, shows only one of the two. Then a row must lie as near to the labelled
    pictures of its class, on average, as `same_person` and the strangers of the set ask for; where neither is known,
    every confidence is 0, and standard error says why.

    Args:
        embeddings: [N, D].
        labels: [N] in [0, `num_classes`), -1 unknown.
        confidence: rows below it stay -1; 0 names all, for a caller who looks at the confidences.
        same_person: the model's threshold for pairs, of a false match rate of `FALSE_NAMES`, if it has one.

    Returns:
        Labels [N], those given as they were; and confidences [N]: 1 where given, else that of the best class, also
        where it was too low.

    Raises:
        ValueError: no labelled row, labels outside the classes, or `confidence` outside [0, 1].
    """
    if not 0 <= confidence <= 1 or rounds < 1:
        raise ValueError(f"confidence is {confidence} and rounds {rounds}; they must lie in [0, 1] and be at least 1")
    if len(labels) != len(embeddings) or not len(labels) or labels.max() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{len(labels)} labels up to {labels.max(initial=-1)} for {len(embeddings)} rows, {num_classes} classes; "
            "give one of -1 to num_classes - 1 for each row, one of them known; with none known use cluster"
        )
    unit, labels = unit_rows(embeddings), labels.astype(np.int64)
    open_rows = np.flatnonzero(labels < 0)
    result, sure = labels.copy(), np.where(labels >= 0, 1, 0).astype(np.float32)
    if len(open_rows) == 0:
        return result, sure
    own, other, _ = own_and_other(unit, labels, num_classes, block=block)
    known = np.isfinite(own) & np.isfinite(other)
    scale = _temperature(unit, labels, num_classes, own, block)
    gate = None if np.count_nonzero(known) >= 2 else _Gate.of(unit, labels, num_classes, same_person)
    # Expectation maximisation: classify by the means, then let every row count in every mean by how likely it belongs
    # there and shows a known person at all. The labelled rows' part of the sums stays as it is in every round.
    sums = class_sums(unit, labels, num_classes)
    means, strange = _directions(sums), unit[open_rows]
    best, score = np.zeros(len(strange), np.int64), np.zeros(len(strange), np.float32)
    chance, somebody = np.zeros(len(strange), np.float32), np.ones(len(strange), np.float32)
    for number in range(rounds):
        if number:
            all_sums = sums.copy()
            for part, found in similarity_blocks(strange, means, block):
                all_sums += (_chances(found, scale, means) * somebody[part, None]).T @ strange[part]
            means = _directions(all_sums)
        for part, found in similarity_blocks(strange, means, block):
            chances = _chances(found, scale, means)
            best[part], score[part], chance[part] = chances.argmax(1), found.max(1), chances.max(1)
        somebody = gate(strange, best) if gate else _somebody_known(score, own[known], other[known])
    # The softmax compares classes with each other and cannot say "none of them"; the mixture's probability can.
    chance *= somebody
    sure[open_rows] = chance
    result[open_rows] = np.where(chance >= confidence, best, -1)
    return result, sure


def _directions(sums: Floats) -> Floats:
    """[C, D] sums with length 1; 0 for a class without rows, or whose rows cancel out."""
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.asarray(np.divide(sums, lengths, out=np.zeros_like(sums), where=lengths > 1e-3), np.float32)


def _chances(cosines: Floats, scale: float, means: Floats) -> Floats:
    """Softmax over the classes, [M, C]; those without a mean get cosine -inf in place and chance 0."""
    cosines[:, ~means.any(1)] = -np.inf
    powers = np.exp(scale * (cosines - cosines.max(1, keepdims=True)))  # of at most 0: no overflow
    return np.asarray(powers / powers.sum(1, keepdims=True), np.float32)


def _temperature(unit: Floats, labels: Numbers, num_classes: int, own: Floats, block: int) -> float:
    """The softmax scale that makes labelled rows, each compared with its class without it, most likely."""
    scales = np.geomspace(2, 128, 25)  # a grid: one pass over the similarities serves all of them
    rows = np.flatnonzero(np.isfinite(own))
    if len(rows) == 0:  # one row a class says nothing of how far pictures of one person lie apart
        return 1 / max(strangers(unit)[1], 1e-2)
    rows = rows[:: max(1, len(rows) * num_classes // MOST_LOSSES)]
    means = _directions(class_sums(unit, labels, num_classes))
    absent = ~means.any(1)
    losses = np.zeros(len(scales))
    for part, found in similarity_blocks(unit[rows], means, block):
        mine = own[rows[part]].astype(np.float64)
        found[:, absent] = -np.inf
        found[np.arange(len(found)), labels[rows[part]]] = mine  # leave-one-out, as a row without a label is seen
        for place, scale in enumerate(scales.tolist()):
            losses[place] += np.log(np.exp(scale * (found - mine[:, None])).sum(1)).sum()
    return float(scales[losses.argmin()])


@dataclass(frozen=True)
class _Gate:
    """Who is somebody known, by a threshold alone."""

    means: Floats  # [C, D] of the labelled rows, not of length 1: products with them are mean cosines
    limit: float | None
    chance: float  # that a row above the limit shows a known person, if half of all rows do

    @classmethod
    def of(cls, unit: Floats, labels: Numbers, num_classes: int, same_person: float | None) -> _Gate:
        counts = np.bincount(labels[labels >= 0], minlength=num_classes)
        means = class_sums(unit, labels, num_classes) / np.maximum(counts, 1).astype(np.float32)[:, None]
        # A stranger may come near each class. The model's threshold is for one pair, a limit learnt here for as many.
        classes, limit, false = int(np.count_nonzero(counts)), same_person, FALSE_NAMES
        if shows_several(unit):
            limit = max(stranger_limit(unit, FALSE_NAMES / classes), -1 if same_person is None else same_person)
        elif same_person is not None:
            false = min(1.0, FALSE_NAMES * classes)
        else:
            complain(
                f"no name is sure, each has confidence 0: {counts.sum()} pictures of known people ({classes}) do not "
                "show how near strangers come, the model has no threshold for pairs, and the set has too few pictures "
                "of different people to learn one; name two people or more, with several pictures each"
            )
        return cls(means, limit, 1 / (1 + false))

    def __call__(self, rows: Floats, best: Numbers) -> Floats:
        """[M] probabilities that rows [M, D] show a known person, that of class `best`."""
        if self.limit is None:
            return np.zeros(len(rows), np.float32)
        near = np.einsum("nd,nd->n", rows, self.means[best])
        return np.where(near >= self.limit, self.chance, 0).astype(np.float32)


def _somebody_known(scores: Floats, own: Floats, other: Floats) -> Floats:
    """Probability for each of `scores` [M], best of all classes, that its row shows a known person."""
    # A known person is taken to score like `own`, a stranger's best class like `other`.
    ratio = likelihood_ratio(own, other)(scores)  # known against stranger
    share = 0.5
    for _ in range(50):  # EM for the one unknown, the share of known people
        known = share * ratio / (share * ratio + 1 - share)
        share = float(np.clip(known.mean(), 1e-3, 1 - 1e-3))
    return np.asarray(known, np.float32)


@dataclass(frozen=True)
class Ratio:
    """A density ratio that never falls, by bins of the score."""

    edges: NDArray[np.float64]
    values: NDArray[np.float64]

    def __call__(self, scores: Floats) -> NDArray[np.float64]:
        """[M] ratios."""
        return self.values[np.clip(np.searchsorted(self.edges, scores, "right") - 1, 0, len(self.values) - 1)]


BINS = np.linspace(-1, 1, 401)


def likelihood_ratio(
    high: Floats | NDArray[np.float64],
    low: Floats | NDArray[np.float64],
    high_weights: NDArray[np.float64] | None = None,
    low_weights: NDArray[np.float64] | None = None,
) -> Ratio:
    """p(score | high) / p(score | low) from samples of both, as a function that never falls.

    Pooled adjacent violators on the scores' bins, the usual calibration of biometric scores (Brummer and du Preez
    2006); no ratio is beyond what so many samples can show: 1 in n.
    """
    n_high = float(len(high) if high_weights is None else high_weights.sum())
    n_low = float(len(low) if low_weights is None else low_weights.sum())
    # A bin's ratio must not be below that of the bin before it: neighbours that break the order become one block. The
    # comparison is cross-multiplied, so that empty bins join the block before them instead of dividing 0 by 0.
    ups = np.histogram(high, BINS, weights=high_weights)[0].astype(np.float64) / max(n_high, 1e-9)
    downs = np.histogram(low, BINS, weights=low_weights)[0].astype(np.float64) / max(n_low, 1e-9)
    blocks: list[tuple[float, float, int]] = []
    for up, down in zip(ups.tolist(), downs.tolist(), strict=True):
        width = 1
        while blocks and blocks[-1][0] * (up + down) >= up * (blocks[-1][0] + blocks[-1][1]):
            before = blocks.pop()
            up, down, width = up + before[0], down + before[1], width + before[2]
        blocks.append((up, down, width))
    values = np.concatenate([np.full(width, up / max(down, 1e-12)) for up, down, width in blocks])
    return Ratio(BINS, np.clip(values, 1 / (n_high + 1), n_low + 1))


@dataclass(frozen=True)
class Agreement:
    """How far a clustering agrees with true identities; noise counts as clusters of one."""

    pair_precision: float
    """Of pairs in one cluster, those of one identity."""
    pair_recall: float
    """Of pairs of one identity, those in one cluster."""
    pair_f: float
    bcubed_precision: float
    """Mean over rows of the part of its cluster that shares its identity (Amigo et al. 2009)."""
    bcubed_recall: float
    """Mean over rows of the part of its identity that shares its cluster."""
    bcubed_f: float


def agreement(true: Numbers, found: Numbers) -> Agreement:
    """Compares clusters `found` [N] with identities `true` [N]; rows with a negative true label are left out."""
    kept = true >= 0
    # Everything below is counted from three tables of sizes: of identities, of clusters, and of what they share.
    true, found = np.unique(true[kept], return_inverse=True)[1], found[kept].astype(np.int64)
    if len(true) == 0:
        raise ValueError("no row has a true identity; agreement needs labelled pictures")
    alone = found < 0
    found[alone] = found.max() + 1 + np.arange(np.count_nonzero(alone))
    found = np.unique(found, return_inverse=True)[1]
    _, inverse, both = np.unique(true * (found.max() + 1) + found, return_inverse=True, return_counts=True)
    of_true, of_found = np.bincount(true), np.bincount(found)

    def pairs(counts: Numbers) -> float:
        return float((counts.astype(np.float64) * (counts - 1) / 2).sum())

    def harmonic(a: float, b: float) -> float:
        return 2 * a * b / (a + b) if a + b else 0.0

    together = pairs(both)
    precision = together / pairs(of_found) if pairs(of_found) else 1.0
    recall = together / pairs(of_true) if pairs(of_true) else 1.0
    b_precision = float((both[inverse] / of_found[found]).mean())
    b_recall = float((both[inverse] / of_true[true]).mean())
    return Agreement(
        precision, recall, harmonic(precision, recall), b_precision, b_recall, harmonic(b_precision, b_recall)
    )
