"""Run folders as a run leaves them, without a run: of any number of people, whatever they are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from facefast.data import FaceIndex, PairSet
from facefast.data.divide import EvaluationSet, PhaseData
from facefast.evaluation import findings, measured
from facefast.evaluation.measure import Answers
from facefast.evaluation.thresholds import NamingThreshold, Thresholds
from facefast.models import provenance
from facefast.recipe import DataConfig, ModelConfig, Phase, Recipe, resolve, to_json
from facefast.runtime import files
from tests.support.small import make_model

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>document.title='taken'</script>",
    '"><img src=x onerror=alert(1)>',
    'O\'Brien & "Söhne"',
    "שרה כהן",
    "line\nfeed\r\n\ttab",
    "turned \u202e round",
    "{{7*7}} {0} %s",
    "separator\u2028here\u0000",
    "a" * 300,
    "𝔘nicode 🙂",
    "<!--",
)
"""What people may be called."""
WRONG = 0.2
"""Part of the test pictures that get another name, beside the first of each person."""


def index_of(root: Path, names: Sequence[str], pictures: int, attribute: bool = False) -> FaceIndex:
    """Pictures of people that nobody looks at, named after them."""
    labels = np.repeat(np.arange(len(names)), pictures)
    paths = [f"{label}/{k}.jpg".encode() for label in range(len(names)) for k in range(pictures)]
    more: dict[str, Any] = {}
    if attribute:
        more = {"attributes": (labels % 2).astype(np.float32)[:, None], "attribute_names": (names[0],)}
    return FaceIndex.build(str(root), paths, labels, names, **more)


def phase_data(root: Path, names: Sequence[str], pictures: int = 4, pairs: int = 600) -> PhaseData:
    """Twice as many pictures to learn from as to test with; pairs of the latter."""
    test = index_of(root / "test", names, pictures, attribute=True)
    nothing = EvaluationSet(None, None, None, held_out=False)
    asked = EvaluationSet(test, test, PairSet.random(test, pairs, 5, seed=0), held_out=False)
    return PhaseData(index_of(root / "train", names, 2 * pictures), nothing, asked)


def asked_of(data: PhaseData, seed: int = 0) -> findings.Asked:
    """Answers and embeddings as a fair model gives them."""
    rng, test = np.random.default_rng(seed), data.evaluation.test
    assert test is not None
    labels, num = test.labels.astype(np.int64), test.num_classes
    wrong = rng.random(len(test)) < WRONG
    wrong[np.unique(labels, return_index=True)[1]] = True  # everybody is somewhere on the page
    predicted = np.where(wrong, (labels + 1) % num, labels)
    ranks = np.where(wrong, rng.integers(1, min(num, 9), len(test)), 0)
    sure = np.where(wrong, rng.uniform(0.2, 0.7, len(test)), rng.uniform(0.5, 1.0, len(test)))
    answers = Answers(np.arange(len(test)), labels, ranks, predicted, sure, 0.5)
    centres = rng.normal(size=(num, 16))
    embeddings = torch.tensor(centres[labels] + rng.normal(scale=0.8, size=(len(test), 16)), dtype=torch.float32)
    return findings.Asked(answers, embeddings, torch.ones(len(test), dtype=torch.bool))


def write_run(folder: Path, names: Sequence[str], *, steps: int = 40, seed: int = 0, lr: float = 0.01) -> Path:
    """A run folder of two phases that ended well; the name of the second is the first person's."""
    data = phase_data(folder / "people", names)
    asked = asked_of(data, seed)
    assert asked.answers is not None
    right = float((asked.answers.ranks == 0).mean())
    phases = tuple(Phase(name=name, steps=steps // 2, lr=lr, start="source") for name in ("last", "all"))
    recipe = Recipe(
        data=DataConfig(root=str(folder / names[-1].replace("/", ""))), model=ModelConfig(source="x"), phases=phases
    )
    plan = resolve(recipe, (data.facts(), data.facts()), 1)
    (folder / "checkpoints" / "best").mkdir(parents=True)
    row = {
        "top1": right,
        "top1_low": max(right - 0.1, 0.0),
        "top1_high": min(right + 0.1, 1.0),
        "top5": 0.95,
        "known_auc": 0.97,
        "known_verification_accuracy": 0.9,
        "known_verification_std": 0.01,
        "known_tar@1e-2": 0.8,
        "test_rows": len(asked.answers.ranks),
        "validation": 0.9,
    }
    status = {
        "state": "done",
        "exit_code": 0,
        "step": steps,
        "best": {"phase": names[0], "metric": "top1", "value": right, "validation": 0.9},
        "bound_by": "compute",
        "advice": "use less",
        "images_per_second": 123.4,
        "data_wait_fraction": 0.02,
        "transfer_fraction": 0.0,
        "allreduce_fraction": 0.0,
    }
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        phase = "last" if step <= steps // 2 else names[0]
        position = {"step": step, "phase": phase, "epoch": step / 10}
        speeds = {"images_per_second": 120.0 + step % 7, "data_wait_fraction": 0.02, "rows": 16}
        numbers = {"loss": 4.0 / step, "lr": lr, "accuracy": 1 - 1 / step, "unreadable_rows": 0, "skipped_steps": 0}
        lines.append(position | {"split": "train"} | numbers | speeds)
        if step % 10 == 0:
            lines.append(position | {"split": "validation", "top1": 0.5 + step / (3 * steps)})
    lines += [{"step": steps, "phase": "class means", "epoch": 0, "split": "test", **row, "top1": 0.7}]
    lines += [{"step": steps, "phase": names[0], "epoch": 4, "split": "test", **row}]
    naming = NamingThreshold(0.01, 0.4, 500, 500, people=len(names))
    selected = {"metric": "top1", "value": 0.9, "pictures": 40, "part": "validation"}
    model = make_model(classes=("a", "b")).to_config() | {
        "num_classes": len(names),
        "class_names": list(names),
        "thresholds": Thresholds(naming=(naming,), measured_on="a few pictures").to_json(),
        "metrics": measured.document(names[0], row, data.evaluation, selected),
        "provenance": provenance.of_run(None) | {"source": names[0], "sha256": "0" * 64},
    }
    settled, planned = to_json(recipe), to_json(plan)
    for document in (settled, planned):  # a recipe refuses such a name, a file may hold it
        document["phases"][1]["name"] = names[0]
    documents = {
        "status": status,
        "recipe": settled,
        "plan": planned,
        "environment": {"command": ["facefast", "train", names[0]], "device": "cpu", "packages": {"torch": "2"}},
        "evaluation": {"row": names[0], "step": steps} | findings.document(asked, data, {"empty": 3}),
        "checkpoints/best/model": model,
    }
    for name, document in documents.items():
        files.write_json(folder / f"{name}.json", document)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
