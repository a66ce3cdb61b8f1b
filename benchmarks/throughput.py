"""Trainings as they are, their updates alone and their loaders alone, network by network: pictures a second.

    python benchmarks/throughput.py [--networks mobilefacenet iresnet50 ...] [--device cuda] [--updates-per-epoch 20]
        [--rounds 5] [--starts 1] [--data ../shared/data/celeba-mini | --data drawn]
        [--modes "whole job" "compute only"] [--plot throughput.svg] [-- options of train]

The whole job is `facefast train`: loader, log, a checkpoint and an epoch's end at every N updates. Compute only is its
update on batches that stay in memory. The three are processes of which two always stand still; ratios are formed within
a round. What is measured is in facefast/training/throughput.py, which `facefast bench` asks about other photographs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from record import RESULTS, record

from facefast.data.drawn import synthetic
from facefast.runtime import machine
from facefast.training import throughput

SHARED = Path(__file__).parents[2] / "shared/data/celeba-mini"


class Network(NamedTuple):
    """How a network is measured."""

    size: int
    """Pixels on a side."""
    cpu: int
    """Pictures of an update on a CPU."""
    cuda: int
    """Those on a GPU."""


NETWORKS = {
    "mobilefacenet": Network(112, 16, 512),
    "iresnet50": Network(112, 8, 512),
    "iresnet100": Network(112, 8, 256),
    "resnet50": Network(224, 8, 256),
    "timm/vit_small_patch16_224": Network(224, 8, 256),
}
DRAWN = synthetic.DrawnSpec(identities=(40, 0, 0))


def settings(given: argparse.Namespace, further: tuple[str, ...]) -> list[throughput.Setting]:
    """The trainings that a command line asks for."""
    found = []
    for name in given.networks:
        network = NETWORKS[name]
        batch = given.batch or getattr(network, given.device)
        found.append(throughput.Setting(name, given.size or network.size, batch, given.updates_per_epoch, further))
    return found


def arguments(words: list[str]) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """The command line, and what follows --."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--updates-per-epoch", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=1, help="how often all is started anew for so many rounds")
    parser.add_argument("--modes", nargs="+", choices=throughput.MODES, default=list(throughput.MODES))
    parser.add_argument("--batch", type=int, default=0, help="pictures of an update; 0 is each network's own")
    parser.add_argument("--size", type=int, default=0, help="pixels on a side; 0 is each network's own")
    parser.add_argument("--data", default=SHARED, help="a set that read_index knows, or drawn: faces drawn for this")
    parser.add_argument("--plot", type=Path, help="SVG of the rates, by vl-convert")
    own, further = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    return parser.parse_args(own), tuple(further)


def main() -> None:
    given, further = arguments(sys.argv[1:])
    earlier = throughput.read_rows(RESULTS / "throughput.jsonl")
    measured, verdicts = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = synthetic.write(Path(folder) / "drawn", DRAWN) if given.data == "drawn" else given.data
        for number, setting in enumerate(settings(given, further)):
            place = Path(folder) / str(number)
            how = (setting, root, place, given.device, given.rounds, given.modes)
            rates = throughput.measure(*how, told=print, starts=given.starts)
            rows = [record("throughput", **row) for row in throughput.rows(setting, rates, given.device)]
            own = machine.key(machine.machine())
            verdicts += [throughput.verdict(row, throughput.before(row, earlier, own)) for row in rows]
            measured += rows
            print(throughput.table(rows, verdicts[-len(rows) :]))
    if len(given.networks) > 1:
        print(f"\n{throughput.table(measured, verdicts)}")
    if given.plot:
        throughput.draw(measured, given.plot)


if __name__ == "__main__":
    main()
