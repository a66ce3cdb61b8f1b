"""All that the evaluate command answers beyond the numbers of `measure`: thresholds, intervals, groups, the hardest
pairs, templates and open-set identification, as JSON values and as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from facefast.data import FaceIndex, PairSet, TemplateSet
from facefast.data.index import number_classes
from facefast.evaluation import metrics, openset
from facefast.evaluation.embed import Embed
from facefast.evaluation.groups import group_errors, part_of, read_groups
from facefast.evaluation.measure import verification
from facefast.evaluation.openset import Join
from facefast.evaluation.pairs import (
    FMRS,
    PairScores,
    equal_error_rate,
    identity_intervals,
    over_seeds,
    pair_thresholds,
)
from facefast.evaluation.templates import join_templates
from facefast.evaluation.thresholds import PairThreshold


@dataclass(frozen=True)
class Questions:
    """What is asked of verification pairs."""

    draws: int = 5
    """Draws of random pairs whose spread is told."""
    groups: str = ""
    hardest: int = 0
    seed: int = 0
    """Of the first draw."""


def verify_in_full(
    embed: Embed, index: FaceIndex, pairs: PairSet, questions: Questions, *, drawn: bool, prefix: str = ""
) -> dict[str, Any]:
    """What pairs of pictures tell beyond `measure.verification`.

    Args:
        embed: gives the embeddings of `index`.
        index: the pictures; those without a label are each of a person of their own.
        pairs: of its rows.
        questions: what is asked.
        drawn: whether the pairs were drawn at random, so that others can be.
        prefix: of the names of what is found.

    Returns:
        eer, intervals, pair_thresholds, det, and draws, groups, hardest where they were asked for.

    Raises:
        ValueError: groups that are not known, or that no threshold can be compared at.
    """
    embeddings, seen = embed(index)
    scored, whole = scored_pairs(embeddings, seen, index.labels, pairs)
    found: dict[str, Any] = {}
    if scored.same.any() and not scored.same.all():
        found = _curve(scored)
        if drawn and questions.draws > 1:
            folds = int(pairs.folds.max()) + 1
            seeds = range(questions.seed, questions.seed + questions.draws)
            found["draws"] = {
                "seeds": list(seeds),
                **over_seeds(embeddings, seen, index, len(pairs), folds, seeds),
            }
    if questions.hardest:
        rows = pairs.left[whole], pairs.right[whole]
        found["hardest"] = hardest(scored, *rows, [index.name(row) for row in range(len(index))], questions.hardest)
    if questions.groups:
        threshold = strictest(found.get("_thresholds", ()))

        def inside(rows: NDArray[np.bool_]) -> PairScores | None:
            chosen = pairs
            if drawn:  # few of all pairs lie in a group: as many are drawn in each
                part = np.flatnonzero(rows & seen.numpy())
                try:
                    own = PairSet.random(index.select(part), len(pairs), 1, questions.seed)
                except ValueError:
                    return None
                chosen = PairSet(part[own.left], part[own.right], own.same, own.folds)
            kept, _ = scored_pairs(embeddings, seen, index.labels, chosen_pairs(chosen, part_of(chosen, rows)))
            return kept if len(kept.scores) else None

        values = read_groups(questions.groups, index)
        errors = group_errors(values, index, inside, threshold)
        found["groups"] = {
            "threshold": threshold.to_json(),
            "unknown": {column: int((words == "").sum()) for column, words in values.items()},
            "errors": [error.to_json() for error in errors],
        }
    found.pop("_thresholds", None)
    return {prefix + name: value for name, value in found.items()}


def _curve(scored: PairScores) -> dict[str, Any]:
    thresholds = pair_thresholds(scored)
    curve = openset.error_curve(scored.scores[scored.same], scored.scores[~scored.same])
    return {
        "eer": equal_error_rate(scored.scores, scored.same),
        "intervals": {name: list(interval) for name, interval in identity_intervals(scored, FMRS).items()},
        "pair_thresholds": [threshold.to_json() for threshold in thresholds],
        "det": [{"threshold": t, "fmr": fmr, "fnmr": fnmr} for t, fmr, fnmr in curve],
        "_thresholds": thresholds,
    }


def strictest(thresholds: tuple[PairThreshold, ...]) -> PairThreshold:
    """That of the lowest rate which is firm, or else is there at all."""
    there = [threshold for threshold in thresholds if threshold.value is not None]
    firm = [threshold for threshold in there if threshold.firm]
    if not there:
        why = thresholds[0].why if thresholds else "there are no pairs of both kinds"
        raise ValueError(f"groups need one threshold for all of them: {why}")
    return firm[-1] if firm else there[0]


def scored_pairs(
    embeddings: Tensor, seen: Tensor, labels: NDArray[Any], pairs: PairSet
) -> tuple[PairScores, NDArray[np.bool_]]:
    """Scores of the pairs whose pictures could both be read, and [P] which those are."""
    whole = (seen[torch.from_numpy(pairs.left)] & seen[torch.from_numpy(pairs.right)]).numpy()
    kept = chosen_pairs(pairs, whole)
    people = np.where(labels >= 0, labels.astype(np.int64), -1 - np.arange(len(labels)))
    scores = metrics.pair_scores(F.normalize(embeddings, dim=1).numpy(), kept.left, kept.right)
    return PairScores.of(scores, kept.same, people[kept.left], people[kept.right]), whole


def chosen_pairs(pairs: PairSet, which: NDArray[np.bool_]) -> PairSet:
    return PairSet(pairs.left[which], pairs.right[which], pairs.same[which], pairs.folds[which])


def hardest(
    scored: PairScores, left: NDArray[np.int64], right: NDArray[np.int64], names: list[str], count: int
) -> dict[str, list[dict[str, Any]]]:
    """The pairs of one person that are least alike and those of two that are most (twins, siblings, wrong labels).

    Args:
        scored: P pairs.
        left: [P] places in `names`.
        right: [P] likewise.
        names: of pictures or templates.
        count: of each kind at most.
    """
    found = {}
    for kind, sign in (("one_person", 1), ("two_people", -1)):
        places = np.flatnonzero(scored.same == (sign > 0))
        places = places[np.argsort(sign * scored.scores[places], kind="stable")][:count]
        found[kind] = [
            {"a": names[left[k]], "b": names[right[k]], "cosine": round(float(scored.scores[k]), 6)} for k in places
        ]
    return found


def verify_templates(embed: Embed, templates: TemplateSet, weigh_by_length: bool, num_hardest: int) -> dict[str, Any]:
    """Verification of templates, each joined into one embedding.

    Args:
        embed: gives the embeddings of the templates' pictures.
        templates: they and their pairs.
        weigh_by_length: pictures weigh by the length of their embedding, which many models make shorter for bad ones.
        num_hardest: pairs of each kind to list.
    """
    embeddings, seen = embed(templates.index)
    weights = embeddings.norm(dim=1) if weigh_by_length else None
    joined, known = join_templates(embeddings, seen.numpy(), templates, weights)
    found: dict[str, Any] = verification(joined, torch.from_numpy(known), templates.pairs)
    people = np.where(templates.subjects >= 0, templates.subjects, -1)
    scored, whole = scored_pairs(joined, torch.from_numpy(known), people, templates.pairs)
    if scored.same.any() and not scored.same.all():
        found |= _curve(scored)
        found.pop("_thresholds")
    if num_hardest:
        rows = templates.pairs.left[whole], templates.pairs.right[whole]
        found["hardest"] = hardest(scored, *rows, list(templates.names), num_hardest)
    return found | {"templates": len(templates.names), "unreadable_templates": int((~known).sum())}


def identify(embed: Embed, probes: FaceIndex, gallery: FaceIndex, join: Join) -> dict[str, Any]:
    """Open-set identification of probes in a gallery; people are the same where their names are.

    Probes without a name are left out, as are those whose very file is in the gallery; both are counted.

    Raises:
        ValueError: nobody is left on one side.
    """
    theirs, ours = gallery.identities(), probes.identities()
    numbers, names = number_classes([*theirs, *ours])
    gallery_people, people = np.split(numbers.astype(np.int64), [len(theirs)])
    enrolled = {bytes(line) for line in gallery.hashes if line.any()}
    copies = np.array([bytes(line) in enrolled for line in probes.hashes], bool)
    found, read = embed(gallery)
    asked, seen = embed(probes)
    in_gallery = read.numpy() & (gallery_people >= 0)
    counted = seen.numpy() & (people >= 0) & ~copies
    if not in_gallery.any() or not counted.any():
        raise ValueError(
            f"{int(counted.sum())} of {len(probes)} probes ({int(copies.sum())} are files of the gallery) and "
            f"{int(in_gallery.sum())} of {len(gallery)} pictures of the gallery have a name and can be read; both "
            "sides need one"
        )
    rows, kept = (torch.from_numpy(np.flatnonzero(mask)) for mask in (counted, in_gallery))
    scores = openset.against_gallery(asked[rows], people[counted], found[kept], gallery_people[in_gallery], join)
    results: dict[str, Any] = {
        "gallery_people": len(np.unique(gallery_people[in_gallery])),
        "gallery_pictures": int(in_gallery.sum()),
        "known_probes": len(scores.genuine),
        "strangers_probes": len(scores.impostors),
        "strangers": len(np.unique(scores.strangers)),
        "left_out_copies": int(copies.sum()),
        "left_out_nameless": int((people < 0).sum()),
        "join": join,
        "double_names": [[names[who], names[other]] for who, other in openset.double_names(scores)],
        "naming_thresholds": [threshold.to_json() for threshold in openset.naming_thresholds(scores)],
    }
    if len(scores.genuine):
        results |= {"rank1": float((scores.ranks == 0).mean()), "cmc": openset.cmc(scores.ranks).tolist()}
    if len(scores.genuine) and len(scores.impostors):
        curve = openset.naming_curve(scores)
        results["det"] = [{"threshold": t, "fpir": fpir, "fnir": fnir} for t, fpir, fnir in curve]
    return results


def lines(results: dict[str, Any]) -> Iterator[str]:
    """Results for people: single numbers, then what has a shape of its own; curves are for --json."""
    numbers = {name: value for name, value in results.items() if isinstance(value, int | float | str)}
    width = max(map(len, numbers), default=0)
    for name, value in numbers.items():
        yield f"{name:{width}}  {value if isinstance(value, str) else format(value, '.6g')}"
    for name, value in results.items():
        short = name.removeprefix("known_")
        if short in ("pair_thresholds", "naming_thresholds"):
            yield from map(_threshold_line, value)
        elif short == "intervals":
            yield from (f"{what}: 95 % interval {low:.4g} to {high:.4g}" for what, (low, high) in value.items())
        elif short == "draws":
            yield from _draw_lines(value)
        elif short == "cmc":
            yield "found among the first 1, 5, 20: " + ", ".join(f"{value[k - 1]:.2%}" for k in (1, 5, 20))
        elif short == "double_names":
            yield from (f"{who}, a stranger, looks like {other} of the gallery: one person?" for who, other in value)
        elif short == "groups":
            yield from _group_lines(value)
        elif short == "hardest":
            for kind, pairs in value.items():
                yield from (f"{kind.replace('_', ' ')}: {p['cosine']:.3f}  {p['a']}  {p['b']}" for p in pairs)


def _threshold_line(found: dict[str, Any]) -> str:
    rate, missed = ("fmr", "fnmr") if found["kind"] == "pair" else ("fpir", "fnir")
    begin = f"{rate.upper()} {found[rate]:g}: "
    if found["threshold"] is None:
        return f"{begin}{found['why']}"
    told = f"threshold {found['threshold']:.4f}{_between(found['threshold_interval'], '.4f')}, {rate.upper()} here"
    told += f" {_between(found[f'{rate}_interval'], '.3g').strip()}"
    if found[missed] is not None:
        told += f", {missed.upper()} {found[missed]:.2%}{_between(found[f'{missed}_interval'], '.2%')}"
    return begin + told + ("" if found["firm"] else "; few errors, so roughly")


def _between(interval: list[float] | None, form: str) -> str:
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"


def _draw_lines(draws: dict[str, Any]) -> Iterator[str]:
    for name, value in draws.items():
        if name != "seeds":
            yield (
                f"{name} over {len(draws['seeds'])} draws of pairs: {value['mean']:.4g} +- {value['std']:.2g} "
                f"({value['least']:.4g} to {value['most']:.4g})"
            )


def _group_lines(groups: dict[str, Any]) -> Iterator[str]:
    threshold = groups["threshold"]
    yield f"groups at threshold {threshold['threshold']:.4f} (FMR {threshold['fmr']:g} over all):"
    for error in groups["errors"]:
        rates = [
            f"{rate.upper()} {error[rate]:.3%}{_between(error[f'{rate}_interval'], '.3%')}"
            if error[rate] is not None
            else f"{rate.upper()} not known"
            for rate in ("fmr", "fnmr")
        ]
        yield f"  {error['column']} {error['group']} ({error['pictures']} pictures): {', '.join(rates)}"
    for column, count in groups["unknown"].items():
        if count:
            yield f"  {column} is not known of {count} pictures"
