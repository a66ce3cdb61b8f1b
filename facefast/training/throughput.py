"""Pictures a second of a training, of its updates alone and of its loader alone, on this machine: three programs in
turns, the rows that say how fast they were, and what those rows say beside earlier ones."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facefast.data import FaceIndex, read_index
from facefast.runtime import machine
from facefast.runtime.turns import Entry, Rate, in_turns, ratio
from facefast.training.pace import line_batches

WHOLE, COMPUTE, LOADER = MODES = ("whole job", "compute only", "loader only")
"""train itself, with loader, log, checkpoints and ends of epochs; its update on batches in memory; its loader."""
ENDLESS = 100_000
"""Epochs: nobody waits for the last one."""
SAME = ("network", "size", "batch", "updates_per_epoch", "options", "device", "mode")
"""What two rows must have in common for their numbers to be compared, beside the machine."""


@dataclass(frozen=True)
class Setting:
    """One training to be measured."""

    network: str
    """A backbone."""
    size: int
    """Pixels on a side; 0 is the network's usual one."""
    batch: int
    updates_per_epoch: int
    options: tuple[str, ...] = ()
    """Further words of train's command line."""

    def __post_init__(self) -> None:
        if self.batch < 2 or self.updates_per_epoch < 1:
            raise ValueError(
                f"batch is {self.batch} and updates_per_epoch {self.updates_per_epoch}; they must be at least 2 and 1"
            )

    @property
    def line(self) -> int:
        """Updates between two lines of the log: half an epoch where that goes, so that a turn begins within one."""
        least = 2 if self.updates_per_epoch > 1 else 1
        parts = (n for n in range(least, self.updates_per_epoch + 1) if self.updates_per_epoch % n == 0)
        return self.updates_per_epoch // next(parts)

    def words(self, index: Path) -> list[str]:
        """The command line of train, without its run folder."""
        return [
            "scratch",
            f"--data.root={index}",
            "--data.detect=none",
            "--data.test-fraction=0",
            "--data.validation-fraction=0",
            "--phases.scratch.split=train",
            "--eval.split=test",
            "--eval.pairs=20",
            "--eval.folds=2",
            f"--eval.every={ENDLESS}",
            "--eval.no-baselines",
            f"--phases.scratch.epochs={ENDLESS}",
            f"--phases.scratch.batch-size={self.batch}",
            "--phases.scratch.lr=0.001",
            f"--model.backbone={self.network}",
            f"--image.size={self.size}",
            f"--log-every={self.line}",
            *self.options,
        ]


def write_index(root: str | Path, path: Path, rows: int) -> FaceIndex:
    """An index of exactly so many training pictures, repeated where there are fewer, and of a few other people to be
    verified, which a run wants to have and this one never is asked about.

    Args:
        root: what `read_index` reads.
        path: .npz file to be written.
        rows: pictures to train on.

    Raises:
        ValueError: there are not three people with two pictures each.
    """
    index = read_index(root).scanned().sound()
    index = index.select(index.labels >= 0).compact()
    counts = np.bincount(index.labels, minlength=index.num_classes)
    kept = np.flatnonzero(counts > 1)[-2:]
    others = ~np.isin(index.labels, kept)
    if len(kept) < 2 or len(np.unique(index.labels[others])) < 1:
        raise ValueError(
            f"{root} has {index.num_classes} people, {int((counts > 1).sum())} with two photographs or more; three "
            "with two each are needed to measure a training"
        )
    chosen = np.resize(np.flatnonzero(others), rows)
    # Parts of the data set's own partition: trained on, and asked afterwards.
    index = dataclasses.replace(index, splits=np.where(others, 0, 2).astype(np.uint8))
    found = index.select(np.concatenate([chosen, np.flatnonzero(~others)]))
    found.save(path)
    return found


def entries(
    setting: Setting, root: str | Path, folder: Path, device: str, modes: Sequence[str] = MODES
) -> dict[str, Entry]:
    """The programs that a training is measured by.

    Args:
        setting: which training.
        root: its photographs.
        folder: for an index and the run folder.
        device: cpu, or cuda.
        modes: of `MODES`.
    """
    index, environment = folder / "index.npz", {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else None
    write_index(root, index, setting.updates_per_epoch * setting.batch)
    words, pace = setting.words(index), [sys.executable, "-m", "facefast.training.pace"]
    epoch = setting.updates_per_epoch // setting.line
    update = setting.line * setting.batch
    found = {}
    if WHOLE in modes:
        command = [sys.executable, "-m", "facefast.train", *words, f"--out={folder / 'run'}", "--json"]
        found[WHOLE] = Entry(command, 2 * epoch, 1, epoch, update, environment, counts=is_training_line)
    if COMPUTE in modes:
        found[COMPUTE] = Entry([*pace, "compute", *words], 2 * epoch, 1, epoch, update, environment)
    if LOADER in modes:
        pictures = line_batches(setting.batch) * setting.batch
        found[LOADER] = Entry([*pace, "loader", *words], 2, 1, 1, pictures, environment)
    return found


def is_training_line(record: Mapping[str, Any]) -> bool:
    """Whether a line of train's JSON is about updates."""
    return record.get("split") == "train"


def measure(
    setting: Setting,
    root: str | Path,
    folder: Path,
    device: str,
    rounds: int,
    modes: Sequence[str] = MODES,
    told: Callable[[str], None] = lambda text: None,
    starts: int = 1,
) -> dict[str, list[float]]:
    """Pictures a second of each mode, one number a round; the arguments are those of `entries` and `in_turns`.

    Args:
        starts: how often all modes are started anew, each time for so many rounds: where a process happens to find its
            memory makes it faster or slower by some percent for as long as it lives.
    """
    rates: dict[str, list[float]] = {}
    for start in range(starts):
        own = folder / str(start)  # a run folder that no earlier start has left anything in
        own.mkdir(parents=True)
        for name, found in in_turns(entries(setting, root, own, device, modes), rounds, told).items():
            rates.setdefault(name, []).extend(found)
    return rates


def rows(setting: Setting, rates: Mapping[str, Sequence[float]], device: str) -> list[dict[str, Any]]:
    """What was measured, one JSON object a mode."""
    found = []
    for mode, values in rates.items():
        rate = Rate.of(values)
        found.append(
            {
                "network": setting.network,
                "size": setting.size,
                "batch": setting.batch,
                "updates_per_epoch": setting.updates_per_epoch,
                "options": " ".join(setting.options),
                "device": device,
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "mode": mode,
                "images_per_second": round(rate.median, 1),
                "lowest": round(rate.lowest, 1),
                "highest": round(rate.highest, 1),
                "rounds": rate.rounds,
                "ratio_to_compute": round(ratio(values, rates[COMPUTE]), 4) if COMPUTE in rates else None,
            }
        )
    return found


def before(row: Mapping[str, Any], earlier: Sequence[dict[str, Any]], own: str) -> dict[str, Any] | None:
    """The last of earlier rows that says the same of a machine of the same kind; None where none does.

    Args:
        row: what was measured now.
        earlier: rows with a `machine`, oldest first.
        own: `machine.key` of this one.
    """
    same = [other for other in earlier if machine.key(other.get("machine", {})) == own]
    same = [other for other in same if all(other.get(name) == row.get(name) for name in SAME)]
    return same[-1] if same else None


def verdict(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    """Faster or slower than an earlier row, where the two spreads do not meet."""
    if other is None:
        return "first"
    change = row["images_per_second"] / other["images_per_second"] - 1
    if row["lowest"] > other["highest"]:
        return f"faster {change:+.1%}"
    if row["highest"] < other["lowest"]:
        return f"slower {change:+.1%}"
    return f"same ({change:+.1%}, within the spread)"


def table(measured: Sequence[Mapping[str, Any]], verdicts: Sequence[str]) -> str:
    """A line a mode, the numbers in columns."""
    width = max(len(str(row["network"])) for row in measured)
    rates = f"{'images/s':>10}{'lowest':>9}{'highest':>9}{'of compute':>12}"
    lines = [f"{'':{width}}  {'px':>4}{'batch':>6}  {'':12}{rates}  before"]
    for row, said in zip(measured, verdicts, strict=True):
        share = row["ratio_to_compute"]
        told = "-" if share is None else f"{share:.1f} x" if row["mode"] == LOADER else f"{share:.1%}"
        lines.append(
            f"{row['network']:{width}}  {row['size'] or '-':>4}{row['batch']:>6}  {row['mode']:12}"
            f"{row['images_per_second']:>10.1f}{row['lowest']:>9.1f}{row['highest']:>9.1f}"
            f"{told:>12}  {said}"
        )
    return "\n".join(lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of earlier measurements, oldest first; none where there is no such file.

    Raises:
        ValueError: a line is no JSON object.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:60]!r}; remove it, or give another file")
        found.append(row)
    return found


def chart(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A Vega-Lite drawing: a panel a network, a bar a mode, its spread as a line."""
    values = [
        {
            "training": f"{row['network']}, batch {row['batch']}",
            **{name: row[name] for name in ("mode", "images_per_second", "lowest", "highest")},
        }
        for row in measured
    ]
    mode = {"field": "mode", "type": "nominal", "sort": list(MODES), "title": None}
    layers = [
        {"mark": "bar", "encoding": {"x": {"field": "images_per_second", "type": "quantitative"}, "color": mode}},
        {"mark": "rule", "encoding": {"x": {"field": "lowest", "type": "quantitative"}, "x2": {"field": "highest"}}},
    ]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "data": {"values": values},
        "facet": {"row": {"field": "training", "type": "nominal", "title": None}},
        "spec": {"width": 400, "encoding": {"y": mode, "x": {"title": "images/s"}}, "layer": layers},
        "resolve": {"scale": {"x": "independent"}},
    }


def require_svg(path: Path) -> None:
    """Raises ValueError where a file's name does not say that it holds SVG."""
    if path.suffix.lower() != ".svg":
        raise ValueError(f"{path} is to hold a drawing, which is SVG; give a name that ends in .svg")


def draw(measured: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the chart as SVG, by vl-convert.

    Raises:
        ValueError: the file's name ends otherwise.
        ImportError: vl-convert-python is not installed.
    """
    require_svg(path)
    import vl_convert  # a large library of its own

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(vl_convert.vegalite_to_svg(chart(measured)), encoding="utf-8")
