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
        world = self._run.world
        for step in range(self._start_step, self.sampler.steps_per_epoch):
            local = self.sampler.local(self._epoch, step, world.rank, world.size)
            rows = torch.from_numpy(local).to(self._run.device)
            some = rows.clamp(min=0)
            rows = rows.where(self._readable[some], -1)  # as the Loader does: padded and unreadable rows count alike
            labels = self._labels[some]
            labels = labels.masked_fill((rows < 0) | (labels < 0), -100)  # as a loader of pictures has them
            yield Batch(self._embeddings[some].nan_to_num(0.0), labels, rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None
