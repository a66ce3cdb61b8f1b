"""DALI graphs that stay open from one loader to the next: a run measures itself often, and to build a graph and shut it
takes longer than many a measurement."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

from facefast.data.dali import Pipeline, build_pipeline
from facefast.data.together import Encoded, Source
from facefast.recipe import ImageSpec, Place

LEAST_BATCH = 256
"""Pictures that a kept graph takes at once at least. Room for more than there are costs nothing, and a graph with room
serves training and measuring alike."""


class Kind(NamedTuple):
    """What a graph is built for, beside its batch size: graphs of one kind can stand in for each other."""

    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    threads: int
    prefetch: int
    decoding: Place
    hw_decoder_load: float
    together: int
    """Pictures of small batches that it takes at once; 1 where each batch is a run of its own."""


class Graphs:
    """Graphs that nobody uses at the moment. Of one process and one thread at a time."""

    def __init__(self) -> None:
        self._free: list[tuple[Kind, Pipeline]] = []

    def take(self, kind: Kind, batch_size: int) -> Pipeline | None:
        """One of that kind with room for the batch, whose source is to be set by `reset`; None where none is free."""
        for place, (other, pipeline) in enumerate(self._free):
            if other == kind and pipeline.batch_size >= batch_size:
                del self._free[place]
                return pipeline
        return None

    def put_back(self, kind: Kind, pipeline: Pipeline) -> None:
        """Keeps one that has raised StopIteration and does not hold any batch."""
        pipeline.reset(_nothing)  # whatever its last source holds must not live as long as it does
        self._free.append((kind, pipeline))

    def close(self) -> None:
        """Shuts those that are free."""
        while self._free:
            self._free.pop()[1].close()


def _nothing() -> Encoded:
    raise StopIteration


_kept: ContextVar[Graphs | None] = ContextVar("graphs", default=None)


@contextlib.contextmanager
def kept_open() -> Iterator[None]:
    """Within it, loaders that are closed leave their graphs to those that come after them."""
    if _kept.get() is not None:
        yield
        return
    graphs = Graphs()
    token = _kept.set(graphs)
    try:
        yield
    finally:
        _kept.reset(token)
        graphs.close()


def open_graph(kind: Kind, batch_size: int, source: Source) -> Pipeline:
    """A graph of that kind for batches of at most so many pictures: one that was left, or a new one."""
    graphs = _kept.get()
    if graphs is not None:
        found = graphs.take(kind, batch_size)
        if found is not None:
            found.reset(source)
            return found
        batch_size = max(LEAST_BATCH, batch_size)
    batch_size = max(batch_size, kind.together)
    return build_pipeline(
        ImageSpec(size=kind.shape[0], width=kind.shape[1]),
        batch_size=batch_size,
        device="gpu" if kind.device.type == "cuda" else "cpu",
        source=source,
        dtype=kind.dtype,
        channels_last=kind.channels_last,
        threads=kind.threads,
        prefetch=kind.prefetch,
        decoding=kind.decoding,
        hw_decoder_load=kind.hw_decoder_load,
        together=kind.together,
    )


def leave_graph(kind: Kind, pipeline: Pipeline) -> None:
    """Shuts a graph, or keeps it for the next loader where graphs are kept and it comes to its source's end."""
    graphs = _kept.get()
    if graphs is None:
        pipeline.close()
        return
    try:
        while True:
            pipeline.run()
    except StopIteration:
        graphs.put_back(kind, pipeline)
    except RuntimeError:  # a broken picture among those given up
        pipeline.close()
