"""What averaging the gradients costs an update, by the size of DDP's buckets and by the numbers' width on the wire.

    python benchmarks/bench_allreduce.py [--ranks 2 --network mobilefacenet --batch 8 --classes 10177 --rounds 5]
        [--buckets 1 5 25 100] [--hooks none bf16 fp16]

Forward and backward of a network with a cosine head in DistributedDataParallel on gloo, each rank with one thread. bf16
and fp16 are torch's communication hooks, which halve what is sent; `alone` is the same without any exchange. Contenders
take turns within a round. Of each hook it is also said how far its averaged gradient lies from that of float32: the
norm of the difference over the norm.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from record import record
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from facefast.models import build_model
from facefast.recipe import ImageSpec, ModelConfig

HOOKS = {"none": None, "bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
ALONE = "alone"
USUAL = ("none", 25)
"""torch's own: the contender that the others are compared with."""
WARM = 2
"""Updates before the timed ones: DDP orders its buckets anew after the first."""
SIZE = 112


def rank_main(rank: int, given: argparse.Namespace, answers: Any) -> None:
    """One rank; rank 0 answers seconds by contender, distances by hook and MiB of parameters."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(given.port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=given.ranks)
    torch.manual_seed(0)
    config = ModelConfig(backbone=given.network, head="cosine")
    model = build_model(config, given.classes, ImageSpec(size=given.size)).train()
    torch.manual_seed(rank)
    images, labels = torch.randn(given.batch, 3, given.size, given.size), torch.randint(given.classes, (given.batch,))
    contenders = [(hook, bucket) for hook in given.hooks for bucket in given.buckets]
    seconds: dict[tuple[str, int], list[float]] = {(ALONE, 0): [], **{contender: [] for contender in contenders}}
    gradients: dict[str, Tensor] = {}
    for _ in range(given.rounds):
        for (hook, bucket), times in seconds.items():
            network = wrapped(model, hook, bucket)
            for number in range(WARM + given.updates):
                dist.barrier()
                start = time.perf_counter()
                update(network, images, labels, exchange=hook != ALONE)
                dist.barrier()  # the slowest rank's time
                if number >= WARM:
                    times.append(time.perf_counter() - start)
            if hook not in (*gradients, ALONE):
                gradients[hook] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    if rank == 0:
        exact = gradients.get("none")
        apart = {h: float((g - exact).norm() / exact.norm()) for h, g in gradients.items() if exact is not None}
        answers.put((seconds, apart, sum(p.numel() for p in model.parameters()) * 4 / 2**20))
    dist.barrier()
    dist.destroy_process_group()


def wrapped(model: nn.Module, hook: str, bucket: int) -> DistributedDataParallel:
    """The model in DDP, which sends as the hook says, in buckets of so many MiB."""
    network = DistributedDataParallel(
        model, bucket_cap_mb=bucket or USUAL[1], gradient_as_bucket_view=True, broadcast_buffers=False
    )
    if (chosen := HOOKS.get(hook)) is not None:
        network.register_comm_hook(None, chosen)
    return network


def update(network: DistributedDataParallel, images: Tensor, labels: Tensor, *, exchange: bool) -> None:
    """Forward and backward; gradients begin as none."""
    network.zero_grad(set_to_none=True)
    with contextlib.nullcontext() if exchange else network.no_sync():
        F.cross_entropy(24 * network(images), labels).backward()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--network", default="mobilefacenet")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--batch", type=int, default=8, help="pictures on each rank")
    parser.add_argument("--classes", type=int, default=10177)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=3, help="timed updates of a turn")
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 5, 25, 100], help="MiB")
    parser.add_argument("--hooks", nargs="+", choices=HOOKS, default=list(HOOKS))
    given = parser.parse_args()
    given.port = free_port()
    context = mp.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, given, answers)) for rank in range(given.ranks)]
    for process in ranks:
        process.start()
    seconds, apart, size = answers.get()
    for process in ranks:
        process.join()
    report(given, seconds, apart, size)


def report(
    given: argparse.Namespace, seconds: dict[tuple[str, int], list[float]], apart: dict[str, float], size: float
) -> None:
    """Prints a table and records its rows."""
    usual = seconds.get(USUAL)
    print(f"\n{given.network}, {given.classes} classes: {size:.1f} MiB of gradients, {given.ranks} ranks on gloo")
    print(f"{'':6}{'bucket':>8}{'ms':>10}{'lowest':>10}{'highest':>10}{'of torch own':>14}{'gradient apart':>16}")
    for (hook, bucket), times in seconds.items():
        median = statistics.median(times)
        times_usual = None if usual is None else statistics.median(a / b for a, b in zip(times, usual, strict=True))
        shown = "-" if times_usual is None else f"{times_usual:.3f}"
        distance = apart.get(hook)
        print(
            f"{hook:6}{bucket or '-':>8}{1e3 * median:10.1f}{1e3 * min(times):10.1f}{1e3 * max(times):10.1f}"
            f"{shown:>14}{'-' if distance is None else format(distance, '.1e'):>16}"
        )
        record(
            "allreduce",
            contender=hook,
            bucket_mebibytes=bucket or None,
            network=given.network,
            classes=given.classes,
            batch=given.batch,
            ranks=given.ranks,
            backend="gloo",
            gradient_mebibytes=round(size, 1),
            milliseconds=round(1e3 * median, 2),
            lowest=round(1e3 * min(times), 2),
            highest=round(1e3 * max(times), 2),
            rounds=given.rounds,
            ratio_to_usual=None if times_usual is None else round(times_usual, 3),
            gradient_apart=None if distance is None else float(f"{distance:.2e}"),
        )


if __name__ == "__main__":
    main()
