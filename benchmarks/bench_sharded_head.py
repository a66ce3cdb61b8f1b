"""A head whose classes lie on several ranks: time and memory of an update of it, beside peers in the same run.

    python benchmarks/bench_sharded_head.py [--ranks 2 --classes 100000 1000000 --dim 128 --rows 64 --rounds 5]

Embeddings x [N, D] of each rank and directions [C, D] to the ArcFace loss, both gradients and SGD with momentum, on
gloo. Contenders:
  whole      every rank has all classes; gradients of the directions are averaged (what DistributedDataParallel does)
  partialfc  the classes divided, in plain torch, as public code has it: cosines of the block in memory, softmax by
             all-reduces of greatest, sum and own probability (InsightFace's partial_fc_v2)
  facefast   the classes divided, sharded_focal_loss: no cosines in memory
  tenth      the same with a tenth of the classes drawn in each update
Each contender has its own processes. Memory is of the rank with most, in two ways: the greatest resident set beyond
that of the same process after an update of 64 classes, which brings into memory what a first one does at any number of
classes (some 120 MiB); and the bytes of tensors: weights, their gradient and momenta, and what else an update allocates
at most.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from record import record
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from facefast.data import Batch
from facefast.models.heads import CosineHead
from facefast.ops import Arc, class_block, gather, linear_focal_loss
from facefast.training.drawn import DrawnRows

MARGIN, SCALE = 0.3, 32.0
CONTENDERS = ("whole", "partialfc", "facefast", "tenth")


def whole(head: CosineHead, x: Tensor, y: Tensor) -> None:
    """All classes on every rank."""
    loss = linear_focal_loss(x, head.weight, y, normalize=True, gamma=0.0, margin=Arc(MARGIN), scale=SCALE)
    loss.backward()
    assert head.weight.grad is not None
    dist.all_reduce(head.weight.grad)
    head.weight.grad /= dist.get_world_size()


def partialfc(head: CosineHead, x: Tensor, y: Tensor) -> None:
    """A block of the classes, cosines and probabilities of all ranks' rows in memory."""
    rows, labels = gather(x.detach()).requires_grad_(), gather(y)
    cosines = F.linear(F.normalize(rows), F.normalize(head.weight)).clamp(-1, 1)
    place = labels - head.block.start
    mine = ((place >= 0) & (place < len(head.block))).nonzero()[:, 0]
    with torch.no_grad():
        logits = cosines.clone()
        logits[mine, place[mine]] = (cosines[mine, place[mine]].arccos() + MARGIN).cos()
        logits *= SCALE
        peak = logits.amax(1, keepdim=True)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        logits.sub_(peak).exp_()
        mass = logits.sum(1, keepdim=True)
        dist.all_reduce(mass)
        logits.div_(mass)
        own = logits.new_zeros(len(labels))
        own[mine] = logits[mine, place[mine]]
        dist.all_reduce(own)  # the loss that is logged
        logits[mine, place[mine]] -= 1
        logits *= SCALE / len(labels)
    cosines.backward(logits)
    part = torch.empty_like(x)
    dist.reduce_scatter_tensor(part, rows.grad)
    x.grad = part


def sharded(head: CosineHead, x: Tensor, y: Tensor) -> None:
    """A block of the classes, nothing of their number's size but weights, gradients and momenta."""
    options = {"gamma": 0.0, "margin": Arc(MARGIN), "scale": SCALE, "reduction": "mean"}
    head.loss(x, y, **options).loss.backward()


def resident(word: str) -> int:
    """KiB of this process by a word of /proc/self/status: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(word)).split()[1])


def rank_main(rank: int, given: argparse.Namespace, contender: str, classes: int, answers: Any) -> None:
    """One rank of one contender."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(given.port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=given.ranks)
    x = torch.randn(given.rows, given.dim, generator=torch.Generator().manual_seed(rank))
    y = torch.randint(classes, (given.rows,), generator=torch.Generator().manual_seed(rank))
    linear_focal_loss(x, x, torch.zeros_like(y)).item()  # kernels and libraries are loaded before
    Learner(contender, given, rank, 64).update(x, y % 64, 0)
    before = resident("VmRSS")
    learner, seconds = Learner(contender, given, rank, classes), []
    for number in range(given.rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        learner.update(x, y, number)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    grown = (resident("VmHWM") - before) / 2**10
    answers.put((seconds[1:], {"resident": grown} | learner.tensors(x, y)))  # the first update makes the momenta
    dist.barrier()
    dist.destroy_process_group()


class Learner:
    """A contender's weights and their optimiser on one rank."""

    def __init__(self, contender: str, given: argparse.Namespace, rank: int, classes: int) -> None:
        block = None if contender == "whole" else class_block(classes, given.ranks, rank)
        self.head = CosineHead(given.dim, classes, block)
        self.optimizer = torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9, fused=True)
        self.run: Callable[..., None] = {"whole": whole, "partialfc": partialfc}.get(contender, sharded)
        self.part = 0.1 if contender == "tenth" else 1.0
        self.gradient = 0  # bytes

    def update(self, x: Tensor, y: Tensor, number: int) -> None:
        """One update."""
        x, drawn = x.detach().requires_grad_(), None
        if self.part < 1:
            drawn = DrawnRows(self.head, self.optimizer, [Batch(x, y, y)], self.part, number)
        self.run(self.head, x, y)
        assert self.head.weight.grad is not None
        self.gradient = self.head.weight.grad.nbytes
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if drawn is not None:
            drawn.put_back()

    def tensors(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """MiB of tensors in an update, by torch's own account of what it allocates."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
            self.update(x, y, 1000)
        assert found.profiler is not None and found.profiler.kineto_results is not None
        events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
        changes = (each.nbytes() for each in sorted(events, key=lambda each: each.start_ns()))
        most = max(itertools.accumulate(changes))  # beyond what lies there between updates
        slots = self.optimizer.state[self.head.weight].values()
        parts = {
            "weights": self.head.weight.nbytes,
            "gradient": self.gradient,
            "momenta": sum(value.nbytes for value in slots if isinstance(value, Tensor)),
        }
        parts["workspace"] = most - parts["gradient"]
        return {name: value / 2**20 for name, value in parts.items()}


def measure(given: argparse.Namespace, contender: str, classes: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of each update, and MiB of the rank with most: of its resident set, and of its tensors by kind."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(rank, given, contender, classes, answers))
        for rank in range(given.ranks)
    ]
    for process in ranks:
        process.start()
    found = [answers.get() for _ in ranks]
    for process in ranks:
        process.join()
    slowest = [max(times) for times in zip(*(seconds for seconds, _ in found), strict=True)]
    memories = [memory for _, memory in found]
    largest = max(memories, key=tensor_bytes)
    return slowest, largest | {"resident": max(memory["resident"] for memory in memories)}


def tensor_bytes(memory: dict[str, float]) -> float:
    """MiB of tensors of all kinds."""
    return sum(value for name, value in memory.items() if name != "resident")


def main() -> None:
    """Every contender at every number of classes, a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--classes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rows", type=int, default=64, help="of each rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=29517)
    given = parser.parse_args()
    for classes in given.classes:
        rows = {}
        for contender in CONTENDERS:
            given.port += 1
            rows[contender] = measure(given, contender, classes)
        for contender, (seconds, memory) in rows.items():
            line = record(
                "sharded_head",
                contender=contender,
                ranks=given.ranks,
                classes=classes,
                dim=given.dim,
                rows=given.rows,
                milliseconds=round(1e3 * statistics.median(seconds), 2),
                lowest=round(1e3 * min(seconds), 2),
                highest=round(1e3 * max(seconds), 2),
                rounds=given.rounds,
                mebibytes=round(memory["resident"], 1),
                of_whole=round(memory["resident"] / rows["whole"][1]["resident"], 3),
                tensor_mebibytes={name: round(value, 2) for name, value in memory.items() if name != "resident"},
                tensors_of_whole=round(tensor_bytes(memory) / tensor_bytes(rows["whole"][1]), 3),
            )
            shown = ("contender", "classes", "milliseconds", "mebibytes", "of_whole")
            print({k: line[k] for k in (*shown, "tensor_mebibytes", "tensors_of_whole")}, flush=True)


if __name__ == "__main__":
    main()
