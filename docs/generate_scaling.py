"""Writes docs/scaling.md, what 8 to 1024 GPUs would do by what one did: python docs/generate_scaling.py"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from facefast.models.backbones import build_backbone

PAGE = Path(__file__).parent / "scaling.md"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8
"""GPUs of a machine."""
NVLINK = 450e9
"""Bytes a second, one way, of an H100's NVLink."""
USED = 0.8
"""Part of a link's rate that an all-reduce reaches."""
STEP = 20e-6
"""Seconds of one step of an all-reduce beside its bytes."""
BACKWARD = 2 / 3
"""Part of an update in which gradients become ready and can be sent."""
BUCKET = 25 * 2**20
"""Bytes of DDP's last bucket, which nothing is left to hide."""
DISK, OPENS = 40e9, 100_000
"""Bytes and files a second of a shared file system."""
MEMORY = 1e12
"""Bytes of a machine that its page cache may take."""
CLASSES = 10_177
MLCOMMONS = "https://raw.githubusercontent.com/mlcommons"


class Training(NamedTuple):
    """What one H100 showed."""

    name: str
    backbone: str
    size: int
    batch: int
    rate: float
    """Pictures a second of updates alone."""
    loader: float
    """Those of the loader alone, 8 threads, on the same GPU."""
    bytes: float
    """Of a JPEG."""

    @property
    def update(self) -> float:
        """Seconds of an update without any exchange."""
        return self.batch / self.rate


TRAININGS = (
    Training("MobileFaceNet, 112 px, batch 64 a GPU", "mobilefacenet", 112, 64, 13_187, 22_300, 12e3),
    Training("IResNet-50, 112 px, batch 512 a GPU", "iresnet50", 112, 512, 7_249, 22_300, 12e3),
    Training("ResNet-50, 224 px, batch 256 a GPU", "resnet50", 224, 256, 5_765, 14_800, 58e3),
)


class Network(NamedTuple):
    """What connects machines."""

    name: str
    per_gpu: float
    """Bytes a second, one way, for each GPU."""


FABRICS = (Network("400 Gb/s a GPU", 50e9), Network("100 Gb/s a machine", 12.5e9 / NODE))


@functools.cache
def gradient_bytes(backbone: str, size: int, classes: int) -> int:
    """Of a backbone and a head for so many classes, float32."""
    built = build_backbone(backbone, (size, size))
    return 4 * (sum(p.numel() for p in built.module.parameters()) + built.size * classes)


def allreduce(num_bytes: float, gpus: int, fabric: Network) -> float:
    """Seconds to sum so many bytes over all GPUs: scattered within a machine, summed across machines by as many GPUs
    at once, gathered again."""
    inside = min(gpus, NODE)
    machines = gpus // inside
    within = 2 * (inside - 1) / inside * num_bytes / (USED * NVLINK)
    across = 2 * (machines - 1) / machines * (num_bytes / inside) / (USED * fabric.per_gpu)
    return within + across + 2 * math.log2(gpus) * STEP


def exposed(training: Training, num_bytes: float, gpus: int, fabric: Network) -> float:
    """Seconds of an all-reduce that the backward pass does not hide."""
    whole = allreduce(num_bytes, gpus, fabric)
    return max(whole * min(1.0, BUCKET / num_bytes), whole - BACKWARD * training.update)


def ceilings(training: Training, gpus: int, fabric: Network, kept: str) -> dict[str, float]:
    """Pictures a second that each part would allow if there were nothing else.

    Args:
        kept: loose files or shards on a shared file system, or in the machines' memory.
    """
    gradients = gradient_bytes(training.backbone, training.size, CLASSES)
    found = {
        "compute": gpus * training.rate,
        "input": gpus * training.loader,
        "all-reduce": gpus * training.batch / allreduce(gradients, gpus, fabric),
    }
    if kept != "memory":
        found["bytes read"] = DISK / training.bytes
    if kept == "files":
        found["files opened"] = OPENS
    return found


def first(training: Training, gpus: int, fabric: Network, kept: str) -> str:
    """What would hold the training back first."""
    found = ceilings(training, gpus, fabric, kept)
    return min(found, key=lambda name: found[name])


def predicted(training: Training, gpus: int, fabric: Network, kept: str) -> float:
    """Pictures a second of all GPUs."""
    gradients = gradient_bytes(training.backbone, training.size, CLASSES)
    found = ceilings(training, gpus, fabric, kept)
    found["compute"] *= training.update / (training.update + exposed(training, gradients, gpus, fabric))
    return min(found.values())


BEGINNING = f"""# Scaling: what 8 to {SIZES[-1]} GPUs would do

Computed by `python docs/generate_scaling.py` from what one H100 showed; nobody has measured it on more than one. The
batch on each GPU stays what it was, so that a thousand GPUs take a thousand times the pictures an update: whether that
still learns is another question.

## What goes in

| number | value | where it is from |
|---|---|---|
| updates alone | 13 187, 7249, 5765 images/s | measured: one H100 SXM, bf16, channels-last, the compiled loop \
(MobileFaceNet also captured as a graph), commit 38a4e01 |
| loader alone | 22 300 (112 px, 12 KB), 14 800 (224 px, 58 KB) images/s | measured: the same, DALI on the GPU, \
8 threads; a machine of 8 GPUs with 112 cores has 14 for each |
| NVLink | 450 GB/s one way | [900 GB/s both ways]({MLCOMMONS}/inference_results_v4.1/main/closed/NVIDIA/systems/\
H200-SXM-141GBx8_TRT_MaxQ.json), 18 links of the 4th generation: the description of a machine with the same links, and \
with 2 x 56 cores and 2 TB |
| between machines | 50 GB/s a GPU, or 12.5 GB/s a machine | [8 x 400 Gb/s InfiniBand]({MLCOMMONS}/\
inference_results_v3.1/main/closed/Dell/systems/XE9680_H100_SXM_80GBx8_TRT.json), or one Ethernet of 100 Gb/s |
| part of a link that is reached | {USED:.0%} | assumed |
| a step of an all-reduce | {STEP * 1e6:.0f} us | assumed |
| gradients | 4 bytes a parameter | counted: backbone, and a head of {CLASSES:,} classes on every GPU |
| shared file system | {DISK / 1e9:.0f} GB/s, {OPENS:,} files opened a second | assumed; \
`facefast doctor --data.root DIR` measures yours |
| page cache | {MEMORY / 1e12:.0f} TB a machine | assumed: half of its memory |

An update of b pictures takes b / rate. An all-reduce of P bytes over N GPUs, g = {NODE} a machine, m = N / g machines:
2 (g - 1) / g P / NVLink within the machine, 2 (m - 1) / m (P / g) / network across, and 2 log2 N steps. DDP sends while
the backward pass goes on, two thirds of an update; what is longer than that, and the last bucket of 25 MiB in any case,
is waited for. A part's ceiling is what it would allow if there were nothing else; the lowest is the first bottleneck.
Loose files are opened one by one, shards (`train.rec`, tar) are read through; a set that fits the page cache is read
once, in the first epoch: {MEMORY / 12e3 / 1e6:.0f} million pictures of 12 KB do.
"""

ENDING = """## What follows

Numbers in threes are of the trainings above, in their order.

- **Loose files are the first thing to go**: {OPENS:,} files opened a second feed {files} GPUs. Use shards, or a set
  that fits the page cache (the first epoch pays), or copy it to each machine's disk.
- **Bytes are next**: {DISK} GB/s feed {bytes} GPUs. Faces cut out once (`facefast align --crops`) are a fraction of a
  photograph.
- **Decoding needs cores**: with 8 threads a GPU the loader alone is {ahead} times as fast as updates. It works on the
  same GPU, which is not in these tables: one H100 ran 88 to 96 % of compute only as a whole job.
- **The network hides behind the backward pass at 400 Gb/s a GPU.** At 100 Gb/s a machine, 1024 GPUs wait for it during
  {waits} of an update: there halve what is sent (bf16, below), or raise the batch on each GPU.
- **A head on every GPU grows with its classes**:
  {heads}.
  `--model.shard-head ranks` sends embeddings instead: {shared}.
- **Whether to send gradients in bf16**: DDP's hook halves the bytes, so it halves what is waited for where the network
  is the bottleneck, and changes nothing where it hides. `benchmarks/bench_allreduce.py` measures it, and the size of
  buckets, on gloo: [benchmarks.md](benchmarks.md#averaging-gradients-ddps-buckets-and-hooks).
- What a single GPU did as a whole job, eager, is less than what this page begins with: IResNet-50 4674 and ResNet-50
  3536 to 3715 images/s. All tables scale with that number; a slower GPU meets every bottleneck later.
"""


def lines() -> Iterator[str]:
    """The page, in lines."""
    yield BEGINNING
    for training in TRAININGS:
        gradients = gradient_bytes(training.backbone, training.size, CLASSES)
        yield f"## {training.name}\n"
        yield f"{training.update * 1e3:.1f} ms an update, {gradients / 1e6:.0f} MB of gradients.\n"
        yield (
            "| GPUs | compute, images/s | loader's ceiling | reads, GB/s | all-reduce, ms (waited for) at "
            + " | ".join(fabric.name for fabric in FABRICS)
            + " | first bottleneck: loose files | shards | in memory | in memory, "
            + f"{FABRICS[1].name} | predicted from memory, images/s at "
            + " | ".join(fabric.name for fabric in FABRICS)
            + " |"
        )
        yield "|---" * 12 + "|"
        for gpus in SIZES:
            sent = [
                f"{allreduce(gradients, gpus, f) * 1e3:.2f} ({exposed(training, gradients, gpus, f) * 1e3:.2f})"
                for f in FABRICS
            ]
            names = [first(training, gpus, FABRICS[0], kept) for kept in ("files", "shards", "memory")]
            names.append(first(training, gpus, FABRICS[1], "memory"))
            rates = [f"{predicted(training, gpus, f, 'memory'):,.0f}" for f in FABRICS]
            yield (
                f"| {gpus} | {gpus * training.rate:,.0f} | {gpus * training.loader:,.0f} | "
                f"{gpus * training.rate * training.bytes / 1e9:.1f} | {' | '.join([*sent, *names, *rates])} |"
            )
        yield ""
    middle = TRAININGS[1]
    gpus, dim = 64, 512
    heads = ",\n  ".join(
        f"{count:,} classes of {dim} numbers are {4 * dim * count / 1e6:,.0f} MB of gradients, "
        f"{allreduce(4 * dim * count, gpus, FABRICS[0]) * 1e3:.1f} ms on {gpus} GPUs"
        for count in (10_177, 100_000, 1_000_000)
    )
    gathered = 4 * dim * middle.batch * gpus
    yield ENDING.format(
        OPENS=OPENS,
        DISK=f"{DISK / 1e9:.0f}",
        files=told(f"{OPENS / t.rate:.0f}" for t in TRAININGS),
        bytes=told(f"{DISK / t.bytes / t.rate:.0f}" for t in TRAININGS),
        ahead=told(f"{t.loader / t.rate:.1f}" for t in TRAININGS),
        waits=told(f"{waited(t, SIZES[-1], FABRICS[1]):.0%}" for t in TRAININGS),
        heads=heads,
        shared=f"{gathered / 1e6:.0f} MB at batch {middle.batch} on {gpus} GPUs, whatever the number of classes",
    )


def waited(training: Training, gpus: int, fabric: Network) -> float:
    """The part of an update that an all-reduce adds to it."""
    seconds = exposed(training, gradient_bytes(training.backbone, training.size, CLASSES), gpus, fabric)
    return seconds / (training.update + seconds)


def told(values: Iterable[str]) -> str:
    """One value for each of `TRAININGS`, in words."""
    *others, last = values
    return f"{', '.join(others)} and {last}"


def page() -> str:
    """The whole of docs/scaling.md."""
    return "\n".join(lines())


if __name__ == "__main__":
    PAGE.write_text(page())
