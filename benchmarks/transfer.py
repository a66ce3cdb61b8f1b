"""What each way of moving a source model to new people is worth: one run of `facefast train` a row, on real faces.

    python benchmarks/transfer.py --root CELEBA --source WEIGHTS [--rows NAME...] [--seeds 0 1 2] [--runs DIR]
    python benchmarks/transfer.py --root SETS/small --set small --source WEIGHTS --rows shots8 shots8-unadapted
    python benchmarks/transfer.py --table          # the table of docs/transfer.md from results/transfer.jsonl

A fifth of the identities is kept out of training for verification, a fifth of each other one's pictures for testing;
seed chooses both. Every row has the same budget of pictures where its method allows. Rows go to results/transfer.jsonl;
one that stands there with its seed is not measured again, and a run that stands finished in DIR is read. Rows of
another set than CelebA's own, such as those of `shifted.py`, are named ROW@SET and have every row of the run's table.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from record import RESULTS, record

from facefast.evaluation.baselines import BASELINES, CLASS_MEANS

NAME = "transfer"
DOCUMENT = Path(__file__).parents[1] / "docs" / "transfer.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
COMMON = ("--data.verify-fraction=0.2", "--eval.every=100", "--pictures=0", "--keep=1", "--log-every=20")
NO_BASELINES = "--eval.no-baselines"


class Row(NamedTuple):
    """One line of the table."""

    title: str
    recipe: str
    flags: tuple[str, ...] = ()
    needs: str = ""
    """The row whose run is the source, the teacher or what is compressed: {run} in the flags is its folder."""
    sourced: bool = True
    """Whether it starts from the source model."""


def _few(shots: int) -> dict[str, Row]:
    """What there is to gain from so few pictures of a person; as many updates as a large set would get in an epoch."""
    few = f"--data.shots={shots}"
    staged = (few, NO_BASELINES, "--phases.last.steps=40", "--phases.all.steps=10")
    return {
        f"shots{shots}-fixed": Row(f"{shots} a person: fixed weights", "fixed", (few, "--phases.fixed.steps=200")),
        f"shots{shots}-staged": Row(f"{shots} a person: staged", "finetune", staged),
        f"shots{shots}-scratch": Row(
            f"{shots} a person: from scratch", "scratch", (few, "--phases.scratch.steps=80"), sourced=False
        ),
    }


def _all_layers(name: str, *flags: str) -> tuple[str, ...]:
    return tuple(f"--phases.{phase}.{flag}" for phase in name.split("+") for flag in flags)


COMPRESS = "compress"
"""Instead of a recipe: `facefast compress` of the run that the row needs."""
UNNAMED = "--data.label-fraction=0.2"
FEW = "shots8"
"""How the rows begin that sets of `shifted.py` have: they are measured where they are asked for."""
STUDENT_EPOCHS = 4
ROWS: dict[str, Row] = {
    "staged": Row("staged fine-tuning (default)", "finetune"),
    "scratch": Row("from scratch", "scratch", ("--phases.scratch.epochs=4",), sourced=False),
    "fixed": Row("fixed weights, cached features", "fixed", (NO_BASELINES,)),
    "share": Row("weight sharing, random head", "share", (NO_BASELINES,)),
    "extract": Row("feature extraction, then fine-tuning", "extract", (NO_BASELINES,)),
    "twophase": Row(
        "two phases of the tutorial",
        "twophase",
        (NO_BASELINES, "--phases.pretrain.epochs=3", "--phases.refine.epochs=1"),
    ),
    "softmax": Row("softmax", "softmax", (NO_BASELINES,)),
    "smoothing": Row(
        "softmax, label smoothing 0.1", "softmax", (NO_BASELINES, "--phases.softmax.loss.label-smoothing=0.1")
    ),
    "focal": Row("focal, effective-number weights", "focal", (NO_BASELINES,)),
    "arcface": Row("ArcFace", "arcface", (NO_BASELINES,)),
    "cosface": Row("CosFace 0.35", "cosface", (NO_BASELINES,)),
    "adaface": Row("AdaFace", "adaface", (NO_BASELINES,)),
    "triplet": Row(
        "triplets and softmax",
        "triplet",
        (NO_BASELINES, "--phases.triplet.loss.weight=1", "--phases.triplet.head-start=class_mean"),
    ),
    "triplet-only": Row("triplets only, no names", "triplet"),
    "contrastive-only": Row("contrasts only, no names", "contrastive"),
    "l2sp": Row("staged + L2-SP", "finetune", (NO_BASELINES, *_all_layers("last+all", "l2sp=0.1"))),
    "mixup": Row("staged + mixup", "finetune", (NO_BASELINES, *_all_layers("last+all", "mixup=0.2"))),
    "regularised": Row("all layers, L2-SP, mixup, drop path, EMA", "regularised", (NO_BASELINES,)),
    "multitask": Row(
        "names + Male + Attractive", "multitask", (NO_BASELINES, "--tasks.attributes", "Male", "Attractive")
    ),
    "audit": Row(
        "staged, after the audit's corrections", "finetune", ("--data.corrections={run}/audit/suspects.csv",), "staged"
    ),
    "named20": Row("staged, 20 % of the names", "finetune", (UNNAMED,)),
    "pseudolabel": Row("20 % of the names + pseudo-labels", "pseudolabel", (UNNAMED, NO_BASELINES)),
    "student": Row(
        "half as many blocks, no teacher", "scratch",
        ("--model.backbone=mobilefacenet_short", f"--phases.scratch.epochs={STUDENT_EPOCHS}", "--image.size=112",
         "--image.width=96", "--image.template=arcface_112x96"), sourced=False,
    ),
    "distill": Row(
        "half as many blocks, distilled", "distill",
        ("--model.teacher={run}", f"--phases.distill.epochs={STUDENT_EPOCHS}"), "staged", sourced=False,
    ),
    "int8": Row("staged, then int8", COMPRESS, needs="staged"),
    "int8-student": Row("half as many blocks, distilled, then int8", COMPRESS, needs="distill"),
    "prune": Row("half of the weights pruned", "prune", (NO_BASELINES,)),
    "shots8": Row("8 a person: default", "finetune", ("--data.shots=8",)),
    "shots8-unadapted": Row(
        "8 a person: default, not adapted", "finetune",
        ("--data.shots=8", "--phases.last.adapt.choose=none", NO_BASELINES),
    ),
    **{
        f"shots8-l2sp{strength}": Row(
            f"8 a person: default + L2-SP {strength}", "finetune",
            ("--data.shots=8", NO_BASELINES, *_all_layers("last+all", f"l2sp={strength}")),
        )
        for strength in ("0.1", "1")
    },
    **{name: row for shots in (1, 2, 5, 10) for name, row in _few(shots).items()},
}  # fmt: skip


def measure(name: str, seed: int, root: str, source: str, runs: Path, of: str = "") -> dict[str, Any]:
    """Runs one row, of a set with a name where that is not the usual one, and returns its line."""
    row, folder = ROWS[name], runs / f"{titled(name, of)}-{seed}"
    needed = runs / f"{row.needs}-{seed}"
    if row.recipe == COMPRESS:
        return _measure_int8(name, seed, root, needed, folder)
    if name == "audit" and not (needed / "audit" / "suspects.csv").exists():
        _run("facefast.audit", source, f"--data.root={root}", "--data.format=celeba", f"--out={needed}/audit")
    flags = [flag.replace("{run}", str(needed)) for flag in row.flags]
    given = [f"--model.source={source}"] if row.sourced else []
    minutes, status = None, folder / "status.json"
    if not status.exists() or json.loads(status.read_text(encoding="utf-8"))["state"] != "done":
        minutes = _run(
            "facefast.train", row.recipe, f"--data.root={root}", "--data.format=celeba", *given, *COMMON, *flags,
            f"--seed={seed}", f"--out={folder}", "--resume=never",
        )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = {line["phase"]: line for line in lines if line["split"] == "test"}  # a row is its last line
    best = json.loads(status.read_text(encoding="utf-8"))["best"]
    last = asked[best["phase"]]
    found = {"top1": last.get("top1"), "tar": last["tar@1e-2"], "verification": last["verification_accuracy"]}
    found |= {key: value for key, value in last.items() if "/" in key}
    if of:
        shown = ("top1", "top1_low", "top1_high", "tar@1e-2", "validation")
        found |= {
            "handed_on": best["phase"],
            "rows": {title: {key: line[key] for key in shown if key in line} for title, line in asked.items()},
        }
    found |= {key: asked[title]["top1"] for key, title in BASELINES.items() if title in asked}
    if CLASS_MEANS in asked:
        untrained = asked[CLASS_MEANS]
        found |= {"source_tar": untrained["tar@1e-2"], "source_verification": untrained["verification_accuracy"]}
    rows = json.loads((folder / "plan.json").read_text())["phases"][-1]["num_rows"]
    return record(
        NAME, row=titled(name, of), title=row.title, seed=seed, core_minutes=minutes, training_pictures=rows, **found
    )


def titled(name: str, of: str) -> str:
    """The name of a row on a set."""
    return f"{name}@{of}" if of else name


def _measure_int8(name: str, seed: int, root: str, needed: Path, folder: Path) -> dict[str, Any]:
    """What is left of a finished run in int8: embeddings only, verified without mirror images."""
    minutes = _run("facefast.compress", str(needed), f"--data.root={root}", "--data.format=celeba", f"--out={folder}")
    found = json.loads((folder / "int8.json").read_text())
    before, after = (found["gate"][f"verification_{when}"] for when in ("before", "after"))
    return record(
        NAME, row=name, title=ROWS[name].title, seed=seed, core_minutes=minutes, training_pictures=None, top1=None,
        tar=after["tar@1e-2"], verification=after["verification_accuracy"], float_tar=before["tar@1e-2"],
        float_verification=before["verification_accuracy"], cosine=found["gate"]["cosine_mean"],
        bytes=[found["bytes_before"], found["bytes_after"]], seconds_per_picture=found["seconds_per_picture"],
        threads=found["threads"],
    )  # fmt: skip


def _core_seconds() -> float:
    """Processor time of finished runs, which other work on the machine does not lengthen."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(module: str, *words: str) -> float:
    """Runs a command and returns its minutes of processor time."""
    began = _core_seconds()
    command = [sys.executable, "-m", module, *words]
    print(" ".join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return (_core_seconds() - began) / 60


def measured() -> dict[tuple[str, int], dict[str, Any]]:
    """The newest line of each row and seed."""
    path = RESULTS / f"{NAME}.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {(line["row"], line["seed"]): line for line in lines}


HEADER = (
    "method", "seeds", "top-1", "against staged", "TAR at FAR 1 %", "verification", "against the source", "core-minutes"
)  # fmt: skip


def table() -> str:
    """The lines of results/transfer.jsonl as a table: means over the seeds, and ranges of the differences to the
    default and to the source model on the same seeds."""
    lines = measured()
    seeds = sorted({seed for _, seed in lines})
    staged = {seed: lines["staged", seed] for seed in seeds if ("staged", seed) in lines}
    rows = [_cells(HEADER), "|---" * len(HEADER) + "|"]
    for key, title in BASELINES.items():
        found = [
            {"seed": seed, "top1": line[key], "tar": line["source_tar"], "verification": line["source_verification"]}
            for seed, line in staged.items()
        ]
        rows.append(_row(f"source model, {title}", found, staged))
    for name, row in ROWS.items():
        found = [lines[name, seed] for seed in seeds if (name, seed) in lines]
        if found:
            rows.append(_row(row.title, found, staged))
    return "\n".join(rows)


def _row(title: str, found: list[dict[str, Any]], staged: dict[int, dict[str, Any]]) -> str:
    def mean(key: str, factor: float = 100) -> str:
        values = [factor * line[key] for line in found if line.get(key) is not None]
        return f"{statistics.mean(values):.1f}" if values else "-"

    def against(key: str, other: str) -> str:
        gaps = [
            100 * (line[key] - staged[line["seed"]][other])
            for line in found
            if line.get(key) is not None and line["seed"] in staged
        ]
        if not gaps:
            return "-"
        if not any(gaps):
            return "0"
        return f"{gaps[0]:+.1f}" if len(gaps) == 1 else f"{min(gaps):+.1f} to {max(gaps):+.1f}"

    return _cells(
        (
            title,
            str(len(found)),
            mean("top1"),
            against("top1", "top1"),
            mean("tar"),
            mean("verification"),
            against("verification", "source_verification"),
            mean("core_minutes", 1),
        )
    )


def _cells(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root")
    parser.add_argument("--source")
    usual = [name for name in ROWS if not name.startswith(FEW)]
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=usual)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--set", default="", help="name of the set, where it is not CelebA as it is")
    parser.add_argument("--table", action="store_true", help="write the table of docs/transfer.md")
    given = parser.parse_args()
    if not given.table:
        if not (given.root and given.source):
            parser.error("--root and --source are needed to measure")
        for seed in given.seeds:
            for name in given.rows:
                if (titled(name, given.set), seed) not in measured():
                    line = measure(name, seed, given.root, given.source, given.runs, given.set)
                    print(
                        json.dumps({key: line[key] for key in ("row", "seed", "top1", "tar", "core_minutes")}),
                        flush=True,
                    )
        return
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
