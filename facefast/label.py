"""Names for photographs that have none: `python -m facefast.label MODEL --data.root DIR --out labels.csv`.

Where some pictures have an identity, the others get one of those, if the model is sure enough. Where none has, or with
`--ignore-labels`, pictures that look like one person become "cluster-0001" and so on. `labels.csv` has the columns
path, identity (empty: no name is sure enough) and confidence; edit it at will. `facefast train --data.labels
labels.csv` trains on it, and that model labels better: do both again until the labels stay the same.

`--review` opens a page on this machine on which a person names, merges or drops the groups of pictures that got one
name; `facefast label --review --out labels.csv` goes on with one. What they decide is in the folder `labels.review`:
`labels.csv`, for `--data.labels`, and `decisions.jsonl`, to go on from.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from facefast.data import FaceIndex
from facefast.data.corrections import Label, write_labels
from facefast.data.walk import holds_picture, is_folder, is_picture, require_there, top_entries
from facefast.evaluation.embed import embed_photographs
from facefast.evaluation.thresholds import Thresholds
from facefast.faces.align import Locator, locator
from facefast.labels.clustering import Floats, Numbers, agreement, assign, cluster, default_similarity, unit_rows
from facefast.labels.review.items import label_review
from facefast.labels.review.server import goes_on, review_here
from facefast.models import FaceModel
from facefast.recipe import Photographs, Recipe, to_json
from facefast.recipe.options import parse
from facefast.recipe.ranges import MOST, require
from facefast.runtime import exits, files, process
from facefast.runtime.terminal import complain, say

PAIR_FMR = 1e-2
"""False match rate of the threshold for pairs that clusters are joined at. Its cosine is asked of means, which
strangers reach far more rarely than single pairs do."""


@dataclass(frozen=True)
class LabelArguments:
    """`python -m facefast.label`."""

    model: tyro.conf.Positional[Path | None] = None
    """A run folder, a checkpoint folder, an exported package or a source model's weights file; only --review goes on
    without one."""
    data: Photographs = field(default_factory=Photographs)
    out: Path = Path("labels.csv")
    """Where the names go."""
    ignore_labels: bool = False
    """Cluster all pictures as if none had an identity; where some have, print how far the clusters agree with them."""
    new_identities: bool = False
    """Cluster the pictures that show none of the known people too."""
    confidence: float = 0.9
    """Least confidence of a known identity's name for a picture without one."""
    similarity: float | None = None
    """Least mean cosine of two clusters that are joined; by default the model's threshold for pairs at FMR 1 %, or 0.3
    where it has none, and more where a set of several people shows that strangers come nearer."""
    min_size: int = 2
    """Pictures of a new identity, at least."""
    batch_size: int = 128
    """Pictures in one batch of the model, per process."""
    json: bool = False
    """Print one JSON object and nothing else."""
    review: bool = False
    """Then serve a page on 127.0.0.1 to name the groups; without MODEL go on with those beside --out."""
    port: int = 0
    """Of the page of --review; 0 takes a free one."""

    def __post_init__(self) -> None:
        require(self, port=(0, 65535))
        require(self, confidence=(0, 1), min_size=(1, MOST), batch_size=(1, MOST))
        if self.similarity is not None:
            require(self, similarity=(-1, 1))


@dataclass(frozen=True)
class Names:
    """An identity for each of N pictures."""

    identities: list[str]
    """[N], empty where no name is sure enough."""
    confidences: Floats
    """[N]"""
    clusters: Numbers | None
    """[N] cluster of each picture, -1 none; None where nothing was clustered."""
    similarity: float | None = None
    """Least mean cosine that clusters were joined at."""


def pair_threshold(model: FaceModel) -> float | None:
    """From which cosine on two pictures show one person at FMR 1 %; None where the model has no such threshold."""
    known = Thresholds.from_json(model.thresholds or {})
    try:
        return known.pair(PAIR_FMR).value
    except ValueError:
        return None


def propose_names(
    given: LabelArguments,
    embeddings: Floats,
    labels: Numbers,
    class_names: Sequence[str],
    same_person: float | None = None,
) -> Names:
    """Names by what is known, or by clusters.

    Args:
        embeddings: [N, D] of length 1.
        labels: [N] places in `class_names`, -1 unknown.
        same_person: the model's threshold for pairs, if it has one.

    Raises:
        ValueError: an option that would have no effect.
    """
    seeded = bool((labels >= 0).any()) and not given.ignore_labels
    default = LabelArguments(given.model)
    # An option that this run would not read is an error: silence would let its user believe in it.
    if not seeded:
        idle = [name for name in ("confidence", "new_identities") if getattr(given, name) != getattr(default, name)]
        reason = "no identity is known" if not given.ignore_labels else "--ignore-labels forgets those that are known"
    else:
        idle = [name for name in ("similarity", "min_size") if getattr(given, name) != getattr(default, name)]
        idle = [] if given.new_identities else idle
        reason = "identities are known: add --new-identities or --ignore-labels to cluster"
    if idle:
        raise ValueError(f"--{idle[0].replace('_', '-')} has no effect where {reason}")

    if seeded:
        found, confidences = assign(
            embeddings, labels, len(class_names), confidence=given.confidence, same_person=same_person
        )
        identities = [class_names[label] if label >= 0 else "" for label in found.tolist()]
    else:
        confidences = np.zeros(len(embeddings), np.float32)
        identities = [""] * len(embeddings)
    clusters: Numbers | None = None
    similarity: float | None = None
    if not seeded or given.new_identities:
        # Only what no known identity claimed is clustered: known people keep their names.
        rest = np.array([row for row, name in enumerate(identities) if not name], np.int64)
        clusters = np.full(len(embeddings), -1)
        if len(rest):
            similarity = given.similarity
            if similarity is None:
                similarity = default_similarity(embeddings[rest], same_person)
            clusters[rest], sure = cluster(embeddings[rest], similarity=similarity, min_size=given.min_size)
            confidences = confidences.copy()
            confidences[rest] = sure
        names = _new_names(int(clusters.max(initial=-1)) + 1, set(class_names) if seeded else set())
        for row in np.flatnonzero(clusters >= 0).tolist():
            identities[row] = names[clusters[row]]
    return Names(identities, np.where([bool(name) for name in identities], confidences, 0), clusters, similarity)


def _new_names(count: int, taken: set[str]) -> list[str]:
    names: list[str] = []
    number = 0
    while len(names) < count:
        number += 1
        if (name := f"cluster-{number:04d}") not in taken:
            names.append(name)
    return names


def counts(index: FaceIndex, names: Names, ignored: bool) -> dict[str, Any]:
    """What was found, in numbers; with true labels that were ignored, how far the clusters agree with them."""
    labels = index.labels.astype(np.int64)
    named = np.array([bool(name) for name in names.identities])
    known = labels >= 0
    found: dict[str, Any] = {
        "pictures": len(index),
        "known": 0 if ignored else int(np.count_nonzero(known)),
        "named": int(np.count_nonzero(named if ignored else named & ~known)),
        "unnamed": int(np.count_nonzero(~named)),
        "identities": len(set(names.identities) - {""}),
    }
    if names.clusters is not None:
        found["clusters"] = int(names.clusters.max(initial=-1)) + 1
        if names.similarity is not None:
            found["similarity"] = round(names.similarity, 4)
        if ignored and known.any():
            found |= dataclasses.asdict(agreement(labels, names.clusters))
    return found


def counts_text(found: dict[str, Any], given: LabelArguments) -> str:
    """The report for a terminal, and what to do next."""
    width = max(map(len, found))
    lines = [f"{name:{width}}  {value:.4g}" for name, value in found.items()]
    if not given.ignore_labels:
        form = f" --data.format {given.data.format}" if given.data.format != "auto" else ""
        root = shlex.quote(given.data.root)
        lines += [
            f"look through {given.out}, then",
            f"  facefast train --data.root {root}{form} --data.labels {shlex.quote(str(given.out))}",
            "and label again with the model that comes of it",
        ]
    return "\n".join(lines)


def with_format(data: Photographs) -> Photographs:
    """A folder of nothing but loose pictures has no identities yet: "auto" alone would not recognise its layout."""
    root = Path(data.root)
    if data.format != "auto" or not data.root:
        return data
    require_there(root)
    if not root.is_dir():
        return data
    entries = top_entries(root)
    loose = any(is_picture(entry.name) and not is_folder(entry) for entry in entries)
    loose = loose and not any(is_folder(entry) and holds_picture(entry.path) for entry in entries)
    return dataclasses.replace(data, format="folder") if loose else data


def run_label(given: LabelArguments, model: Path, folder: Path) -> None:
    """Everything that the command does where there is a model."""
    if given.review and given.ignore_labels:
        raise ValueError(
            "--review has no effect with --ignore-labels, which measures clusters: no other name can be given to "
            "pictures that have one"
        )
    files.require_writable(given.out)
    if given.review:
        files.require_writable(folder, folder=True)
    given = dataclasses.replace(given, data=with_format(given.data))
    with process.start(rank_timeout=Recipe.rank_timeout) as run:
        run.require_same(to_json(given))

        known: list[float | None] = []

        def faces(found: FaceModel) -> Locator:
            known.append(pair_threshold(found))
            return locator(found.image, found.faces, given.data.detect, run)

        index, rows = embed_photographs(model, given.data, run, given.batch_size, faces)
        embeddings = unit_rows(rows)
        if run.is_main:
            names = propose_names(given, embeddings, index.labels.astype(np.int64), index.class_names, known[0])
            pictures = enumerate(zip(names.identities, names.confidences.tolist(), strict=True))
            write_labels(given.out, (Label(index.name(row), name, sure) for row, (name, sure) in pictures))
            if given.review:
                label_review(index, embeddings, names.identities, names.confidences, given.data).save(folder)
            numbers = counts(index, names, given.ignore_labels)
            say(json.dumps(numbers) if given.json else counts_text(numbers, given))
    if given.review and run.is_main:
        review_here(folder, given.port, complain if given.json else say)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(LabelArguments, arguments, "label")
        # Beside the table, for a person's answers need files of their own.
        folder = given.out.parent / f"{given.out.name.removesuffix('.csv')}.review"
        if goes_on(given, LabelArguments(out=given.out)):
            review_here(folder, given.port)
        else:
            assert given.model is not None
            run_label(given, given.model, folder)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
