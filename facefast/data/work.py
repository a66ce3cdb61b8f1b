"""One batch on its way from the sampler to the model."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import facefast._scan as _scan
from facefast.data.augment import Draw, draw
from facefast.data.index import FAULTS, FaceIndex
from facefast.data.sampler import Rows
from facefast.data.together import Encoded
from facefast.recipe import AugmentSpec, ImageSpec, Reading

KEPT_BYTES = 64 << 20
"""Encoded bytes of a batch that wait for the decoder; large pictures beyond them are read again when it wants them."""
MANY = 1 << 14
"""Rows from which candidates for filling are drawn one by one: to shuffle all of them would take longer."""


@dataclass
class Work:
    """One batch on its way: the rows it should hold, what was read of them, and what fills the slots that are empty."""

    epoch: int
    step: int
    asked: Rows  # [B], -1 where the sampler pads
    own: Rows  # [B], each slot's place among the pictures read, -1 where it has none
    rows: Rows  # [n] of the pictures read
    data: list[NDArray[np.uint8]]  # empty where it is read again when it is wanted
    numbers: Draw
    sizes: NDArray[np.int32]  # [n, 2] (width, height), upright
    bad: dict[int, str]  # row -> reason, of the rows asked for
    spares: list[int] = field(default_factory=list)  # places of the pictures that fill empty slots, in this order
    broken: set[int] = field(default_factory=set)  # places of the pictures that the decoder breaks on
    num_parts: int = 1  # that the decoder takes it in

    def spoil(self, place: int, reason: str) -> None:
        """Takes a picture out that the decoder breaks on."""
        # Its bytes stay in `data`, so that the places of the others stay too; no slot refers to it any more.
        self.broken.add(place)
        if place not in self.spares:  # a filler is nobody's loss
            self.bad[int(self.rows[place])] = reason
            self.own[self.own == place] = -1

    def sound(self) -> Rows:
        """Places of the pictures that no decoder has broken on yet."""
        return np.array([place for place in range(len(self.rows)) if place not in self.broken], np.int64)

    def fillers(self) -> list[int]:
        """Places of the sound pictures that fill empty slots."""
        return [place for place in self.spares if place not in self.broken]

    def lacking(self) -> int:
        """Empty slots that nothing fills yet."""
        return max(0, int((self.own < 0).sum()) - len(self.fillers()))

    def valid_rows(self) -> Rows:
        """[B], -1 where a slot has no picture of its own."""
        return np.where(self.own >= 0, self.asked, -1)

    def parts(self, most_pixels: int) -> list[Rows]:
        """Places of the pictures for the slots, empty ones filled, in parts of at most so many pixels or of one
        picture; one empty part where there is no picture at all."""
        # Where the data has no further pictures those that there are take turns.
        places, empty, spares = self.own.copy(), np.flatnonzero(self.own < 0), self.fillers()
        if len(spares) < len(empty):
            spares += self.own[self.own >= 0].tolist()
        if not spares and len(empty):
            return [np.zeros(0, np.int64)]
        if len(empty):
            places[empty] = np.resize(spares, len(empty))
        cuts, pixels = [], 0
        for slot, count in enumerate(self.sizes[places].astype(np.int64).prod(1).tolist()):
            pixels += count
            if slot and pixels > most_pixels:
                cuts.append(slot)
                pixels = count
        return np.split(places, cuts)


class Reader:
    """Reads rows of an index and draws their numbers."""

    def __init__(
        self, index: FaceIndex, image: ImageSpec, augment: AugmentSpec | None, seed: int, reading: Reading
    ) -> None:
        self.index, self.image, self.augment, self.seed, self.reading = index, image, augment, seed, reading
        self._prefix = os.path.join(os.fsencode(index.root), b"")

    def begin(self, epoch: int, step: int, asked: Rows, known: dict[int, str]) -> Work:
        """A batch with the pictures of its own rows that can be read.

        Args:
            asked: [B] rows, -1 where the sampler pads.
            known: row -> reason, of those that are not read again: they would fail again.
        """
        slots = np.flatnonzero(asked >= 0)
        bad = {int(row): known[int(row)] for row in asked[slots] if int(row) in known}
        slots = slots[[int(row) not in bad for row in asked[slots]]]
        own, none = np.full(len(asked), -1, np.int64), np.zeros(0, np.int64)
        work = Work(epoch, step, asked, own, none, [], _nothing(0), np.zeros((0, 2), np.int32), bad)
        # Slots of padding and of unreadable files stay -1.
        own[slots], faults = self._add(work, asked[slots])
        work.bad |= {int(row): FAULTS[fault] for row, fault in zip(asked[slots], faults, strict=True) if fault}
        return work

    def encoded(self, work: Work, places: Rows) -> Encoded:
        """A part of a batch as the decoder takes it."""
        if not len(places):
            return blank(len(work.asked))
        data = [self.picture(work, place) for place in places.tolist()]
        return Encoded(data, work.numbers.take(places), work.sizes[places])

    def picture(self, work: Work, place: int) -> NDArray[np.uint8]:
        """The bytes of one picture of a batch; empty, which no decoder takes, where it is another one by now."""
        return work.data[place] if len(work.data[place]) else self._read(work.rows[[place]])[0][0]

    def fill(self, work: Work, candidates: Rows) -> None:
        """Reads pictures for the empty slots, in the order of `candidates`, as far as they go."""
        done = 0
        while (lacking := work.lacking()) and done < len(candidates):
            places, _ = self._add(work, candidates[done : done + lacking])
            work.spares += places[places >= 0].tolist()
            done += lacking

    def _add(self, work: Work, rows: Rows) -> tuple[Rows, NDArray[np.uint8]]:
        """Places of the pictures of some rows, read into the batch, -1 of those that cannot be; and their faults."""
        index = self.index
        kept = sum(len(data) for data in work.data)
        data, faults, widths, heights, orientations = self._read(rows, max(0, KEPT_BYTES - kept))
        sound = np.flatnonzero(faults == 0)
        places = np.full(len(rows), -1, np.int64)
        places[sound] = len(work.rows) + np.arange(len(sound))
        # Sizes as the file has them now, not as the index saw them: landmarks and matrices are upright (orientations
        # from 5 on lie on their side).
        sizes = np.stack([widths, heights], 1)[sound]
        sizes = np.where(orientations[sound, None] >= 5, sizes[:, ::-1], sizes)
        numbers = draw(index, rows[sound], self.image, self.augment, self.seed, work.epoch, sizes)
        work.rows = np.concatenate([work.rows, rows[sound]])
        work.data += [data[i] for i in sound]
        work.numbers = Draw(*(np.concatenate(pair) for pair in zip(work.numbers, numbers, strict=True)))
        work.sizes = np.concatenate([work.sizes, sizes])
        return places, faults

    def _read(self, rows: Rows, keep_bytes: int = 1 << 62) -> Any:
        index = self.index
        return _scan.read(
            np.char.add(self._prefix, index.paths[rows]),
            index.offsets[rows],
            index.lengths[rows],
            self.reading.threads,
            self.reading.max_pixels,
            index.hashes[rows],  # a picture that is another one than was looked at may show anybody
            keep_bytes,
        )


def candidates(rows: Rows, asked: Rows, key: tuple[int, ...], number: int) -> Rows:
    """Rows whose pictures may fill a batch's empty slots: others of the same data, in an order that the key alone
    fixes, so that a resumed run fills them alike.

    Args:
        rows: [N] of the data.
        asked: [B] of the batch, which are left out.
        key: of the order, for instance (seed, epoch, step, rank).
        number: how many are wanted at least, where the data has them.
    """
    generator = np.random.Generator(np.random.PCG64(list(key)))
    if len(rows) <= max(MANY, 8 * number):
        order = generator.permutation(rows)
    else:
        drawn = rows[generator.integers(len(rows), size=4 * number + len(asked))]
        order = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return order[~np.isin(order, asked)]


# What a batch without any sound picture is made of: 8 x 8 grey pixels.
BLANK_SIZE = 8
BLANK = np.frombuffer(b"P6 8 8 255\n" + b"\x80" * (3 * BLANK_SIZE * BLANK_SIZE), np.uint8)


def blank(number: int) -> Encoded:
    """A batch without any sound picture: all zeros, the mean colour, after normalisation."""
    return Encoded([BLANK] * number, _nothing(number), np.full((number, 2), BLANK_SIZE, np.int32))


def _nothing(number: int) -> Draw:
    """Numbers that show nothing of a picture."""
    return Draw(
        np.zeros((number, 2, 3), np.float32), np.zeros((number, 3, 4), np.float32), np.zeros((number, 4), np.int32)
    )
