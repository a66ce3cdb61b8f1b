"""What is probably wrong with labelled photographs: `python -m facefast.audit MODEL --data.root DIR --out DIR`.

Writes into --out:

- `suspects.csv`: a line for each finding, the surest first. Columns: kind (wrong_label, duplicate, merge), path,
  identity, suggested, action (drop, keep, relabel, merge), confidence, score, other_score, other_path; what they mean
  is said in `facefast.data.corrections.Correction`. Delete the lines that are not true, or change their action.
- `wrong_label_01.jpg` ...: contact sheets: the suspect, the pictures of its own identity most like it, and those of the
  suggested one. `duplicate_01.jpg` ...: pairs. `merge_01.jpg` ...: pictures of both identities.
- `suspects.html`: the same on one page that loads nothing, with the names in full.
- `suspects.json`: the counts, and each finding with the columns of the table; what is not known is null.
- `review.npz`, `review.jsonl`: which pictures `--review` shows of each finding; no photographs.

`facefast train --data.corrections suspects.csv` then trains without what was found. `--review` opens a page on this
machine on which a person goes through the findings with the keyboard; `facefast audit --review --out DIR` goes on with
one. What they decide is in `corrections.csv`, for `--data.corrections`, and in `decisions.jsonl`, to go on from.
`--plant 0.05` is a self-test: it plants wrong labels and says how many of them are found.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from facefast.data import FaceIndex
from facefast.data.corrections import Correction, write_corrections
from facefast.evaluation.embed import embed_photographs
from facefast.faces.align import Locator, locator
from facefast.faces.quality import face_sizes, poses
from facefast.labels.clustering import Floats, unit_rows
from facefast.labels.copies import copies_by_pixels
from facefast.labels.hardness import hardness
from facefast.labels.pages import write_page
from facefast.labels.review.items import audit_review
from facefast.labels.review.server import goes_on, review_here
from facefast.labels.selftest import SelfTest, plant_wrong_labels, self_test
from facefast.labels.sheets import strips, write_sheets
from facefast.labels.suspects import KINDS, Suspects, find_suspects
from facefast.models import FaceModel
from facefast.recipe import Photographs, Recipe, to_json
from facefast.recipe.options import parse
from facefast.recipe.ranges import LARGEST_SEED, MOST, require
from facefast.runtime import exits, files, process
from facefast.runtime.terminal import complain, say


@dataclass(frozen=True)
class AuditArguments:
    """`python -m facefast.audit`."""

    model: tyro.conf.Positional[Path | None] = None
    """A run folder, a checkpoint folder, an exported package or a source model's weights file. One that was trained on
    these very labels has learnt their mistakes too: a source model sees more. Only --review goes on without one."""
    data: Photographs = field(default_factory=Photographs)
    out: Path | None = None
    """Folder for suspects.csv and the contact sheets."""
    confidence: float = 0.5
    """Least probability of a wrong label that is reported."""
    false_merges: float = 0.05
    """Expected part of the reported merges that is false."""
    pictures: int = 240
    """Findings of each kind on contact sheets and in suspects.html, at most; 0 writes no photographs."""
    plant: float = 0.0
    """Self-test: plant this part of wrong labels, and print how many are found; writes nothing."""
    seed: int = 0
    """Of the planted labels."""
    batch_size: int = 128
    """Pictures in one batch of the model, per process."""
    json: bool = False
    """Print one JSON object, what suspects.json holds, and nothing else."""
    review: bool = False
    """Then serve a page on 127.0.0.1 to decide each finding; without MODEL go on with those that are in --out."""
    port: int = 0
    """Of the page of --review; 0 takes a free one."""

    def __post_init__(self) -> None:
        require(self, port=(0, 65535))
        require(self, confidence=(0, 1), false_merges=(0, 1), plant=(0, 1), pictures=(0, MOST))
        require(self, seed=(0, LARGEST_SEED), batch_size=(1, MOST))


def corrections_of(index: FaceIndex, suspects: Suspects) -> list[Correction]:
    """The findings as lines of suspects.csv, in the same order."""

    def name(label: int) -> str:
        return index.class_names[label] if label >= 0 else ""

    return [
        Correction(
            kind=suspect.kind,
            path=index.name(suspect.row),
            identity=name(suspect.label),
            suggested=name(suspect.suggested),
            action=suspect.action,
            confidence=suspect.confidence,
            score=suspect.score,
            other_score=suspect.other_score,
            other_path=index.name(suspect.other_row) if suspect.other_row >= 0 else "",
        )
        for suspect in suspects.found
    ]


def findings(index: FaceIndex, suspects: Suspects) -> dict[str, Any]:
    """What was found, in numbers and names."""
    return {
        "pictures": len(index),
        "identities": int(len(np.unique(index.labels[index.labels >= 0]))),
        "estimated_wrong_share": round(suspects.doubt.wrong_fraction, 4),
        **{
            kind: {"found": len(suspects.of(kind)), **Counter(suspect.action for suspect in suspects.of(kind))}
            for kind in KINDS
        },
        "pairs_not_compared": suspects.uncompared,
        "mixed_identities": [index.class_names[label] for label in suspects.mixed],
    }


def findings_text(found: dict[str, Any], data: Photographs, out: Path) -> str:
    """The report for a terminal, and what to do next."""
    lines = [
        f"{found['pictures']} pictures of {found['identities']} identities; about "
        f"{found['estimated_wrong_share']:.1%} of the labels look like those of strangers"
    ]
    for kind in KINDS:
        actions = ", ".join(f"{count} to {action}" for action, count in found[kind].items() if action != "found")
        lines.append(f"{found[kind]['found']:7d}  {kind:11}  {actions}".rstrip())
    if found["mixed_identities"]:
        names = found["mixed_identities"]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(
            f"{len(names):7d}  identities are doubtful as a whole: {', '.join(names[:5])}{more}; "
            "their pictures are kept unless you decide"
        )
    if found["pairs_not_compared"]:
        lines.append(
            f"{found['pairs_not_compared']:7d}  pairs with near embeddings were too many to be compared by pixels, the "
            "least near ones: drop what was found and audit again"
        )
    form = f" --data.format {data.format}" if data.format != "auto" else ""
    root, table = shlex.quote(data.root), shlex.quote(str(out / "suspects.csv"))
    lines += [
        f"decide them on a page: facefast audit --review --out {shlex.quote(str(out))}",
        f"or look at {out}/*.jpg and delete the lines of {out / 'suspects.csv'} that are not true, then",
        f"  facefast train --data.root {root}{form} --data.corrections {table}",
    ]
    return "\n".join(lines)


def _yaws(index: FaceIndex) -> NDArray[np.floating] | None:
    return None if index.landmarks is None else poses(index.landmarks)[:, 0]


HEADINGS = {"wrong_label": "Wrong labels", "duplicate": "Duplicates", "merge": "Identities that are one person"}


def audit(given: AuditArguments, index: FaceIndex, embeddings: Floats, out: Path) -> dict[str, Any]:
    """Finds the suspects and writes suspects.csv, suspects.json, suspects.html and the contact sheets.

    Args:
        embeddings: [N, D] as they come: their lengths say how hard a picture is.

    Returns:
        What suspects.json holds.

    Raises:
        StorageError: they cannot be written.
    """
    unit = unit_rows(embeddings)
    suspects = find_suspects(
        unit,
        index.labels.astype(np.int64),
        index.hashes,
        confidence=given.confidence,
        false_merges=given.false_merges,
        hardness=hardness(embeddings, _yaws(index)),
        same_picture=copies_by_pixels(index, None if index.landmarks is None else face_sizes(index.landmarks)),
    )
    lines = corrections_of(index, suspects)
    write_corrections(out / "suspects.csv", lines)
    audit_review(index, unit, suspects, lines, given.data).save(out)
    found = findings(index, suspects)
    document: dict[str, Any] = files.strict(found | {"suspects": [dataclasses.asdict(line) for line in lines]})
    with files.storing(out / "suspects.json"):
        files.write_json(out / "suspects.json", document)
    shown = {kind: strips(index, unit, suspects, kind, given.pictures) for kind in KINDS}
    for kind in KINDS:
        write_sheets(out, kind, shown[kind], index)
    page = out / "suspects.html"
    if given.pictures:
        said = findings_text(found, given.data, out).splitlines()
        write_page(page, f"Suspects among {given.data.root}", said, {HEADINGS[k]: shown[k] for k in KINDS}, index)
    else:  # one of an earlier time would show other findings
        with files.storing(page):
            page.unlink(missing_ok=True)
    return document


def planted(given: AuditArguments, index: FaceIndex, embeddings: Floats) -> SelfTest:
    """The self-test: wrong labels planted in the set, and how many of them are found."""
    # The set's own mistakes are found in both runs, and set aside when the planted ones are counted.
    labels = index.labels.astype(np.int64)
    wrong, rows = plant_wrong_labels(labels, given.plant, given.seed)
    hard, unit = hardness(embeddings, _yaws(index)), unit_rows(embeddings)
    before, after = (
        find_suspects(unit, each, confidence=given.confidence, false_merges=given.false_merges, hardness=hard)
        for each in (labels, wrong)
    )
    return self_test(before, after, rows, labels)


def run_audit(given: AuditArguments, model: Path) -> None:
    """Everything that the command does where there is a model."""
    if (given.out is None) == (given.plant == 0):
        raise ValueError("give either --out DIR, for the findings, or --plant FRACTION, for the self-test")
    if given.review and given.out is None:
        raise ValueError("--review has no effect with --plant, which finds nothing that could be decided")
    if given.out is not None:
        files.require_writable(given.out, folder=True)
    with process.start(rank_timeout=Recipe.rank_timeout) as run:
        run.require_same(to_json(given))

        def faces(found: FaceModel) -> Locator:
            return locator(found.image, found.faces, given.data.detect, run)

        index, embeddings = embed_photographs(model, given.data, run, given.batch_size, faces)
        if len(np.unique(index.labels[index.labels >= 0])) < 2:
            raise ValueError(
                f"{given.data.root} has fewer than 2 identities; an audit compares them. "
                "For pictures without names use facefast label"
            )
        if run.is_main and given.out is None:
            result = dataclasses.asdict(planted(given, index, embeddings))
            width = max(map(len, result))
            if given.json:
                say(json.dumps(files.strict(result)))
            else:
                say("\n".join(f"{name:{width}}  {value:.4g}" for name, value in result.items()))
        elif run.is_main and given.out is not None:
            found = audit(given, index, embeddings, given.out)
            say(json.dumps(found, allow_nan=False) if given.json else findings_text(found, given.data, given.out))
    if given.review and run.is_main and given.out is not None:
        review_here(given.out, given.port, complain if given.json else say)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(AuditArguments, arguments, "audit")
        if not goes_on(given, AuditArguments(out=given.out)):
            assert given.model is not None
            run_audit(given, given.model)
        elif given.out is None:
            raise ValueError("--review without MODEL needs --out DIR, the folder of an audit")
        else:
            review_here(given.out, given.port)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
