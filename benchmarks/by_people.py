"""Whether staged training hands on at least what class means give, on sets that differ by their people.

    python benchmarks/by_people.py --root CELEBA --source WEIGHTS [--splits mini sixty twenty] [--seeds 0 1 2]
        [--runs DIR]

`mini` is everybody, `sixty` sixty people drawn at random, `twenty` twenty others with their first twenty pictures. The
recipe is the default one with no option but the seed, which divides each person's pictures. A row of
results/transfer.jsonl has top-1 on the same test pictures for class means, for each phase and for what was handed on,
which the validation part has chosen. A run that stands finished in DIR is read, not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from facefast.evaluation.baselines import BASELINES, CLASS_MEANS

SPLITS = {"mini": "everybody", "sixty": "60 people", "twenty": "20 people of 20 pictures"}
DRAWN = 5
"""Seed that chooses the people."""
WITHOUT_HEADER = ("identity_CelebA.txt", "list_eval_partition.txt")
WITH_HEADER = ("list_attr_celeba.txt", "list_landmarks_align_celeba.txt")


def files_of(root: Path, split: str) -> set[str]:
    """Names of the pictures of a split."""
    pictures = defaultdict(list)
    for line in (root / WITHOUT_HEADER[0]).read_text(encoding="utf-8").splitlines():
        name, identity = line.split()
        pictures[identity].append(name)
    drawn = np.random.default_rng(DRAWN).permutation(sorted(pictures))
    if split == "sixty":
        return {name for who in drawn[:60] for name in pictures[who]}
    full = [who for who in drawn[60:] if len(pictures[who]) >= 20][:20]
    return {name for who in full for name in sorted(pictures[who])[:20]}


def write_split(root: Path, names: set[str], folder: Path) -> None:
    """CelebA's lists restricted to some pictures, beside a link to its photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "img_align_celeba").exists():
        os.symlink((root / "img_align_celeba").absolute(), folder / "img_align_celeba")
    for name in (*WITHOUT_HEADER, *WITH_HEADER):
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        head = lines[1:2] if name in WITH_HEADER else []
        kept = [line for line in lines[len(head) * 2 :] if line.split()[0] in names]
        counted = [str(len(kept)), *head] if head else []
        (folder / name).write_text("\n".join([*counted, *kept]) + "\n", encoding="utf-8")


def measure(split: str, seed: int, root: Path, source: str, runs: Path) -> dict[str, Any]:
    """Trains, unless it was done before, and returns the row."""
    run, photographs = runs / f"{split}-{seed}", root
    if split != "mini":
        photographs = runs / split
        write_split(root, files_of(root, split), photographs)
    status = run / "status.json"
    if not status.exists() or json.loads(status.read_text(encoding="utf-8"))["state"] != "done":
        words = [f"--data.root={photographs}", f"--model.source={source}", f"--seed={seed}", f"--out={run}"]
        done = subprocess.run(
            [sys.executable, "-m", "facefast.train", *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = {line["phase"]: line for line in lines if line["split"] == "test"}  # a row is its last line
    chosen = json.loads(status.read_text(encoding="utf-8"))["best"]
    count = asked[chosen["phase"]]["test_rows"]
    right = {name: round(line["top1"] * count) for name, line in asked.items()}
    return record(
        "transfer",
        row=f"people-{split}",
        title=f"default recipe, {SPLITS[split]}",
        seed=seed,
        test_pictures=count,
        top1=asked[chosen["phase"]]["top1"],
        handed_on=chosen["phase"],
        right_handed_on=right[chosen["phase"]],
        right_class_means=right[CLASS_MEANS],
        right_by_phase={name: number for name, number in right.items() if name not in BASELINES.values()},
        at_least_class_means_but_one=right[chosen["phase"]] >= right[CLASS_MEANS] - 1,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/people"))
    given = parser.parse_args()
    for split in given.splits:
        for seed in given.seeds:
            line = measure(split, seed, given.root, given.source, given.runs)
            print(
                {key: line[key] for key in ("row", "seed", "test_pictures", "handed_on", "right_by_phase")},
                line["right_class_means"],
            )


if __name__ == "__main__":
    main()
