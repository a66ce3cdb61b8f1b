"""Photographs to embeddings, on all ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import Batch, FaceIndex, make_loader
from facefast.data.prepare import Locate, read_photographs
from facefast.models import FaceModel, checkpoint
from facefast.models.folded import folded
from facefast.models.precision import Precision
from facefast.recipe import Photographs, Reading
from facefast.runtime.exits import NumericsError
from facefast.runtime.process import Runtime, decode_threads

PART = 16
"""Pictures for each thread of a CPU in one forward pass."""
Mirror = Literal["mean", "joined", "none"]
"""What becomes of the embeddings of a picture and of its mirror image: their mean, one behind the other, or the
picture's alone."""
Embed = Callable[[FaceIndex], tuple[Tensor, Tensor]]
"""An index to embeddings [N, D] of any length, and [N] whether a row could be read."""


def remembering(embed: Embed) -> Embed:
    """The same, which embeds every index once."""
    kept: dict[int, tuple[FaceIndex, tuple[Tensor, Tensor]]] = {}

    def again(index: FaceIndex) -> tuple[Tensor, Tensor]:
        if id(index) not in kept:
            kept[id(index)] = index, embed(index)  # the index too, or another could take its place in memory
        return kept[id(index)][1]

    return again


def single(embeddings: Tensor, size: int) -> Tensor:
    """[N, size] of [N, size] or of joined ones [N, 2 size], whose halves' mean a head knows.

    Args:
        embeddings: of `embed_rows`.
        size: numbers of the model's embedding.
    """
    return embeddings if embeddings.shape[1] == size else embeddings.unflatten(1, (2, size)).mean(1)


def embed_rows(
    model: FaceModel,
    index: FaceIndex,
    run: Runtime,
    precision: Precision,
    reading: Reading,
    *,
    batch_size: int,
    mirror: Mirror = "mean",
) -> tuple[Tensor, Tensor]:
    """Embeddings of every readable row, the same on every rank.

    Returns:
        [N, D] float32 on the CPU, before normalisation, the mean of picture and mirror image, [N, 2D] where both are
        `joined`; and [N] bool, False for rows that could not be read.

    Raises:
        NumericsError: an embedding is not finite.
    """
    found: Tensor | None = None
    seen = torch.zeros(len(index))
    batch_size = min(batch_size, math.ceil(len(index) / run.world.size))  # what few pictures cannot fill is padded
    model.eval()
    with (
        torch.inference_mode(),
        precision.autocast(run.device),
        make_loader(
            index,
            model.image,
            batch_size=batch_size,
            rank=run.world.rank,
            world=run.world.size,
            device=run.device,
            dtype=torch.float32,
            channels_last=precision.channels_last,
            **dataclasses.asdict(reading),
        ) as loader,
    ):
        before: Callable[[], tuple[Tensor, Tensor]] | None = None
        network: FaceModel | None = None
        for batch in loader:
            if network is None:
                plain = run.device.type != "cpu" or precision.name != "fp32"
                network = model if plain else folded(model, batch.images[:2])
            images = _filled(batch)
            embeddings = encoded(network, images)
            if mirror != "none":
                mirrored = encoded(network, images.flip(3))
                both = torch.cat([embeddings, mirrored], 1)
                embeddings = both if mirror == "joined" else (embeddings + mirrored) / 2
            if found is None:
                found = torch.zeros(len(index), embeddings.shape[1])
            # A batch is waited for when the next one is under way: the device always has work.
            arriving = _on_the_way(batch.rows[: len(images)], embeddings)
            if before is not None:
                _write(*before(), found, seen)
            before = arriving
        assert found is not None and before is not None, "an index without rows has nothing to embed"
        _write(*before(), found, seen)
    # Each row was embedded on one rank and is 0 on the others: the sum is the whole, without an order to keep.
    if run.world.size > 1:
        found, seen = _sum_over_ranks(found, run), _sum_over_ranks(seen, run)
    broken = torch.nonzero((seen > 0) & ~found.isfinite().all(1)).flatten().tolist()
    if broken:
        raise NumericsError(
            f"the model's embeddings of {len(broken)} of {int(seen.sum())} pictures are not finite (first: "
            f"{index.path(broken[0])}): its weights or BatchNorm statistics have diverged; use an earlier checkpoint"
        )
    return found.clone(), seen > 0  # a tensor of inference mode could not be changed


def _filled(batch: Batch) -> Tensor:
    """A batch's images without the padding at its end; on a CPU, which is not sooner done with fewer pictures than it
    takes at a time."""
    if batch.images.device.type != "cpu":
        return batch.images
    part = PART * torch.get_num_threads()
    filled = 1 + int(torch.nonzero(batch.rows >= 0).max()) if bool((batch.rows >= 0).any()) else 1
    return batch.images[: math.ceil(filled / part) * part]


def encoded(model: FaceModel, images: Tensor) -> Tensor:
    """[B, D] float32 of [B, 3, H, W], as many pictures at a time as suits the device."""
    # A CPU's caches hold the activations of few pictures: MobileFaceNet took 13.9 ms a picture in batches of 128 and
    # 4.5 ms in batches of 32.
    count = len(images)
    part = min(count, PART * torch.get_num_threads()) if images.device.type == "cpu" else count
    found = []
    for start in range(0, count, part):
        # The last part overlaps the one before rather than being shorter: libraries have other kernels for few
        # pictures, whose last bits would depend on a picture's place in its batch.
        begin = min(start, count - part)
        found.append(model.encode(images[begin : begin + part]).float()[start - begin :])
    return torch.cat(found)


def _on_the_way(rows: Tensor, embeddings: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Begins to copy a batch's answers to the host; what is returned waits for the copies and gives them."""
    if embeddings.device.type == "cpu":
        return lambda: (rows, embeddings)
    # Into pinned memory, which is what makes them copies that nobody waits for.
    copies = rows.to("cpu", non_blocking=True), embeddings.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> tuple[Tensor, Tensor]:
        arrived.synchronize()
        return copies

    return wait


def _write(rows: Tensor, embeddings: Tensor, found: Tensor, seen: Tensor) -> None:
    """Puts a batch's embeddings into the lines of its rows, but for slots without one."""
    found[rows[rows >= 0]] = embeddings[rows >= 0]
    seen[rows[rows >= 0]] = 1


def _sum_over_ranks(values: Tensor, run: Runtime) -> Tensor:
    on_device = values.to(run.device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def embed_photographs(
    path: Path,
    data: Photographs,
    run: Runtime,
    batch_size: int,
    locator: Callable[[FaceModel], Locate] | None = None,
) -> tuple[FaceIndex, NDArray[np.float32]]:
    """The readable pictures of `data`, scanned, and their embeddings [N, D] of any length; the same on every rank.

    Args:
        path: a run, a checkpoint, a package or source weights.
        locator: what finds faces for a model; None takes pictures without landmarks as they are.

    Raises:
        ValueError: no photographs were named, or none of them can be read.
        DataError: more bad files than allowed.
    """
    if not data.root:
        raise ValueError("no photographs were named; give --data.root DIR")
    reading = data.reading(decode_threads(0, run.world))
    model = checkpoint.load_model(path, run.device)
    precision = checkpoint.precision_of(path, model)
    index = read_photographs(data, reading, locator and locator(model))
    embeddings, seen = embed_rows(model, index, run, precision, reading, batch_size=batch_size)
    readable = seen.numpy()
    if not readable.any():
        raise ValueError(f"none of {len(index)} pictures in {data.root} could be embedded")
    return index.select(readable), embeddings.numpy()[readable]
