"""Open-set identification: known people should be found in a gallery, and strangers should not (ISO/IEC 19795-1).

FPIR is the part of strangers' probes that get a name, FNIR the part of known people's probes that do not get their own:
somebody else scores as high, or they themselves below the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from facefast.evaluation.intervals import error_interval, rate_again, threshold_interval, trials_worth
from facefast.evaluation.metrics import Floats, Interval
from facefast.evaluation.thresholds import LOOSEST, NamingThreshold, finite, lowest_threshold, refusal

FPIRS = (0.1, 0.05, 0.01, 0.001)
"""False positive identification rates that naming has thresholds for."""
BLOCK = 1024
"""Probes compared at a time."""
MOST_SCORES = 1 << 24
"""Scores held at a time."""
POINTS = 200
"""Of a curve that is written down."""

DOUBLE_QUANTILE = 0.1
"""Of known people's scores with their own entry, above which a stranger looks like a known person."""
DOUBLE_PICTURES = 3

Join = Literal["mean", "max"]
"""How a person's pictures are one entry: their mean direction, or the picture most like the probe."""


@dataclass(frozen=True, eq=False)
class OpenSetScores:
    """How probes of known people and of strangers score against a gallery."""

    genuine: Floats
    """[G] score of each known person's probe with their own entry."""
    ranks: NDArray[np.int64]
    """[G] entries of others that score at least as high; 0 is found first."""
    impostors: Floats
    """[S] best score of each stranger's probe."""
    known: NDArray[np.int64]
    """[G] identity of each known person's probe."""
    strangers: NDArray[np.int64]
    """[S] identity of each stranger's probe."""
    nearest: NDArray[np.int64]
    """[S] identity of the entry that it scores best with."""

    def __post_init__(self) -> None:
        finite(self.genuine, "scores of known people")
        finite(self.impostors, "scores of strangers")
        if not len(self.genuine) == len(self.ranks) == len(self.known) or not (
            len(self.impostors) == len(self.strangers) == len(self.nearest)
        ):
            raise ValueError(
                f"{len(self.genuine)} scores, {len(self.ranks)} ranks and {len(self.known)} identities of known "
                f"people, {len(self.impostors)} scores, {len(self.strangers)} identities and {len(self.nearest)} "
                "nearest entries of strangers; give as many of each"
            )

    def missed(self, threshold: float) -> NDArray[np.bool_]:
        """[G] whether a known person's probe does not get its own name."""
        return (self.ranks > 0) | (self.genuine < threshold)

    def missed_part(self, threshold: float) -> tuple[float | None, Interval | None]:
        """The part of `missed`, and its interval; None where no known person was asked for."""
        missed = self.missed(threshold)
        return (float(missed.mean()), error_interval(missed, self.known)) if len(missed) else (None, None)

    def part(self, known: NDArray[np.bool_], strangers: NDArray[np.bool_]) -> OpenSetScores:
        """Some probes of known people, by a mask [G], and of strangers, by a mask [S]."""
        return OpenSetScores(
            self.genuine[known],
            self.ranks[known],
            self.impostors[strangers],
            self.known[known],
            self.strangers[strangers],
            self.nearest[strangers],
        )

    def without(self, people: Iterable[int]) -> OpenSetScores:
        """All probes but those of some people."""
        left_out = list(people)
        return self.part(~np.isin(self.known, left_out), ~np.isin(self.strangers, left_out))

    def named(self, threshold: float) -> NDArray[np.bool_]:
        """[S] whether a stranger's probe gets a name."""
        named: NDArray[np.bool_] = self.impostors >= threshold
        return named


def scores_of(matrix: Tensor, labels: ArrayLike, people: ArrayLike | None = None) -> OpenSetScores:
    """Scores of probes with every entry of a gallery.

    Args:
        matrix: [N, C], higher is more alike.
        labels: [N] the entry of each probe's person; negative for strangers.
        people: [N] identities, for the strangers' sake; without them each stranger's probe is somebody else's.

    Raises:
        ValueError: a score is not finite, or lengths differ.
    """
    own = np.asarray(labels, dtype=np.int64)
    if matrix.ndim != 2 or len(matrix) != len(own) or (len(own) and own.max() >= matrix.shape[1]):
        raise ValueError(f"scores {tuple(matrix.shape)} for {len(own)} labels up to {own.max(initial=-1)}; give [N, C]")
    if bad := int((~matrix.isfinite()).sum()):
        raise ValueError(f"{bad} of {matrix.numel()} scores are not finite; leave out pictures that could not be read")
    identities = _strangers_apart(own) if people is None else np.asarray(people, dtype=np.int64)
    entries = np.arange(matrix.shape[1])
    return _collected([_compare(matrix.double(), torch.from_numpy(own))], own, identities, entries)


def leave_one_out(embeddings: Tensor, labels: ArrayLike, join: Join = "mean", block: int = BLOCK) -> OpenSetScores:
    """Every picture as a probe twice: of a stranger, with its person out of the gallery, and of a known person, with
    this picture alone out of it.

    So a set that cannot spare people for strangers has as many as it has people. The gallery of a stranger's probe
    lacks one person.

    Args:
        embeddings: [N, D] of any length.
        labels: [N] identities; negative ones do not count.
        join: of a person's pictures.
        block: probes compared at a time.

    Returns:
        A person with one picture is never a known person's probe.

    Raises:
        ValueError: fewer than two identities, or an embedding without a direction.
    """
    given = np.asarray(labels, dtype=np.int64)
    rows = np.flatnonzero(given >= 0)
    rows = rows[np.argsort(given[rows], kind="stable")]
    identities, first, own, counts = np.unique(given[rows], return_index=True, return_inverse=True, return_counts=True)
    if len(identities) < 2:
        raise ValueError(
            f"the number of identities is {len(identities)}; it takes 2 for one to be a stranger to the other"
        )
    probes = _unit(embeddings[torch.from_numpy(rows)])
    entry = torch.from_numpy(own)
    alone = torch.from_numpy(counts == 1)[entry]
    sums = torch.zeros(len(identities), probes.shape[1], dtype=torch.float64).index_add_(0, entry, probes.double())
    means = F.normalize(sums, dim=1).float()
    parts = []
    for begin in range(0, len(probes), block):
        x, at = probes[begin : begin + block], entry[begin : begin + block]
        if join == "mean":
            scores = x @ means.T
            own_score = (x.double() * F.normalize(sums[at] - x.double(), dim=1)).sum(1).float()
        else:
            alike = x @ probes.T
            alike[torch.arange(len(x)), torch.arange(begin, begin + len(x))] = -torch.inf  # not with itself
            scores = torch.from_numpy(np.maximum.reduceat(alike.numpy(), first, axis=1))
            own_score = scores.gather(1, at[:, None])[:, 0]
        scores[torch.arange(len(x)), at] = own_score
        parts.append(_compare(scores.double(), at))
    genuine, ranks, others, nearest = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    kept = ~alone.numpy()
    people = identities[own]
    return OpenSetScores(genuine[kept], ranks[kept], others, people[kept], people, identities[nearest])


def against_gallery(
    probes: Tensor,
    people: ArrayLike,
    gallery: Tensor,
    labels: ArrayLike,
    join: Join = "mean",
    block: int = BLOCK,
) -> OpenSetScores:
    """Probes against a gallery of other pictures; who has no picture in the gallery is a stranger.

    Args:
        probes: [N, D] of any length.
        people: [N] their identities.
        gallery: [M, D] of any length.
        labels: [M] their identities, by the same numbers.
        join: of a person's pictures in the gallery.
        block: probes compared at a time.

    Raises:
        ValueError: no picture on one side, or an embedding without a direction.
    """
    theirs, wanted = np.asarray(labels, dtype=np.int64), np.asarray(people, dtype=np.int64)
    if not len(theirs) or not len(wanted):
        raise ValueError(f"{len(wanted)} probes against {len(theirs)} pictures of a gallery; both need one")
    order = np.argsort(theirs, kind="stable")
    identities, first, entry = np.unique(theirs[order], return_index=True, return_inverse=True)
    enrolled = _unit(gallery[torch.from_numpy(order)])
    place = np.searchsorted(identities, wanted).clip(max=len(identities) - 1)
    own = np.where(identities[place] == wanted, place, -1)
    if join == "mean":
        sums = torch.zeros(len(identities), enrolled.shape[1], dtype=torch.float64)
        enrolled = F.normalize(sums.index_add_(0, torch.from_numpy(entry), enrolled.double()), dim=1).float()
    parts = []
    for begin in range(0, len(probes), block):
        scores = _unit(probes[begin : begin + block]) @ enrolled.T
        if join == "max":
            scores = torch.from_numpy(np.maximum.reduceat(scores.numpy(), first, axis=1))
        parts.append(_compare(scores.double(), torch.from_numpy(own[begin : begin + block])))
    return _collected(parts, own, wanted, identities)


def among_people(probes: Tensor, labels: ArrayLike, directions: Tensor) -> OpenSetScores:
    """Every picture as a probe twice, with its own person's entry and, of a stranger, with everybody else's.

    Args:
        probes: [N, D] of any length.
        labels: [N] the entry of each one's person.
        directions: [C, D] the entries, which the probes had no part in or which keep them: a head's weights.

    Raises:
        ValueError: fewer than two people, no probe, or an embedding without a direction.
    """
    people = np.asarray(labels, dtype=np.int64)
    if len(directions) < 2 or not len(people):
        raise ValueError(f"{len(people)} pictures of {len(directions)} people; two people are needed for a stranger")
    entries, block = _unit(directions), max(1, min(BLOCK, MOST_SCORES // len(directions)))
    parts = [
        _compare((_unit(x) @ entries.T).double(), own)
        for x, own in zip(probes.split(block), torch.from_numpy(people).split(block), strict=True)
    ]
    genuine, ranks, others, nearest = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return OpenSetScores(genuine, ranks, others, people, people, nearest)


def _compare(scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Own score, entries of others at least as high, best score of others and its entry, [B] each, of scores [B, C];
    for a negative label there is no own entry."""
    known = own >= 0
    row = torch.arange(len(scores))
    mine = scores[row, own.clamp(min=0)]
    before = (scores >= mine[:, None]).sum(1) - 1
    others = scores.clone()
    others[row[known], own[known]] = -torch.inf
    best = others.max(1)
    return mine, before, best.values, best.indices


def _collected(
    parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    own: NDArray[np.int64],
    people: NDArray[np.int64],
    entries: NDArray[np.int64],
) -> OpenSetScores:
    genuine, ranks, others, nearest = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    known = own >= 0
    return OpenSetScores(
        genuine[known], ranks[known], others[~known], people[known], people[~known], entries[nearest[~known]]
    )


def _strangers_apart(own: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(own >= 0, own, -1 - np.arange(len(own)))


def _unit(embeddings: Tensor) -> Tensor:
    lengths = embeddings.float().norm(dim=1)
    if bad := int((~(lengths > 0) | ~lengths.isfinite()).sum()):
        raise ValueError(f"{bad} of {len(embeddings)} embeddings have no direction; leave out what could not be read")
    return F.normalize(embeddings.float(), dim=1)


def naming_thresholds(scores: OpenSetScores, fpirs: Sequence[float] = FPIRS) -> tuple[NamingThreshold, ...]:
    """The lowest threshold for each rate, refused where the strangers' pictures are too few to show it, or the
    strangers themselves.

    Raises:
        ValueError: a rate outside (0, 1).
    """
    people = len(np.unique(scores.strangers))
    counts: dict[str, Any] = {"impostors": len(scores.impostors), "genuine": len(scores.genuine), "people": people}
    found = []
    for fpir in fpirs:
        if not 0 < fpir < 1:
            raise ValueError(f"FPIR {fpir:g} must lie between 0 and 1")
        if why := refusal(len(scores.impostors), fpir, "pictures of strangers"):
            found.append(NamingThreshold(fpir, None, **counts, why=why))
            continue
        trials = trials_worth(scores.impostors, fpir, scores.strangers)
        value = lowest_threshold(scores.impostors, fpir)
        again = rate_again(float(scores.named(value).mean()), trials)
        if again.high > LOOSEST * fpir:
            why = (
                f"{len(scores.impostors)} pictures of {people} strangers cannot show a rate of {fpir:g}: by them it "
                f"may be {again.high:.2g}; about {_people_needed(people, trials, fpir)} people are needed, however "
                "many pictures each has"
            )
            found.append(NamingThreshold(fpir, None, **counts, why=why))
            continue
        missed, missed_interval = scores.missed_part(value)
        found.append(
            NamingThreshold(
                fpir,
                value,
                **counts,
                interval=threshold_interval(scores.impostors, fpir, trials),
                rate_interval=again,
                missed=missed,
                missed_interval=missed_interval,
            )
        )
    return tuple(found)


def _people_needed(people: int, trials: float, fpir: float) -> int:
    """How many strangers of this kind would show a rate."""
    needed = people + 1
    while rate_again(fpir, trials * needed / people).high > LOOSEST * fpir:
        needed += max(1, needed // 10)
    return needed


def double_names(scores: OpenSetScores) -> list[tuple[int, int]]:
    """Strangers who are probably in the gallery under another name, each with the person whom they look like.

    More than half of their pictures, and at least `DOUBLE_PICTURES`, are nearest to that one person, and score as nine
    in ten pictures of known people do with their own entry. Wrong labels of that kind, more than anything else, set
    the threshold of low rates; twins look the same, and a person has to decide. Without known people's probes there is
    nothing to tell by.
    """
    if not len(scores.genuine) or not len(scores.impostors):
        return []
    alike = scores.impostors >= np.quantile(scores.genuine, DOUBLE_QUANTILE)
    names, own, counts = np.unique(scores.strangers, return_inverse=True, return_counts=True)
    matches = np.stack([own[alike], scores.nearest[alike]])
    found, times = np.unique(matches, axis=1, return_counts=True)
    enough = (times > counts[found[0]] / 2) & (times >= DOUBLE_PICTURES)
    return [(int(names[who]), int(other)) for who, other in found[:, enough].T]


def double_pairs(scores: OpenSetScores) -> list[tuple[int, int]]:
    """`double_names` of probes who are enrolled themselves: each pair once, the lower number first."""
    return sorted({(min(pair), max(pair)) for pair in double_names(scores)})


def without_double_names(scores: OpenSetScores) -> tuple[OpenSetScores, int]:
    """The scores without the probes of those whom `double_names` finds, and how many people those are."""
    doubles = {who for who, _ in double_names(scores)}
    return scores.without(doubles), len(doubles)


def cmc(ranks: NDArray[np.int64], most: int = 20) -> Floats:
    """The cumulative match characteristic: [most] part of known people's probes whose person is among the first 1, 2,
    ... entries, whatever their score.

    Raises:
        ValueError: no probe.
    """
    if not len(ranks):
        raise ValueError("no probe of a known person; a match characteristic needs one")
    return np.cumsum(np.bincount(np.minimum(ranks, most), minlength=most + 1))[:most] / len(ranks)


def error_curve(genuine: Floats, impostors: Floats, points: int = POINTS) -> list[tuple[float, float, float]]:
    """What a detection error trade-off (DET) graph shows: (threshold, accepted part of the impostors, rejected part of
    the genuine), thresholds falling.

    Args:
        genuine: [G] scores, minus infinity for a genuine trial that no threshold accepts.
        impostors: [S] scores.
        points: at most, closer together where few impostors are accepted; 0 gives every one.

    Raises:
        ValueError: one side has no score.
    """
    if not len(genuine) or not len(impostors):
        raise ValueError(f"{len(genuine)} genuine and {len(impostors)} impostor scores; a curve needs both")
    everything = np.concatenate([genuine, impostors])
    thresholds = np.unique(everything[np.isfinite(everything)])[::-1]
    rejected = np.searchsorted(np.sort(genuine), thresholds, "left") / len(genuine)
    accepted = (len(impostors) - np.searchsorted(np.sort(impostors), thresholds, "left")) / len(impostors)
    chosen = np.arange(len(thresholds))
    if points and len(chosen) > points:
        # Evenly in the logarithm of the accepted part, by which such graphs are drawn, and both ends.
        wanted = np.geomspace(1 / len(impostors), 1, points - 1)
        chosen = np.unique(np.append(np.searchsorted(accepted, wanted).clip(max=len(accepted) - 1), 0))
    return [(float(thresholds[k]), float(accepted[k]), float(rejected[k])) for k in chosen]


def naming_curve(scores: OpenSetScores, points: int = POINTS) -> list[tuple[float, float, float]]:
    """(threshold, FPIR, FNIR) of naming, as `error_curve` gives them."""
    return error_curve(np.where(scores.ranks > 0, -np.inf, scores.genuine), scores.impostors, points)
