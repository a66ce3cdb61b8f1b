"""Whether two files show one photograph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from facefast.data import FaceIndex, oracle
from facefast.labels.clustering import Floats
from facefast.labels.sheets import thumbnail

COPY_CORRELATION = 0.97
"""Of the grey thumbnails of two pictures: a photograph saved again, scaled or brightened stays above it."""
SIDE = 32
"""Of those thumbnails, in pixels."""


def copies_by_pixels(index: FaceIndex) -> Callable[[int, int], bool]:
    """Whether two rows show one photograph: grey thumbnails of it, saved again, are nearly proportional."""
    seen: dict[int, Floats | None] = {}

    def look(row: int) -> Floats | None:
        if row not in seen:
            try:
                picture = oracle.decode(oracle.read_bytes(index, row)).mean(2)
            except ValueError:
                seen[row] = None
            else:
                values = thumbnail(picture.astype(np.uint8), SIDE).astype(np.float32).ravel()
                # Mean 0 and deviation 1: the mean of a product is then the correlation, which brightness and contrast
                # do not change.
                seen[row] = (values - values.mean()) / max(float(values.std()), 1e-6)
        return seen[row]

    def same(one: int, other: int) -> bool:
        left, right = look(one), look(other)
        return left is not None and right is not None and float((left * right).mean()) >= COPY_CORRELATION

    return same
