"""Writes docs/benchmarks.md from benchmarks/results/*.jsonl: python docs/generate_benchmarks.py

Of rows that measure the same thing on machines of one kind, the last counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from facefast.runtime import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

BEGINNING = """# Benchmarks

Written by `python docs/generate_benchmarks.py` from the rows of `benchmarks/results`, which hold the versions of all
packages too. Every number is the median of rounds in which all contenders of its table took turns, with the lowest and
the highest; ratios are medians of the rounds' own ratios, so that they hold where the rates do not: load is the
machine's before the measurement, and above the number of cores it was not free. A difference inside the spread is none.
What was tried and did not help: `benchmarks/LOG.md`. What many GPUs would do: [scaling.md](scaling.md).

Your own machine and photographs: `facefast bench --data.root DIR --model.backbone iresnet50` prints such a table,
appends it to `runs/bench.jsonl`, and says what is faster or slower than the last time beyond the spread; `--plot
bench.svg` draws it. Commit by commit, in the format that the field's tools read:

    make bench                                                   # peers in turns, then pytest-benchmark
    make bench ARGS="-k fixture"                                 # pytest-benchmark alone, kept in .benchmarks
    make bench ARGS="-k fixture --benchmark-compare"             # beside the last run that was kept
    make bench ARGS="-k fixture --benchmark-compare-fail=median:10%"
    make bench ARGS="-k fixture --benchmark-json=bench.json"     # with the commit, for a chart of many

On a GPU: `bash benchmarks/on_gpu.sh training`, and `tests`, and `kernels`.
"""


class Table(NamedTuple):
    """How a file of rows is shown."""

    name: str
    """Of the file."""
    title: str
    command: str
    same: tuple[str, ...]
    """Fields that say what is measured; they are columns, too, where they differ."""
    values: tuple[str, ...]
    """Fields that say how it went."""


SPREAD = ("lowest", "highest", "rounds")
TABLES = (
    Table(
        "throughput",
        "Trainings, their updates alone, their loaders alone",
        "python benchmarks/throughput.py --updates-per-epoch 20",
        ("network", "size", "batch", "updates_per_epoch", "options", "device", "mode"),
        ("images_per_second", *SPREAD, "ratio_to_compute"),
    ),
    Table(
        "start",
        "From the start of the default fine-tuning to its first update, and to its end",
        "python benchmarks/bench_start.py --to-end",
        ("data", "options", "threads"),
        ("seconds", *SPREAD, "cpu_seconds", "pictures", "end_seconds", "end_lowest", "end_highest"),
    ),
    Table(
        "peers",
        "Trainings beside the usual loaders and loops",
        "python benchmarks/peers.py",
        ("network", "size", "batch", "device", "contender"),
        ("images_per_second", *SPREAD, "facefast_ratio"),
    ),
    Table(
        "input",
        "Photographs to augmented batches",
        "python benchmarks/bench_input.py",
        ("size", "batch", "threads", "device", "contender"),
        ("images_per_second", *SPREAD, "facefast_ratio"),
    ),
    Table(
        "focal",
        "The focal loss, forward and backward",
        "python benchmarks/bench_focal.py",
        ("rows", "classes", "dtype", "device", "contender"),
        (
            "milliseconds",
            *SPREAD,
            "gigabytes_per_second",
            "host_microseconds",
            "kernel_microseconds",
            "facefast_ratio",
        ),
    ),
    Table(
        "linear_focal",
        "A training step of a head with many classes",
        "python benchmarks/bench_linear_focal.py",
        ("rows", "dim", "classes", "dtype", "device", "contender"),
        ("milliseconds", *SPREAD, "peak_mebibytes", "facefast_ratio"),
    ),
    Table(
        "norm",
        "BatchNorm, its activation and a residual, forward and backward",
        "python benchmarks/bench_norm.py",
        ("shape", "kind", "dtype", "device", "threads", "contender"),
        ("milliseconds", *SPREAD, "copies", "facefast_ratio"),
    ),
    Table(
        "adapt",
        "Adapting the embeddings of very many pictures",
        "python benchmarks/bench_adapt.py",
        ("rows", "people", "width", "threads"),
        ("seconds", "lowest", "highest", "cpu_seconds", "memory_to_embeddings"),
    ),
    Table(
        "sharded_head",
        "A head whose classes lie on several ranks",
        "python benchmarks/bench_sharded_head.py",
        ("ranks", "classes", "dim", "rows", "contender"),
        ("milliseconds", *SPREAD, "mebibytes", "of_whole"),
    ),
    Table(
        "allreduce",
        "Averaging gradients: DDP's buckets and hooks",
        "python benchmarks/bench_allreduce.py",
        ("network", "classes", "batch", "ranks", "backend", "contender", "bucket_mebibytes"),
        ("gradient_mebibytes", "milliseconds", *SPREAD, "ratio_to_usual", "gradient_apart"),
    ),
    Table(
        "large_photographs",
        "Photographs of 12 megapixels, once their faces are cut out",
        "python benchmarks/bench_large_photographs.py",
        ("stage", "contender", "pictures", "megapixels"),
        ("images_per_second", *SPREAD, "ratio_to_small"),
    ),
    Table(
        "scan",
        "Looking through files",
        "python benchmarks/bench_scan.py",
        ("contender", "files"),
        ("files_per_second", *SPREAD, "ratio_to_pillow"),
    ),
    Table(
        "gallery",
        "Searching enrolled people",
        "python benchmarks/bench_gallery.py",
        ("contender", "rows", "people", "width", "queries"),
        ("seconds", "lowest", "highest", "memory_to_embeddings"),
    ),
    Table(
        "many_people",
        "Training very many people",
        "python benchmarks/many_people.py",
        ("people", "ranks", "steps"),
        ("gibibytes", "checkpoint_gibibytes", "seconds"),
    ),
    Table(
        "int8",
        "Int8 packages",
        "python benchmarks/bench_int8.py",
        ("backbone", "height", "width", "batch", "threads", "contender"),
        ("milliseconds", *SPREAD, "int8_ratio"),
    ),
)
ELSEWHERE = {"transfer": "transfer.md", "index_scale": "runs.md"}
"""Files of rows that other pages tell of."""


def rows(name: str) -> list[dict[str, Any]]:
    """A file's rows, oldest first; none where nothing was measured."""
    path = RESULTS / f"{name}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    # The first rows do not say where they were measured: on processors, as there was nothing else.
    return [{"device": "cpu"} | row if "gpu" not in row["machine"] else row for row in found]


def latest(table: Table, measured: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By kind of machine, the last row of each thing that was measured, in the order of the newest."""
    found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in measured:
        kept = found.setdefault(machine.key(row["machine"]), {})
        what = tuple(row.get(name) for name in table.same)
        kept.pop(what, None)
        kept[what] = row
    return {kind: list(kept.values()) for kind, kept in found.items()}


def described(row: Mapping[str, Any]) -> str:
    """The machine in words."""
    facts = row["machine"]
    return ", ".join(
        ([facts["gpu"]] if "gpu" in facts else [])
        + [f"{facts['cores']} cores of {facts['cpu']}"]
        + ([facts["vectors"]] if "vectors" in facts else [])
        + [f"{facts['memory']} GiB", f"torch {row['versions']['torch']}"]
    )


def cell(value: Any) -> str:
    """A value as people read it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def shown(table: Table, kept: list[dict[str, Any]]) -> list[str]:
    """Lines of one machine's table."""
    # What is the same in all rows is said once, above.
    common = [n for n in table.same if len({str(r.get(n)) for r in kept}) == 1 and len(kept) > 1]
    columns = [name for name in (*table.same, *table.values) if name not in common]
    columns = [name for name in columns if any(row.get(name) not in (None, "") for row in kept)]
    said = ", ".join(
        f"{n.replace('_', ' ')} {cell(kept[0].get(n))}" for n in common if kept[0].get(n) not in (None, "")
    )
    loads = [row["machine"]["load"] for row in kept]
    load = f"load {min(loads):g} to {max(loads):g}" if min(loads) != max(loads) else f"load {loads[0]:g}"
    names = [*(name.replace("_", " ") for name in columns), "commit"]
    lines = [f"{described(kept[-1])}; {load}{'; ' + said if said else ''}.", ""]
    lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join([*(cell(row.get(name)) for name in columns), row['commit']])} |" for row in kept]
    return [*lines, ""]


def page() -> str:
    """The whole of docs/benchmarks.md."""
    lines = [BEGINNING]
    for table in TABLES:
        lines += [f"## {table.title}", "", f"`{table.command}`", ""]
        found = latest(table, rows(table.name))
        for kept in found.values():
            lines += shown(table, kept)
        if not found:
            lines += ["Not measured yet.", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
