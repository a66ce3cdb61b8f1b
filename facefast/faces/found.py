"""The faces of one picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SURE = 0.9
"""Score from which on a face is hardly ever a pattern that looks like one."""


@dataclass(frozen=True, eq=False)
class Faces:
    """F faces of a picture, in pixels of the upright picture whose centres are whole numbers."""

    boxes: Floats
    """[F, 4] x, y, width and height."""
    landmarks: Floats
    """[F, 5, 2] left eye, right eye, nose, left and right corner of the mouth, as seen in the picture."""
    scores: Floats
    """[F] how sure the detector is, in [0, 1]."""

    @classmethod
    def none(cls) -> Faces:
        """Of a picture without a face."""
        return cls(np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32), np.zeros(0, np.float32))

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, places: NDArray[np.int64] | list[int]) -> Faces:
        """Some of the faces, in that order."""
        return Faces(self.boxes[places], self.landmarks[places], self.scores[places])

    def enlarged(self, across: float, down: float) -> Faces:
        """The same faces in a picture with so many times the pixels across and down."""
        factor = np.array([across, down], np.float32)
        # An edge between pixels is half a pixel from the centres beside it.
        landmarks = (self.landmarks + 0.5) * factor - 0.5
        corners = (self.boxes[:, :2] + 0.5) * factor - 0.5
        return Faces(np.concatenate([corners, self.boxes[:, 2:] * factor], 1), landmarks, self.scores)

    def main(self, width: int, height: int) -> int:
        """The face that a picture of so many pixels is of: the largest of the sure ones, those off the middle counting
        for less.

        Its side is weighed with 1 in the middle of the picture and 0 at a corner.

        Raises:
            ValueError: there is no face.
        """
        if not len(self):
            raise ValueError("a picture without a face is of nobody")
        sure = self.scores >= SURE if (self.scores >= SURE).any() else np.ones(len(self), bool)
        middle = np.array([width, height], np.float32) / 2
        offset = np.linalg.norm(self.boxes[:, :2] + self.boxes[:, 2:] / 2 - middle, axis=1)
        weight = np.maximum(1 - offset / np.linalg.norm(middle), 0.01)
        return int(np.argmax(np.where(sure, np.sqrt(self.boxes[:, 2] * self.boxes[:, 3]) * weight, -1)))
