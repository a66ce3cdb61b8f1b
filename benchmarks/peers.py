"""Whole trainings beside ours: the usual loaders with the usual loop, all in turns.

    python benchmarks/peers.py [--network mobilefacenet] [--device cuda] [--rounds 5] [--contenders NAME ...]
        [--data ../shared/data/celeba-mini | --data drawn]

Contenders are a loader and a loop each. Loaders: torchvision's v2 transforms in a DataLoader, DALI's stock operators,
FFCV where it is importable (`benchmarks/bench_input.py` has them), or one batch that stays in memory. Loops: forward,
cross entropy, backward, fused SGD, in autocast where ours is; every layer torch's own; eager, or compiled by
torch.compile; on a GPU also captured, the whole update as one CUDA graph over a batch that stays where it is, eager and
compiled. Beside them `facefast train` as it is, and its update on batches in memory. Losses have their peers,
Liger and quack among them, in `benchmarks/bench_focal.py`, heads in `benchmarks/bench_linear_focal.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_input import Way, stock, with_ffcv, with_torchvision
from libraries import missing
from record import record
from throughput import DRAWN, NETWORKS, SHARED
from torch import Tensor

from facefast.data import FaceIndex
from facefast.data.drawn import synthetic
from facefast.models import build_model
from facefast.models.fused import layer_by_layer
from facefast.models.precision import Precision
from facefast.recipe import ImageSpec, ModelConfig
from facefast.runtime import process
from facefast.runtime.turns import Entry, Rate, in_turns, ratio
from facefast.training import throughput

OURS = {"facefast": throughput.WHOLE, "facefast, in memory": throughput.COMPUTE}
LOADERS = ("torchvision", "DALI stock", "FFCV", "in memory")
LOOPS = ("eager", "compiled")
CAPTURED = {f"{loop} and captured": loop for loop in LOOPS}
"""Loops whose updates are replayed, and what is captured; of the loaders that are fast enough to show it."""
PEERS = tuple(f"{loader}, {loop}" for loader in LOADERS for loop in LOOPS) + tuple(
    f"{loader}, {loop}" for loader in ("DALI stock", "in memory") for loop in CAPTURED
)
WARM_UP = 3
"""Updates on the stream of a capture before it: momentum, cuDNN's choice of algorithms, what torch.compile compiles."""
UPDATES = 20
EVERY = 10
"""Updates between two lines of a peer."""


def images(loader: str, way: Way, folder: Path) -> Iterator[Tensor]:
    """Batches [B, 3, H, W] without end."""
    if loader == "torchvision":
        return with_torchvision(way, pil=False)
    if loader == "DALI stock":
        return stock(way, region=False)
    if loader == "FFCV":
        return with_ffcv(way, folder)
    return itertools.repeat(torch.randn(way.batch, 3, *way.image.shape, device=way.device))


def train(peer: str, network: str, way: Way, folder: Path) -> None:
    """A peer's training; prints a line every `EVERY` updates and does not end."""
    loader, _, loop = peer.rpartition(", ")
    device = torch.device(way.device)
    precision = Precision.choose("auto", network, True, device)
    # The same network with the same head; its cosines go straight into cross entropy.
    model = build_model(ModelConfig(backbone=network, head="cosine"), way.index.num_classes, way.image)
    model = model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    forward = torch.compile(model) if CAPTURED.get(loop, loop) == "compiled" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
    labels = torch.arange(way.batch, device=device) % way.index.num_classes

    def update(batch: Tensor) -> Tensor:
        # The region ends within the update: a graph makes its own casts of the weights.
        with layer_by_layer(), precision.autocast(device):
            logits = forward(batch)
        loss = F.cross_entropy(24 * logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    run: Callable[[Tensor], Tensor] = update
    for done, images_ in enumerate(images(loader, way, folder), 1):
        batch = images_.contiguous(memory_format=torch.channels_last)
        if loop in CAPTURED and done == 1:
            run = captured(update, batch)
        loss = run(batch)
        if done % EVERY == 0:
            print(json.dumps({"done": done, "loss": loss.item()}), flush=True)


def captured(update: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """An update as one CUDA graph, which copies each batch to where it was captured.

    What it gives is written over by the next one.

    Args:
        update: one that works on the device alone, whose gradients are None when it begins.
        example: a batch; all others have its shape.
    """
    held, stream = example.clone(memory_format=torch.preserve_format), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            update(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A loader's threads may ask CUDA for memory meanwhile: only this one is bound to what may be captured.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        loss = update(held)

    def replay(batch: Tensor) -> Tensor:
        held.copy_(batch)
        graph.replay()
        return loss

    return replay


def left_out(device: str) -> dict[str, str]:
    """Peers that cannot run here, and why."""
    found = {name: "not importable here" for name in PEERS if name.startswith("FFCV") and missing("FFCV")}
    if device != "cuda":
        found |= {name: "needs a GPU" for name in PEERS if name.rpartition(", ")[2] in CAPTURED}
    return found


def main() -> None:
    given = arguments(sys.argv[1:])
    network = NETWORKS[given.network]
    batch, size = given.batch or getattr(network, given.device), given.size or network.size
    if given.child:
        with process.start(given.device):
            way = Way(FaceIndex.load(given.index), ImageSpec(size), given.device, batch, given.threads)
            train(given.child, given.network, way, Path(given.index).parent)
    setting = throughput.Setting(given.network, size, batch, UPDATES)
    without = left_out(given.device)
    with tempfile.TemporaryDirectory() as folder:
        root = synthetic.write(Path(folder) / "drawn", DRAWN) if given.data == "drawn" else given.data
        ours = throughput.entries(setting, root, Path(folder), given.device)
        index = Path(folder) / "index.npz"
        entries = {name: ours[mode] for name, mode in OURS.items() if name in given.contenders}
        own = ["--network", given.network, "--device", given.device, "--threads", str(given.threads)]
        own += ["--batch", str(batch), "--size", str(size), "--index", str(index)]
        environment = {"CUDA_VISIBLE_DEVICES": ""} if given.device == "cpu" else None
        for name in given.contenders:
            if name in PEERS and name not in without:
                command = [sys.executable, __file__, *own, "--child", name]
                entries[name] = Entry(command, 2, 1, UPDATES // EVERY, EVERY * batch, environment)
        rates = in_turns(entries, given.rounds, told=print)
    report(setting, given.device, rates, {name: why for name, why in without.items() if name in given.contenders})


def report(setting: throughput.Setting, device: str, rates: dict[str, list[float]], without: dict[str, str]) -> None:
    """Prints the table and records its rows; the ratio is how many times as fast as a contender our whole job is, or
    our update alone where the contender's pictures are in memory."""
    print(f"\n{setting.network}, {setting.size} px, batch {setting.batch} on {device}")
    print(f"{'':34}{'images/s':>10}{'lowest':>9}{'highest':>9}{'facefast is':>13}")
    for name, values in rates.items():
        rate = Rate.of(values)
        ours = rates.get("facefast, in memory" if "in memory" in name else "facefast")
        times = None if ours is None else ratio(ours, values)
        shown = "-" if times is None else f"{times:.2f}x"
        print(f"{name:34}{rate.median:10.1f}{rate.lowest:9.1f}{rate.highest:9.1f}{shown:>13}")
        record(
            "peers",
            contender=name,
            network=setting.network,
            size=setting.size,
            batch=setting.batch,
            updates_per_epoch=setting.updates_per_epoch,
            device=device,
            images_per_second=round(rate.median, 1),
            lowest=round(rate.lowest, 1),
            highest=round(rate.highest, 1),
            rounds=rate.rounds,
            facefast_ratio=None if times is None else round(times, 3),
        )
    for name, why in sorted(without.items()):
        print(f"{name:34}not run: {why}")


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="mobilefacenet")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=(*OURS, *PEERS), default=[*OURS, *PEERS])
    parser.add_argument("--batch", type=int, default=0, help="pictures of an update; 0 is the network's own")
    parser.add_argument("--size", type=int, default=0, help="pixels on a side; 0 is the network's own")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="decoding threads or workers")
    parser.add_argument("--data", default=SHARED, help="a set that read_index knows, or drawn: faces drawn for this")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--index", help=argparse.SUPPRESS)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
