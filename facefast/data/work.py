"""One batch on its way from the sampler to the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facefast.data.augment import Draw
from facefast.data.dali import Encoded
from facefast.data.sampler import Rows


@dataclass
class Work:
    """One batch on its way: the rows it should hold, what was read of them, and what fills the slots that are empty."""

    asked: Rows  # [B], -1 where the sampler pads
    own: Rows  # [B], each slot's place among the pictures read, -1 where it has none
    rows: Rows  # [n] of the pictures read
    data: list[NDArray[np.uint8]]
    numbers: Draw
    sizes: NDArray[np.int32]  # [n, 2] (width, height), upright
    bad: dict[int, str]  # row -> reason

    def spoil(self, place: int, reason: str) -> None:
        """Takes a picture out that the decoder breaks on."""
        # Its bytes stay in `data`, so that the places of the others stay too; no slot refers to it any more.
        self.bad[int(self.rows[place])] = reason
        self.own[self.own == place] = -1

    def sound(self) -> Rows:
        """Places of the pictures that no decoder has broken on yet."""
        return np.flatnonzero([int(row) not in self.bad for row in self.rows])

    def valid_rows(self) -> Rows:
        """[B], -1 where a slot has no picture of its own."""
        return np.where(self.own >= 0, self.asked, -1)

    def encoded(self) -> Encoded:
        """The batch as the decoder takes it, with empty slots filled in turn by the sound pictures."""
        # The fillers take turns, so that no picture stands in every empty slot and weighs on BatchNorm's statistics.
        sound = self.own[self.own >= 0]
        if not sound.size:  # pictures that were read for filling only
            sound = self.sound()
        if not sound.size:
            return blank(len(self.asked))
        places, empty = self.own.copy(), np.flatnonzero(self.own < 0)
        places[empty] = np.resize(sound, len(empty))
        return Encoded([self.data[place] for place in places], self.numbers.take(places), self.sizes[places])


# What a batch without any sound picture is made of: 8 x 8 grey pixels.
BLANK_SIZE = 8
BLANK = np.frombuffer(b"P6 8 8 255\n" + b"\x80" * (3 * BLANK_SIZE * BLANK_SIZE), np.uint8)


def blank(number: int) -> Encoded:
    """A batch without any sound picture: all zeros, the mean colour, after normalisation."""
    numbers = Draw(
        np.zeros((number, 2, 3), np.float32), np.zeros((number, 3, 4), np.float32), np.zeros((number, 4), np.int32)
    )
    return Encoded([BLANK] * number, numbers, np.full((number, 2), BLANK_SIZE, np.int32))
