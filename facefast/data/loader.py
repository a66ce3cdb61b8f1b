"""Batches of pictures for the model: sampler -> rows -> augment -> dali -> `Batch`, with every bad file named.

Reading and drawing go on in one thread, a few batches ahead, and decoding in DALI's; the caller's thread only hands
batches over.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from facefast.data import oracle
from facefast.data.budget import BadDataError, Budget
from facefast.data.dali import Pipeline, decode_probe
from facefast.data.graphs import Kind, leave_graph, open_graph
from facefast.data.index import FAULTS, FaceIndex
from facefast.data.sampler import EpochSampler, Rows, Sampler
from facefast.data.together import Encoded, Source
from facefast.data.work import Reader, Work, candidates
from facefast.recipe import AugmentSpec, ImageSpec, Place, Reading

__all__ = ["BadDataError", "Batch", "Loader", "make_loader"]

IGNORED_LABEL = -100
AHEAD = 4
"""Batches that are read before the decoder asks for them."""
PREFETCH = 2
"""Batches that are decoded before the caller asks for them."""
TOGETHER = 64
"""Pictures of small batches that a processor decodes at once: each run costs as much as decoding a few pictures."""
PIXELS, PIXELS_PER_THREAD, PIXELS_ON_GPU = 64_000_000, 12_000_000, 256_000_000
"""Pixels that are decoded at once, three bytes each: a batch of more is decoded in parts, down to single pictures. What
comes out is the same, for no picture depends on the others of its batch."""
SPARES = 8
"""Candidates for empty slots beyond those that are empty, for pictures that turn out bad."""


class Batch(NamedTuple):
    """What one forward pass takes; everything else about a picture is a gather from the index by row.

    images: [B, 3, H, W] on the device, normalised. The picture of a slot whose row is -1 is another one of the data,
        where it has any, so that BatchNorm sees no copies.
    labels: int64 [B], -100 where the row is -1 or has no identity.
    rows: int64 [B], -1 where the batch is padded or the file unreadable.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor


class Decoder(Protocol):
    """What turns encoded pictures into images: DALI, or the oracle with the same interface."""

    def run(self) -> Tensor:
        """The next images, [B, 3, H, W]; RuntimeError where a picture cannot be decoded."""

    def reset(self) -> None:
        """Starts again after StopIteration."""

    def close(self) -> None:
        """Ends its threads."""


# The order of events. A batch is a `Work`, and is in one queue at a time:
#   sampler -> _prepare (reading thread) -> _ahead -> _feed -> decoder, and _under_way -> _take -> _hand_over -> caller
# 1. `_begin` sends the first AHEAD steps to the reading thread, which looks rows up, reads files and draws numbers.
# 2. The caller's `next` runs the decoder, which first calls `_feed` (on the caller's thread) for batches to come, until
#    PREFETCH are in it. `_feed` takes the oldest of `_ahead` and sends one more step to the reading thread.
# 3. The decoder gives batches back in the order in which it took them: its result is the oldest of `_under_way`.
# 4. One broken picture fails the decoder's whole run, and with it every batch that it holds. `_take` then decodes their
#    pictures one by one, takes out those that break, and lets a new decoder begin with these batches, `_repeated`.
# 5. A batch of very many pixels goes through the decoder in parts, one run each, which `_take` puts together again.
# 6. An epoch's end is nothing special: the sampler is pure, so the first batches of the next one are read and decoded
#    while the last ones of this one are used. What is read ahead changes nothing that is counted: `_hand_over` counts.
# Every queue is first in, first out, which is all that keeps images and rows together: no batch carries its step.


class Loader:
    """Batches of one rank: over one epoch by iteration, which `set_epoch` sends to another one, or over as many as are
    wanted by `stream`. Made by `make_loader`.

    A file that cannot be read or decoded costs its row: the slot says -1 and carries another picture. It is not read
    again. Iteration stops with `BadDataError` as soon as bad pictures are more than `max_bad_fraction` of those in the
    epochs begun, and at least ten, or all; at a fraction of 0 the first one stops it.

    Attributes:
        sampler: who owns the order.
        bad: row -> reason, of what was found bad so far.
        wait_seconds: time that the caller has spent waiting for batches since the loader was made.
    """

    def __init__(
        self,
        index: FaceIndex,
        image: ImageSpec,
        sampler: Sampler,
        augment: AugmentSpec | None,
        *,
        seed: int,
        rank: int,
        world: int,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
        reading: Reading,
        decoder: Literal["dali", "oracle"],
    ) -> None:
        self.index = index
        self.image = image
        self.sampler = sampler
        self.bad: dict[int, str] = {}
        self.wait_seconds = 0.0
        self._augment = augment
        self._seed = seed
        self._rank, self._world = rank, world
        self._batch_size = sampler.batch_size // world
        self._device, self._dtype, self._channels_last = device, dtype, channels_last
        self._reading = reading
        self._decoder_kind = decoder
        self._reader_of_rows = Reader(index, image, augment, seed, reading)
        self._budget = Budget(index, len(sampler.rows), world, reading.max_bad_fraction)

        self._epoch = self._start_step = 0
        self._to_read: Iterator[tuple[int, int]] = iter(())  # (epoch, step), up to where the iteration ends
        self._turn = 0  # which iteration over the loader is the valid one
        # One thread: `_scan.read` has threads of its own for the files, and drawing is short.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="facefast-loader")
        self._ahead: deque[Future[Work]] = deque()  # with the reading thread, or read
        self._repeated: deque[Work] = deque()  # to be decoded again by a new decoder
        self._under_way: deque[Work] = deque()  # with the decoder
        self._parts: deque[tuple[Work, Rows]] = deque()  # of the youngest of them, not yet with it
        on_gpu = device.type == "cuda" and reading.decoding != "cpu"
        self._most_pixels = PIXELS_ON_GPU if on_gpu else max(PIXELS, PIXELS_PER_THREAD * reading.threads)
        self._closed = False
        self._kind = Kind(
            image.shape,
            device,
            dtype,
            channels_last,
            reading.threads,
            PREFETCH,
            reading.decoding,
            reading.hw_decoder_load,
            TOGETHER if device.type == "cpu" else 1,
        )
        self._decoder: Decoder | None = self._build(self._batch_size, self._feed, PREFETCH)

    def __len__(self) -> int:
        """Batches from the epoch's start step to its end."""
        return self.sampler.steps_per_epoch - self._start_step

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Makes the next iteration run over `epoch` from `start_step`; what was under way is given up.

        Raises:
            ValueError: `epoch` is negative or `start_step` not in [0, steps_per_epoch].
        """
        self._require_place(epoch, start_step)
        self._epoch, self._start_step = epoch, start_step
        self._turn += 1

    def __iter__(self) -> Iterator[Batch]:
        """Batches in the sampler's order.

        Raises:
            BadDataError: more pictures are bad than tolerated.
            ValueError: the loader is closed, or another iteration or `set_epoch` has taken its place.
        """
        for _, _, batch in self.stream(self._epoch, self._start_step, until=(self._epoch + 1, 0)):
            yield batch

    def stream(self, epoch: int, step: int, *, until: tuple[int, int]) -> Iterator[tuple[int, int, Batch]]:
        """Epoch, step and batch from one place up to, not including, another, across the ends of epochs.

        The next epoch's first batches are read and decoded while the last ones of this one are used, so that nobody
        waits at an epoch's end. Nothing is read from `until` on.

        Args:
            epoch, step: the first batch; a step may be the epoch's last plus 1, which is the next one's first.
            until: (epoch, step).

        Raises:
            BadDataError: more pictures are bad than tolerated.
            ValueError: there is no such place, the loader is closed, or another iteration or `set_epoch` has taken
                this one's place.
        """
        self._require_place(epoch, step)
        self._require_place(*until)
        self._turn += 1
        turn, begun = self._turn, False
        for place in self.sampler.places((epoch, step), until):
            began = time.perf_counter()
            if self._closed:
                raise ValueError("the loader is closed; make another one")
            if turn != self._turn:
                raise ValueError("another iteration or set_epoch has taken this one's place; iterate the loader anew")
            if not begun:  # not in set_epoch: nothing is read before a batch is wanted
                self._begin(place, until)
                begun = True
            images = self._take()
            batch = self._hand_over(images, self._under_way.popleft())
            self.wait_seconds += time.perf_counter() - began
            yield *place, batch

    def _require_place(self, epoch: int, step: int) -> None:
        if epoch < 0 or not 0 <= step <= self.sampler.steps_per_epoch:
            raise ValueError(
                f"epoch {epoch}, step {step} does not exist; epochs start at 0 and steps go up to "
                f"{self.sampler.steps_per_epoch}"
            )

    def close(self) -> None:
        """Ends the reading thread and the decoder's; batches that were handed out stay valid."""
        self._closed = True
        self._reader.shutdown(wait=True, cancel_futures=True)
        decoder, self._decoder = self._decoder, None
        self._give_up()
        if isinstance(decoder, Pipeline):
            leave_graph(self._kind, decoder)
        elif decoder is not None:
            decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # it may have cut a run of the decoder short: nobody else is to have that one
            self._drop_decoder()
        self.close()

    # The reading thread: rows, bytes, numbers.

    def _look_ahead(self) -> None:
        while len(self._ahead) < AHEAD and (place := next(self._to_read, None)) is not None:
            self._ahead.append(self._reader.submit(self._prepare, *place))

    def _prepare(self, epoch: int, step: int) -> Work:
        asked = self.sampler.local(epoch, step, self._rank, self._world)
        # Known from the scan, or found by the decoder since: read again, it would fail the decoder again.
        known = {int(row): reason for row in asked[asked >= 0] if (reason := self._known_fault(int(row)))}
        work = self._reader_of_rows.begin(epoch, step, asked, known)
        self._fill(work)
        return work

    def _fill(self, work: Work) -> None:
        """Fills empty slots with other pictures of the data: a copy of the batch's own would leave BatchNorm with less
        variance than the data has, and of a batch of one picture with none."""
        if not work.lacking():
            return
        # Drawn for the whole batch: padding is filled with the same pictures at any number of ranks.
        share = self.sampler.share(work.epoch, work.step, self._rank, self._world)
        batch, padded = share.batch, np.flatnonzero(share.batch < 0)
        rows = candidates(self.sampler.rows, batch, (self._seed, work.epoch, share.step, 0), len(batch) + SPARES)
        # This rank's padding first; then, for files that cannot be read, rows that no other rank begins with.
        ours = rows[: len(padded)][padded[: len(rows)] % share.parts == share.part]
        others = rows[len(padded) :]
        rows = np.concatenate([ours, np.roll(others, -share.part * (len(others) // share.parts))])
        taken = set(work.rows.tolist())
        # Rows that are known to be bad are passed over, as one that turns out so is: the order stays the same.
        fresh = [row for row in rows.tolist() if row not in taken and not self._known_fault(row)]
        self._reader_of_rows.fill(work, np.array(fresh, np.int64))

    def _known_fault(self, row: int) -> str | None:
        if self.index.faults[row]:
            return FAULTS[int(self.index.faults[row])]
        return self.bad.get(row)

    # The decoder, which asks `_feed` for work and fails as a whole where one picture is broken.

    def _give_up(self) -> None:
        """Leaves the decoder nothing to ask for but what it holds."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._repeated.clear()
        self._parts.clear()

    def _begin(self, start: tuple[int, int], until: tuple[int, int]) -> None:
        """Gives up what is under way and starts reading at `start`."""
        self._give_up()
        # A decoder still holds batches of the iteration that was left. With its sources empty it gives those back and
        # stops; then it can be reset, which is cheaper than building another.
        if self._decoder is not None:
            try:
                while True:
                    self._decoder.run()
            except StopIteration:
                self._decoder.reset()
            except RuntimeError:  # a broken picture among those given up
                self._drop_decoder()
        self._under_way.clear()
        if self._decoder is None:
            self._decoder = self._build(self._batch_size, self._feed, PREFETCH)
        self._to_read = iter(self.sampler.places(start, until))
        self._look_ahead()

    def _feed(self) -> Encoded:
        if self._parts:
            return self._next_part()
        if self._repeated:
            work = self._repeated.popleft()
        elif self._ahead:
            work = self._ahead[0].result()  # an error of the reading thread stays in its place
            self._ahead.popleft()
            self._look_ahead()
        else:
            raise StopIteration
        self._under_way.append(work)
        places = work.parts(self._most_pixels)
        work.num_parts = len(places)
        self._parts.extend((work, part) for part in places)
        return self._next_part()

    def _next_part(self) -> Encoded:
        return self._reader_of_rows.encoded(*self._parts.popleft())

    def _take(self) -> Tensor:
        while True:
            assert self._decoder is not None, "a decoder that failed for good was used again"
            try:
                images = [self._decoder.run()]
                while len(images) < self._under_way[0].num_parts:
                    images.append(self._decoder.run())
                return torch.cat(images) if len(images) > 1 else images[0]
            except RuntimeError:
                self._parts.clear()
                self._drop_decoder()  # after an error it is not to be relied on, see `Pipeline.run`
                # Every batch under way is searched: which of them made the decoder fail is nowhere promised.
                if not sum(self._spoil_broken(work) for work in self._under_way):
                    raise  # no picture's fault: repeating would fail forever
                # In front, in their order: batches that wait from an earlier failure come after these.
                self._repeated.extendleft(reversed(self._under_way))
                self._under_way.clear()
                self._decoder = self._build(self._batch_size, self._feed, PREFETCH)
            except Exception:
                self._drop_decoder()
                raise

    def _spoil_broken(self, work: Work) -> int:
        """Takes every picture out of the batch that the decoder breaks on by itself; returns how many."""
        # The same graph with batches of one, so that it fails on exactly what the real one fails on.
        found, place = 0, 0
        decoder: Decoder | None = None

        def feed() -> Encoded:
            return self._reader_of_rows.encoded(work, np.array([place]))

        for place in work.sound().tolist():
            decoder = decoder or self._build(1, feed, 1)
            try:
                decoder.run()
            except RuntimeError:
                decoder.close()
                decoder = None
                reason = decode_probe(self._reader_of_rows.picture(work, place), tuple(work.sizes[place].tolist()))
                work.spoil(place, reason or "the decoder fails on it")
                found += 1
                self._fill(work)
        if decoder is not None:
            decoder.close()
        return found

    def _build(self, batch_size: int, source: Source, prefetch: int) -> Decoder:
        if self._decoder_kind == "oracle":
            return oracle.OracleDecoder(self.image, source, self._device, self._dtype, self._channels_last)
        alone = prefetch == 1  # what is asked of it is to be decoded by itself
        kind = self._kind._replace(prefetch=prefetch, together=1 if alone else self._kind.together)
        return open_graph(kind, batch_size, source)

    def _drop_decoder(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None

    # The caller's side.

    def _hand_over(self, images: Tensor, work: Work) -> Batch:
        rows = work.valid_rows()
        self.bad.update(work.bad)
        # Counted here, where a batch is handed over: what was read ahead and given up is no loss.
        self._budget.count(work.asked >= 0, rows < 0, self.bad)
        labels = self.index.labels[rows]
        labels = np.where((rows >= 0) & (labels >= 0), labels, IGNORED_LABEL)
        # One tensor for both, so that one copy brings them; from pinned memory, so that the host does not wait for it.
        numbers = torch.from_numpy(np.stack([labels, rows]))
        if self._device.type == "cuda":
            numbers = numbers.pin_memory().to(self._device, non_blocking=True)
        return Batch(images, numbers[0], numbers[1])


def make_loader(
    index: FaceIndex,
    image: ImageSpec,
    *,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    augment: AugmentSpec | None = None,
    seed: int = 0,
    epoch: int = 0,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    threads: int = 0,
    decoder: Literal["dali", "oracle"] = "dali",
    max_bad_fraction: float = Reading.max_bad_fraction,
    max_pixels: int = Reading.max_pixels,
    decoding: Place = Reading.decoding,
    hw_decoder_load: float = Reading.hw_decoder_load,
) -> Loader:
    """Batches of `index` as the model wants them.

    Args:
        index: the pictures; rows with a fault are never fed.
        image: what the model sees.
        batch_size: rows of this rank's batches; by default this rank's part of the sampler's.
        sampler: the order, with a batch size of `batch_size * world`; by default every sound row once, in order.
        augment: how pictures are varied; None is the aligned picture itself.
        seed: key of the augmentation, with the epoch and the row.
        epoch, start_step: where to begin.
        rank, world: this process among all.
        device: where the images are wanted.
        dtype: float32, float16 or bfloat16.
        channels_last: memory format of the images.
        threads: for reading and for decoding; 0 is one per core.
        decoder: dali, or oracle for the readable reference in PIL and numpy.
        max_bad_fraction: unreadable pictures tolerated; see `Loader`.
        max_pixels: a larger picture is not decoded and counts as bad.
        decoding: where pictures for a GPU are decoded: there, whole (gpu) or what the model sees of them (regions), or
            by the processor's cores (cpu).
        hw_decoder_load: part of the pictures that the GPU's JPEG hardware takes.

    Raises:
        ValueError: an argument is out of its range or contradicts another one.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; pictures can be decoded on cpu or cuda")
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise ValueError(
            f"device is {device}, but this process works on cuda:{torch.cuda.current_device()}; "
            f"call torch.cuda.set_device({device.index}) first"
        )
    if decoder not in ("dali", "oracle"):
        raise ValueError(f"decoder is {decoder!r}; it must be dali or oracle")
    if sampler is None:
        if batch_size is None:
            raise ValueError("give batch_size, or a sampler, which has one")
        sampler = EpochSampler(np.flatnonzero(index.faults == 0), batch_size * world, shuffle=False)
    if batch_size is None and sampler.batch_size % world:
        raise ValueError(f"the sampler's batch of {sampler.batch_size} does not divide among {world} processes")
    if batch_size is not None and sampler.batch_size != batch_size * world:
        raise ValueError(
            f"the sampler's global batch is {sampler.batch_size}, but {world} processes with batches of {batch_size} "
            f"take {batch_size * world}"
        )
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; it must lie in [0, {world})")
    if sampler.rows.min() < 0 or sampler.rows.max() >= len(index):
        raise ValueError(
            f"the sampler draws rows {sampler.rows.min()} to {sampler.rows.max()}, but the index has {len(index)}"
        )
    loader = Loader(
        index,
        image,
        sampler,
        augment,
        seed=seed,
        rank=rank,
        world=world,
        device=device,
        dtype=dtype,
        channels_last=channels_last,
        reading=Reading(
            threads or len(os.sched_getaffinity(0)), max_bad_fraction, max_pixels, decoding, hw_decoder_load
        ),
        decoder=decoder,
    )
    loader.set_epoch(epoch, start_step)
    return loader
