"""How fast this machine trains on photographs of yours: `facefast bench`.

A training as it is, its updates alone and its loader alone take turns, so that their ratios hold on a machine that is
not quite free. What follows `--` are further options of train.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from facefast import __version__
from facefast.data.drawn import synthetic
from facefast.models import build_model
from facefast.recipe import ImageSpec, ModelConfig
from facefast.recipe.options import parse
from facefast.recipe.ranges import MOST, require
from facefast.runtime import exits, files, machine
from facefast.runtime.terminal import say, speaking, tell
from facefast.runtime.turns import ContenderError
from facefast.training import throughput

OTHER = "choose another --{}, or make room"
"""What to do where an output cannot be written."""
DRAWN = synthetic.DrawnSpec(identities=(40, 0, 0))


@dataclass(frozen=True)
class Place:
    """Where the photographs are."""

    root: str = ""
    """Folder of photographs; without it faces are drawn."""


@dataclass(frozen=True)
class Network:
    """What is trained."""

    backbone: str = "mobilefacenet"
    """A network, as train has them."""


@dataclass(frozen=True)
class Pictures:
    """What it sees."""

    size: int = 0
    """Pixels on a side; 0 is the usual one."""


@dataclass(frozen=True)
class BenchArguments:
    """Flags of `facefast.bench`."""

    data: Place = field(default_factory=Place)
    model: Network = field(default_factory=Network)
    image: Pictures = field(default_factory=Pictures)
    batch_size: int = 0
    """Pictures of an update; 0 is 256 on a GPU and 16 on a CPU."""
    updates_per_epoch: int = 20
    """Updates between two ends of an epoch, where a checkpoint is written."""
    rounds: int = 5
    """Turns of each of the three."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    rows: Path = Path("runs/bench.jsonl")
    """File that the measured rows go to, and that holds those of before."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="SVG")] = None
    """Drawing of the rates, by vl-convert."""
    json: bool = False
    """Print the rows as JSON and nothing else."""

    def __post_init__(self) -> None:
        require(self, batch_size=(0, MOST), updates_per_epoch=(1, MOST), rounds=(1, MOST))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        words = sys.argv[1:] if arguments is None else arguments
        own, further = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
        given = parse(BenchArguments, own, "bench")
        with speaking("json" if given.json else "words"):
            rows, verdicts = measured(given, tuple(further))
        if given.json:
            say(json.dumps(rows, indent=2))
        else:
            say(throughput.table(rows, verdicts))
    return outcome.code


def _require_network(given: BenchArguments) -> None:
    """Raises ValueError where there is no such network, or none of such pictures, before faces are drawn for it."""
    with torch.device("meta"):
        build_model(ModelConfig(backbone=given.model.backbone), 0, ImageSpec(size=given.image.size))


def measured(given: BenchArguments, further: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, written down, and what they are beside the last ones of such a machine.

    Raises:
        ValueError: there is no such device, or a training cannot be begun: its own words say why.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU here; use --device cpu")
    setting = throughput.Setting(
        given.model.backbone,
        given.image.size,
        given.batch_size or (256 if device == "cuda" else 16),
        given.updates_per_epoch,
        further,
    )
    _require_network(given)
    files.require_writable(given.rows, advice=OTHER.format("rows"))
    if given.plot is not None:
        throughput.require_svg(given.plot)
        files.require_writable(given.plot, advice=OTHER.format("plot"))
    earlier = throughput.read_rows(given.rows)
    with tempfile.TemporaryDirectory() as folder:
        root = given.data.root or str(synthetic.write(Path(folder) / "drawn", DRAWN))
        try:
            rates = throughput.measure(setting, root, Path(folder) / "run", device, given.rounds, told=tell)
        except ContenderError as error:
            raise ValueError(str(error)) from error
    facts: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "facefast": __version__,
        "machine": machine.machine(),
        "versions": machine.versions(),
    }
    rows = [row | facts for row in throughput.rows(setting, rates, device)]
    own = machine.key(facts["machine"])
    verdicts = [throughput.verdict(row, throughput.before(row, earlier, own)) for row in rows]
    with files.storing(given.rows, advice=OTHER.format("rows"), what="the rows "):
        given.rows.parent.mkdir(parents=True, exist_ok=True)
        with open(given.rows, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    if given.plot is not None:
        try:
            throughput.draw(rows, given.plot)
        except ImportError:
            tell(f"note: {given.plot} is not drawn: vl-convert-python is not installed")
    return rows, verdicts


if __name__ == "__main__":
    sys.exit(main())
