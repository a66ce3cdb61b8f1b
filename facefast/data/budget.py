"""How many pictures may be lost before a run stops."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from facefast.data.index import FaceIndex
from facefast.runtime.exits import DataError

FEWEST_BAD = 10
"""Bad pictures below this number pass any budget but 0: one in a small set must not end a run."""


class BadDataError(DataError):
    """More pictures cannot be read than the run tolerates.

    Attributes:
        bad: absolute path -> reason, of every bad picture found so far.
    """

    def __init__(self, message: str, bad: Mapping[str, str]) -> None:
        super().__init__(message)
        self.bad = dict(bad)


class Budget:
    """What one rank has seen and lost of the pictures that it was to use.

    Args:
        rows: pictures of an epoch over all ranks.
        world: number of ranks.
        fraction: of those in the epochs begun that may be bad.
    """

    def __init__(self, index: FaceIndex, rows: int, world: int, fraction: float) -> None:
        self.index, self.rows, self.world, self.fraction = index, rows, world, fraction
        self.seen = self.lost = 0

    def count(self, asked: NDArray[np.bool_], empty: NDArray[np.bool_], bad: Mapping[int, str]) -> None:
        """Adds a batch: which of its slots were to hold a picture, and which hold none.

        Args:
            bad: row -> reason, of all that were found bad so far.

        Raises:
            BadDataError: they are more than the budget.
        """
        self.seen += int(asked.sum())
        self.lost += int((asked & empty).sum())
        few = min(FEWEST_BAD, self.rows) if self.fraction > 0 else 1
        share = self.rows / self.world
        begun = share * math.ceil(self.seen / share)  # whole epochs: bad pictures may lie side by side
        if len(bad) < few or self.lost <= self.fraction * begun:
            return
        reasons = ", ".join(f"{number} {reason}" for reason, number in Counter(bad.values()).most_common())
        paths = {self.index.path(row): reason for row, reason in bad.items()}
        first = [f"{path}: {reason}" for path, reason in list(paths.items())[:10]]
        raise BadDataError(
            f"{self.lost} of {self.seen} pictures could not be used, more than data.max_bad_fraction "
            f"{self.fraction:g} allows ({reasons}). "
            f"The first of them:\n  " + "\n  ".join(first) + "\nLook at them all with: "
            f"python -m facefast.index {self.index.root}; then mend or remove them, or raise --data.max-bad-fraction",
            paths,
        )
