"""What the test part tells of a model beyond single numbers, as a JSON value of bounded size: whom it confuses, how its
scores lie, whose pictures it fails. Names and counts, no photographs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import FaceIndex
from facefast.data.divide import PhaseData
from facefast.data.index import QUALITIES
from facefast.evaluation import exam, openset
from facefast.evaluation.calibration import BINS, expected_calibration_error
from facefast.evaluation.embed import Embed, single
from facefast.evaluation.groups import group_errors, part_of
from facefast.evaluation.intervals import error_interval
from facefast.evaluation.measure import Answers, answers
from facefast.evaluation.metrics import Floats
from facefast.evaluation.pairs import PairScores
from facefast.evaluation.thresholds import PairThreshold
from facefast.models import FaceModel

MOST_PEOPLE = 200
"""People listed, the worst first."""
MOST_WRONG = 60
"""Wrong pictures listed, the surest first."""
MOST_CONFUSIONS = 40
"""Confusions of one person with another listed, the most frequent first."""
MOST_HARD = 12
"""Pairs listed that are hardest to tell, of each kind."""
MOST_RANKS = 20
"""Of the cumulative match characteristic."""
MOST_COLUMNS = 12
"""Divisions into groups, those with the widest gap first."""
MOST_VALUES = 5
"""Values of an attribute that make groups."""
BATCH = 16
"""Training pictures named, to be shown as training sees them."""
SCORES = np.linspace(-1, 1, 81)
"""Edges of the histogram of cosines."""
MOST_BARS = 24
"""Of the histogram of pictures a person, each of as many pictures."""
SHARES = 101
"""Points of the curve of people's own accuracies."""
QUALITY_COLUMNS = ("face_size", "sharpness", "yaw")


class Asked(NamedTuple):
    """What every rank has to take part in: the rest is arithmetic."""

    answers: Answers | None
    """Of the test pictures with a name; None where the model names nobody, or there are none."""
    embeddings: Tensor | None
    """[N, D] of the people of the pairs."""
    seen: Tensor | None
    """[N] bool."""


def ask(model: FaceModel, data: PhaseData, embed: Embed, device: torch.device) -> Asked:
    """The model on the test part, on all ranks together.

    Args:
        model: as it is handed on.
        data: whose `evaluation` is asked.
        embed: gives the model's embeddings of an index.
        device: where the model is.
    """
    asked, found = data.evaluation, None
    if asked.test is not None and model.head is not None:
        embeddings, seen = embed(asked.test)
        labels = torch.tensor(asked.test.labels, dtype=torch.long).where(seen, -1)
        if bool((labels >= 0).any()):
            found = answers(model, single(embeddings, model.embedding_size), labels, device)
    if asked.verification is None or asked.pairs is None:
        return Asked(found, None, None)
    return Asked(found, *embed(asked.verification))


def document(asked: Asked, data: PhaseData, left_out: dict[str, int]) -> dict[str, Any]:
    """`evaluation.json` without what says of which model it is.

    Args:
        asked: of `ask`.
        data: the same.
        left_out: pictures that were not used, by their fault.
    """
    test, train = data.evaluation.test, data.train
    return {
        "photographs": _described(data, left_out),
        "closed_set": None if asked.answers is None or test is None else closed_set(asked.answers, test, train),
        "verification": None if asked.embeddings is None or asked.seen is None else _verification(asked, data),
    }


def _described(data: PhaseData, left_out: dict[str, int]) -> dict[str, Any]:
    parts = {
        "training": data.train,
        "validation": data.validation.test,
        "test": data.evaluation.test,
        "verification": data.evaluation.verification,
    }
    train = data.train
    counts = _per_person(train)
    counts = counts[counts > 0]
    most = int(counts.max(initial=1))
    width = -(-most // MOST_BARS)
    edges = np.arange(0, most + width, width)
    histogram = np.histogram(counts, bins=edges)[0] if len(counts) else np.zeros(len(edges) - 1)
    sides = np.minimum(train.widths, train.heights)
    asked = data.evaluation
    return {
        "parts": {name: None if part is None else _counted(part) for name, part in parts.items()},
        "same_pictures": asked.test is not None and asked.test is asked.verification,
        "held_out": asked.held_out if asked.verification is not None else None,
        "pairs": None if asked.pairs is None else len(asked.pairs),
        "left_out": left_out,
        # From `from`, left out, to `to`.
        "pictures_per_person": [
            {"from": float(low), "to": float(high), "people": int(count)}
            for low, high, count in zip(edges[:-1], edges[1:], histogram, strict=True)
        ],
        "shorter_side": None if not len(sides) else [int(x) for x in np.quantile(sides, (0, 0.5, 1))],
        "landmarks": None if train.landmarks is None else float(np.isfinite(train.landmarks[:, 0, 0]).mean()),
        "batch": [train.name(row) for row in _spread_rows(train)],
    }


def _spread_rows(index: FaceIndex) -> list[int]:
    rows: list[int] = np.unique(np.linspace(0, len(index) - 1, min(BATCH, len(index))).round().astype(int)).tolist()
    return rows


def _counted(index: FaceIndex) -> dict[str, int]:
    labelled = index.labels >= 0
    return {
        "pictures": len(index),
        "people": len(np.unique(index.labels[labelled])),
        "nameless": int((~labelled).sum()),
    }


def _per_person(index: FaceIndex) -> NDArray[np.int64]:
    """[C] labelled pictures of each class."""
    return np.bincount(index.labels[index.labels >= 0], minlength=index.num_classes)


def closed_set(found: Answers, test: FaceIndex, train: FaceIndex) -> dict[str, Any]:
    """What naming test pictures shows.

    Args:
        found: answers on `test`.
        test: the pictures, with the model's classes as labels.
        train: what the model learnt from, with the same labels.
    """
    right = found.ranks == 0
    names, num = test.class_names, len(test.class_names)
    asked, hits = np.bincount(found.labels, minlength=num), np.bincount(found.labels[right], minlength=num)
    learnt = _per_person(train)
    people = np.flatnonzero(asked)
    own = hits[people] / asked[people]
    # Worst first; of equals whoever has more pictures, which say more.
    order = np.lexsort((people, -asked[people], own))
    taken = _confusions(found)
    most: dict[int, int] = {}
    for (who, other), _ in taken.most_common():
        most.setdefault(who, other)
    example = dict(zip(*(column.tolist() for column in np.unique(train.labels, return_index=True)), strict=True))
    wrong = np.flatnonzero(~right)
    surest = wrong[np.argsort(-found.sure[wrong], kind="stable")]
    first_wrong = {(int(found.labels[k]), int(found.predicted[k])): int(found.rows[k]) for k in surest[::-1]}

    def shown(label: int) -> dict[str, Any]:
        """Whom a picture was taken for, and a picture of theirs that was learnt from."""
        known = label >= 0
        return {
            "taken_for": names[label] if known else None,
            "example": train.name(example[label]) if known and label in example else None,
        }

    return {
        "pictures": len(found.ranks),
        "people": len(people),
        "wrong_pictures": int((~right).sum()),
        "cmc": openset.cmc(found.ranks, min(MOST_RANKS, num)).tolist(),
        "ece": expected_calibration_error(found.sure, right),
        "reliability": list(_reliability(found.sure, right)),
        "accuracies": np.quantile(own, np.linspace(0, 1, SHARES)).tolist(),
        "worst_people": [
            {
                "name": names[who],
                "right": int(hits[who]),
                "pictures": int(asked[who]),
                "learnt_from": int(learnt[who]) if who < len(learnt) else 0,
                "taken_for": names[most[who]] if who in most else None,
            }
            for who in people[order][:MOST_PEOPLE].tolist()
        ],
        "confusions": [
            {
                "name": names[who],
                "pictures": count,
                "of": int(asked[who]),
                "picture": test.name(first_wrong[who, other]),
                **shown(other),
            }
            for (who, other), count in taken.most_common(MOST_CONFUSIONS)
        ],
        "wrong": [
            {
                "picture": test.name(int(found.rows[k])),
                "name": names[int(found.labels[k])],
                "probability": float(found.sure[k]),
                "rank": int(found.ranks[k]) + 1,
                **shown(int(found.predicted[k])),
            }
            for k in surest[:MOST_WRONG].tolist()
        ],
        "groups": _groups(found, test, learnt),
    }


def _confusions(found: Answers) -> Counter[tuple[int, int]]:
    wrong = (found.ranks != 0) & (found.predicted >= 0)
    return Counter(zip(found.labels[wrong].tolist(), found.predicted[wrong].tolist(), strict=True))


def _reliability(sure: Floats, right: NDArray[np.bool_]) -> Iterator[dict[str, Any]]:
    """Bins as `expected_calibration_error` has them; empty ones are left out."""
    place = np.clip(np.ceil(sure * BINS).astype(np.int64) - 1, 0, BINS - 1)
    for k in np.unique(place).tolist():
        inside = place == k
        low, high = error_interval(right[inside])
        yield {
            "from": k / BINS,
            "to": (k + 1) / BINS,
            "pictures": int(inside.sum()),
            "probability": float(sure[inside].mean()),
            "accuracy": float(right[inside].mean()),
            "interval": [low, high],
        }


def _groups(found: Answers, test: FaceIndex, learnt: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Top-1 accuracy of groups, with intervals by people; the columns with the widest gap first."""
    right, people = found.ranks == 0, found.labels
    columns: dict[str, NDArray[np.str_]] = {
        "training pictures of the person": _thirds(learnt[np.minimum(people, len(learnt) - 1)].astype(np.float64), "")
    }
    if test.quality is not None:
        for name in QUALITY_COLUMNS:
            values = np.abs(test.quality[found.rows, QUALITIES.index(name)].astype(np.float64))
            columns[name.replace("_", " ")] = _thirds(values, " degrees" if name == "yaw" else "")
    for name, words in _attribute_words(test).items():
        columns[name] = words[found.rows]
    ranked = []
    for column, words in columns.items():
        groups = []
        for group in dict.fromkeys(words[np.argsort(_order(words), kind="stable")].tolist()):
            inside = words == group
            if not group or inside.all():
                continue
            low, high = error_interval(~right[inside], people[inside])
            groups.append(
                {
                    "column": column,
                    "group": group,
                    "pictures": int(inside.sum()),
                    "people": len(np.unique(people[inside])),
                    "accuracy": float(right[inside].mean()),
                    "interval": [1 - high, 1 - low],
                }
            )
        if len(groups) > 1:
            rates = [group["accuracy"] for group in groups]
            ranked.append((min(rates) - max(rates), groups))
    ranked.sort(key=lambda item: item[0])
    return [group for _, groups in ranked[:MOST_COLUMNS] for group in groups]


def _order(words: NDArray[np.str_]) -> Floats:
    """Groups in the order of the number that they begin with."""
    found = {word: _leading(word) for word in np.unique(words).tolist()}
    return np.array([found[word] for word in words.tolist()])


def _leading(word: str) -> float:
    try:
        return float(word.split(" ")[0])
    except ValueError:
        return 0.0


def _thirds(values: Floats, unit: str) -> NDArray[np.str_]:
    """Which third of the values each lies in, as words; "" where it is not known."""
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(values), "", np.str_)
    edges = np.unique(np.quantile(values[known], (1 / 3, 2 / 3), method="lower"))
    place = np.searchsorted(edges, values, "left")
    names = {}
    for k in np.unique(place[known]).tolist():
        inside = values[known & (place == k)]
        low, high = inside.min(), inside.max()
        names[k] = (f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}") + unit
    return np.array([names[k] if there else "" for k, there in zip(place.tolist(), known.tolist(), strict=True)])


def _attribute_words(index: FaceIndex) -> dict[str, NDArray[np.str_]]:
    """[N] the value of each row, "" where unknown, of attributes with few values."""
    found = {}
    for column, name in enumerate(index.attribute_names):
        if index.attributes is None:
            break
        values = index.attributes[:, column]
        present = np.unique(values[np.isfinite(values)])
        if 1 < len(present) <= MOST_VALUES:
            words = {0.0: "no", 1.0: "yes"} if set(present.tolist()) == {0.0, 1.0} else {}
            named = ["" if value != value else words.get(value, f"{value:g}") for value in values.tolist()]
            found[name] = np.array(named, np.str_)
    return found


def _verification(asked: Asked, data: PhaseData) -> dict[str, Any] | None:
    index, pairs = data.evaluation.verification, data.evaluation.pairs
    assert index is not None and pairs is not None and asked.embeddings is not None and asked.seen is not None
    embeddings, seen = asked.embeddings, asked.seen
    scored, _ = exam.scored_pairs(embeddings, seen, index.labels, pairs)
    if scored.same.all() or not scored.same.any():
        return None
    questions = exam.Questions(draws=1, hardest=MOST_HARD)
    found = exam.verify_in_full(lambda _: (embeddings, seen), index, pairs, questions, drawn=False)
    counts = [np.histogram(np.clip(scored.scores[kind], -1, 1), SCORES)[0] for kind in (scored.same, ~scored.same)]
    used = np.flatnonzero(counts[0] + counts[1])

    def inside(rows: NDArray[np.bool_]) -> PairScores | None:
        part = exam.chosen_pairs(pairs, part_of(pairs, rows))
        return exam.scored_pairs(embeddings, seen, index.labels, part)[0] if len(part) else None

    groups: Sequence[Any] = ()
    words = dict(list(_attribute_words(index).items())[:MOST_COLUMNS])
    thresholds = tuple(PairThreshold.from_json(threshold) for threshold in found["pair_thresholds"])
    if words and any(threshold.value is not None for threshold in thresholds):
        strictest = exam.strictest(thresholds)
        groups = [
            error.to_json() | {"threshold_fmr": strictest.rate}
            for error in group_errors(words, index, inside, strictest)
        ]
    return {
        "pairs": len(scored.scores),
        "same_pairs": int(scored.same.sum()),
        "eer": found["eer"],
        "intervals": found["intervals"],
        "thresholds": found["pair_thresholds"],
        "curve": found["det"],
        "histogram": [
            {"from": float(SCORES[k]), "to": float(SCORES[k + 1]), "same": int(same), "different": int(different)}
            for k, same, different in ((k, counts[0][k], counts[1][k]) for k in range(used[0], used[-1] + 1))
        ],
        "hardest": found["hardest"],
        "groups": groups,
    }


def top_scores(asked: Asked, data: PhaseData) -> dict[str, tuple[NDArray[np.bool_], Floats]]:
    """For precision and recall at every threshold: whether each trial is right, and its score from 0 to 1."""
    found = {}
    if asked.answers is not None:
        found["names"] = (asked.answers.ranks == 0, asked.answers.sure)
    index, pairs = data.evaluation.verification, data.evaluation.pairs
    if asked.embeddings is not None and asked.seen is not None and index is not None and pairs is not None:
        scored, _ = exam.scored_pairs(asked.embeddings, asked.seen, index.labels, pairs)
        if len(scored.scores):
            found["pairs"] = (scored.same, np.clip((scored.scores + 1) / 2, 0, 1))
    return found
