"""Small batches that a decoder takes together: what a run of it costs, whatever it decodes, is paid once for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from facefast.data.augment import Draw

MOST_PIXELS = 8_000_000
"""Of all pictures that are taken together, three bytes each: large ones gain nothing."""


class Encoded(NamedTuple):
    """One batch as the source hands it over.

    data: B arrays of uint8, each the bytes of one picture file (JPEG, PNG, WebP, BMP, TIFF).
    draw: the numbers of the B rows.
    sizes: int [B, 2], (width, height) of the pictures after EXIF orientation.
    """

    data: list[NDArray[np.uint8]]
    draw: Draw
    sizes: NDArray[np.int32]


Source = Callable[[], Encoded]
"""The next batch; raises StopIteration at the end."""


class Together:
    """A source of larger batches, made of consecutive ones of another source; and their images, apart again.

    Args:
        source: of the batches.
        most: pictures that are taken at once, where a batch alone has no more.
    """

    def __init__(self, source: Source, most: int) -> None:
        self._source, self._most = source, most
        self._left: Encoded | None = None  # was asked for, and found no room
        self._lengths: deque[list[int]] = deque()  # of the batches in each run that is under way
        self._ready: deque[Tensor] = deque()

    def reset(self, source: Source | None = None) -> None:
        """Begins again, with another source where there is one; for when every batch was handed out."""
        self._source = source or self._source
        self._left = None
        self._lengths.clear()
        self._ready.clear()

    def __call__(self) -> Encoded:
        """The next batches, as one.

        Raises:
            StopIteration: there is none.
        """
        first, self._left = self._left or self._source(), None
        taken, count, pixels = [first], len(first.data), _pixels(first)
        while count + len(first.data) <= self._most and pixels + _pixels(first) <= MOST_PIXELS:
            try:
                more = self._source()
            except StopIteration:  # is said again when the next ones are asked for
                break
            if count + len(more.data) > self._most or pixels + _pixels(more) > MOST_PIXELS:
                self._left = more
                break
            taken.append(more)
            count, pixels = count + len(more.data), pixels + _pixels(more)
        self._lengths.append([len(one.data) for one in taken])
        if len(taken) == 1:
            return first
        return Encoded(
            [data for one in taken for data in one.data],
            Draw(*(np.concatenate(parts) for parts in zip(*(one.draw for one in taken), strict=True))),
            np.concatenate([one.sizes for one in taken]),
        )

    def images(self, run: Callable[[], Tensor]) -> Tensor:
        """The images of the next batch.

        Args:
            run: gives those of the next batches that were taken together.
        """
        if not self._ready:
            self._ready.extend(run().split(self._lengths.popleft()))
        return self._ready.popleft()


def _pixels(encoded: Encoded) -> int:
    return int(encoded.sizes.astype(np.int64).prod(1).sum())
