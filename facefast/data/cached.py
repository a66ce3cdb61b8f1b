"""Batches of features that were computed once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data.loader import Batch
from facefast.data.sampler import Sampler
from facefast.runtime.process import Runtime


class CachedLoader:
    """A `Loader` whose batches hold a frozen backbone's embeddings instead of pictures."""

    wait_seconds = 0.0

    def __init__(self, embeddings: Tensor, labels: NDArray[np.int32], sampler: Sampler, run: Runtime) -> None:
        self.sampler = sampler
        self._run = run
        self._embeddings = embeddings.to(run.device)  # [N, D] by row of the training index; NaN could not be read
        self._readable = self._embeddings.isfinite().all(1)
        self._labels = torch.tensor(labels, dtype=torch.long).to(run.device)
        self._epoch = self._start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Where the next iteration starts."""
        self._epoch, self._start_step = epoch, start_step

    def __iter__(self) -> Iterator[Batch]:
        for _, _, batch in self.stream(self._epoch, self._start_step, until=(self._epoch + 1, 0)):
            yield batch

    def stream(self, epoch: int, step: int, *, until: tuple[int, int]) -> Iterator[tuple[int, int, Batch]]:
        """Epoch, step and batch from one place up to, not including, another, as a loader of pictures has them."""
        world = self._run.world
        for place in self.sampler.places((epoch, step), until):
            local = self.sampler.local(*place, world.rank, world.size)
            rows = torch.from_numpy(local).to(self._run.device)
            some = rows.clamp(min=0)
            rows = rows.where(self._readable[some], -1)  # as the Loader does: padded and unreadable rows count alike
            labels = self._labels[some]
            labels = labels.masked_fill((rows < 0) | (labels < 0), -100)  # as a loader of pictures has them
            yield *place, Batch(self._embeddings[some].nan_to_num(0.0), labels, rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None
