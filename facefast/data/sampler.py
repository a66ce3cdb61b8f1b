"""Which rows come next: pure functions of (seed, epoch, step) to a global batch, of which each rank takes its part.

Nothing here remembers anything: a run resumes by asking for the step it stopped at, at any world size. What a batch
holds never depends on that; `Parts` only says in how many forward passes the ranks there are take their parts of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


class Share(NamedTuple):
    """A part of a batch: its every `parts`-th row from number `part` on. What is drawn for one, such as the pictures in
    its empty slots, follows from this and so from no number of ranks."""

    batch: Rows
    step: int
    part: int
    parts: int


SHORT = 8
"""Steps below which batches of several epochs may be asked for in turns."""


class Sampler(ABC):
    """The batches of an epoch: `steps_per_epoch` of them, each int64 [batch_size], ending in -1 where rows run out.

    Args:
        rows: int64 [N], rows of the index to draw from.
        batch_size: rows of a batch over all ranks.
        seed: key of the order, with the epoch.
    """

    def __init__(self, rows: NDArray[Any], batch_size: int, seed: int) -> None:
        self.rows = np.ascontiguousarray(rows, np.int64)
        self.batch_size = batch_size
        self.seed = seed
        if self.rows.ndim != 1 or not len(self.rows):
            raise ValueError(
                f"a sampler needs at least one row and was given {self.rows.size}; "
                "check the split, and the faults that `python -m facefast.index` finds"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0")
        # Two: an epoch's end and the next one's start. More where epochs are so short that several are read ahead.
        self._cached_order = lru_cache(maxsize=2 if self.steps_per_epoch >= SHORT else SHORT)(self._order)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch; the last one may be padded."""
        return -(-len(self.rows) // self.batch_size)

    def places(self, start: tuple[int, int], until: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Each (epoch, step) from `start` up to, not including, `until`, across the ends of epochs."""
        steps = self.steps_per_epoch
        for number in range(start[0] * steps + start[1], until[0] * steps + until[1]):
            yield divmod(number, steps)

    def batch(self, epoch: int, step: int) -> Rows:
        """Rows of a global batch: int64 [batch_size], -1 where padded.

        Raises:
            ValueError: `step` is not in [0, steps_per_epoch).
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step is {step}; an epoch has steps 0 to {self.steps_per_epoch - 1}")
        part = self._cached_order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        batch = np.full(self.batch_size, -1, np.int64)
        batch[: len(part)] = part
        return batch

    def local(self, epoch: int, step: int, rank: int, world: int) -> Rows:
        """One rank's part of a batch: int64 [batch_size / world].

        Raises:
            ValueError: `world` does not divide the batch, or `rank` is not one of its ranks.
        """
        if self.batch_size % world:
            raise ValueError(
                f"a global batch of {self.batch_size} cannot be shared evenly by {world} processes; "
                f"choose a multiple of {world}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; it must lie in [0, {world})")
        # Every world-th row, not one block: the padding at an epoch's end is spread over the ranks.
        return self.batch(epoch, step)[rank::world]

    def share(self, epoch: int, step: int, rank: int, world: int) -> Share:
        """Which part of which batch a rank's rows are."""
        return Share(self.batch(epoch, step), step, rank, world)

    @abstractmethod
    def _order(self, epoch: int) -> Rows:
        """All rows of an epoch, one batch after the other."""

    def _generator(self, epoch: int) -> np.random.Generator:
        # Seeded by the pair, which SeedSequence hashes: any epoch's order can be had without those before it, and
        # seed 0 in epoch 1 is not seed 1 in epoch 0.
        return np.random.Generator(np.random.PCG64([self.seed, epoch]))


class EpochSampler(Sampler):
    """Every row exactly once per epoch, in an order of the epoch's own, or as they are."""

    def __init__(self, rows: NDArray[Any], batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        super().__init__(rows, batch_size, seed)
        self.shuffle = shuffle

    def _order(self, epoch: int) -> Rows:
        return self._generator(epoch).permutation(self.rows) if self.shuffle else self.rows


class BalancedSampler(Sampler):
    """Every identity equally often, however many pictures it has; an epoch is as long as the rows are many.

    Identities come in rounds, each identity once per round in a new order; its pictures take turns. All batches are
    full.

    Args:
        labels: int [N], one per entry of `rows`, at least 0.
    """

    def __init__(self, rows: NDArray[Any], labels: NDArray[Any], batch_size: int, seed: int = 0) -> None:
        super().__init__(rows, batch_size, seed)
        self._classes = _Classes(self.rows, labels)

    def _order(self, epoch: int) -> Rows:
        generator, number = self._generator(epoch), self._classes.number
        length = self.steps_per_epoch * self.batch_size
        rounds = -(-length // number)
        identities = _shuffled_rounds(generator, rounds, number).reshape(-1)[:length]
        turn = np.arange(length) // number  # the round, since each identity comes once in it
        return self._classes.pictures(generator, identities, turn)


class PKSampler(Sampler):
    """P identities x K pictures in every batch: what triplet and contrastive losses learn from.

    An identity with fewer than K pictures repeats some. A batch is laid out picture by picture (place k P + p), which
    keeps an identity on one rank where the number of ranks divides P. All batches are full.

    Args:
        labels: int [N], one per entry of `rows`, at least 0.
        pictures_per_identity: K; it must divide `batch_size`.
    """

    def __init__(
        self,
        rows: NDArray[Any],
        labels: NDArray[Any],
        batch_size: int,
        seed: int = 0,
        pictures_per_identity: int = 4,
    ) -> None:
        super().__init__(rows, batch_size, seed)
        self._classes = _Classes(self.rows, labels)
        if pictures_per_identity < 1 or batch_size % pictures_per_identity:
            raise ValueError(
                f"pictures_per_identity is {pictures_per_identity}; it must divide the global batch of {batch_size}"
            )
        self.pictures_per_identity = pictures_per_identity
        self.identities = batch_size // pictures_per_identity
        if self.identities > self._classes.number:
            raise ValueError(
                f"a batch of {batch_size} at {pictures_per_identity} pictures per identity needs {self.identities} "
                f"identities, and there are {self._classes.number}; "
                f"lower the batch size to {self._classes.number * pictures_per_identity} or less"
            )

    def _order(self, epoch: int) -> Rows:
        generator, (p, k) = self._generator(epoch), (self.identities, self.pictures_per_identity)
        # A round is as many whole batches as its identities fill; the few left over take part in the next one.
        batches_per_round = self._classes.number // p
        rounds = -(-self.steps_per_epoch // batches_per_round)
        shuffled = _shuffled_rounds(generator, rounds, self._classes.number)[:, : batches_per_round * p]
        identities = shuffled.reshape(-1, 1, p)[: self.steps_per_epoch]  # [steps, 1, P]
        steps = np.arange(self.steps_per_epoch)[:, None, None]
        turn = steps // batches_per_round * k + np.arange(k)[:, None]  # [steps, K, 1]
        identities, turn = np.broadcast_arrays(identities, turn)
        return self._classes.pictures(generator, identities.reshape(-1), turn.reshape(-1))


class Parts(Sampler):
    """Another sampler's batches, each taken by a number of ranks in several passes: its steps are those passes.

    A batch is cut into `world` x `passes` parts (its every n-th row), padded with -1 where it does not divide, and pass
    k has parts k world to (k + 1) world - 1. Ranks and passes of the same product have the same parts.
    """

    def __init__(self, whole: Sampler, world: int, passes: int) -> None:
        self.whole, self.world, self.passes = whole, world, passes
        self.parts = world * passes
        per_rank = -(-whole.batch_size // self.parts)
        super().__init__(whole.rows, per_rank * world, whole.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Passes in an epoch."""
        return self.whole.steps_per_epoch * self.passes

    def batch(self, epoch: int, step: int) -> Rows:
        """Rows of one pass over all ranks: int64 [batch_size], -1 where padded.

        Raises:
            ValueError: `step` is not in [0, steps_per_epoch).
        """
        first = step % self.passes * self.world
        return self._padded(epoch, step).reshape(-1, self.parts)[:, first : first + self.world].reshape(-1)

    def share(self, epoch: int, step: int, rank: int, world: int) -> Share:
        """Which part of which whole batch a rank's rows are."""
        whole, turn = divmod(step, self.passes)
        return Share(self._padded(epoch, step), whole, turn * self.world + rank, self.parts)

    def _padded(self, epoch: int, step: int) -> Rows:
        batch = self.whole.batch(epoch, step // self.passes)
        return np.pad(batch, (0, -len(batch) % self.parts), constant_values=-1)

    def _order(self, epoch: int) -> Rows:
        return self.whole._order(epoch)


class _Classes:
    """Rows grouped by label, so that whole epochs are drawn without a loop."""

    def __init__(self, rows: Rows, labels: NDArray[Any]) -> None:
        if len(labels) != len(rows):
            raise ValueError(f"{len(rows)} rows came with {len(labels)} labels; give one label per row")
        if labels.min() < 0:
            raise ValueError(
                f"row {int(rows[int(np.argmin(labels))])} has no identity; balanced and pk sampling need one"
            )
        _, self._group, self._counts = np.unique(labels, return_inverse=True, return_counts=True)
        self._rows = rows
        self._starts = np.cumsum(self._counts) - self._counts
        self.number = len(self._counts)

    def pictures(self, generator: np.random.Generator, identities: Rows, turn: Rows) -> Rows:
        """The rows of each identity's `turn`-th picture in a random order of its own, which starts again past the
        last."""
        # A stable sort of a permutation by class: every class's rows together, each in random order.
        shuffled = generator.permutation(len(self._rows))
        by_class = self._rows[shuffled[np.argsort(self._group[shuffled], kind="stable")]]
        return by_class[self._starts[identities] + turn % self._counts[identities]]


def _shuffled_rounds(generator: np.random.Generator, rounds: int, number: int) -> Rows:
    """int64 [rounds, number]: each line a permutation of range(number)."""
    return generator.permuted(np.tile(np.arange(number), (rounds, 1)), axis=1)


def make_sampler(
    kind: Literal["epoch", "balanced", "pk"],
    labels: NDArray[Any],
    batch_size: int,
    seed: int = 0,
    *,
    rows: NDArray[Any] | None = None,
    pictures_per_identity: int = 4,
) -> Sampler:
    """The sampler of a phase, by name.

    Args:
        kind: epoch (every row once), balanced (every identity equally often) or pk (P identities x K pictures).
        labels: int [N], one per row.
        batch_size: rows of a batch over all ranks.
        seed: key of the order, with the epoch.
        rows: int64 [N], rows of the index that `labels` belong to; all of them by default.
        pictures_per_identity: K of the pk sampler.

    Raises:
        ValueError: there are no rows, `kind` is unknown, or the batch does not suit it.
    """
    rows = np.arange(len(labels)) if rows is None else rows
    if kind == "epoch":
        return EpochSampler(rows, batch_size, seed)
    if kind == "balanced":
        return BalancedSampler(rows, labels, batch_size, seed)
    if kind == "pk":
        return PKSampler(rows, labels, batch_size, seed, pictures_per_identity)
    raise ValueError(f"sampler is {kind!r}; it must be epoch, balanced or pk")
