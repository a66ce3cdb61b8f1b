"""Whether two files show one photograph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facefast.data import FaceIndex, oracle
from facefast.labels.registration import SIDE, Grey, overlay

EVERYWHERE = 0.8
"""Least `Overlay.everywhere` of a copy."""
CORE = 0.9
"""Least `Overlay.core` of a copy. Measured on celebrities' photographs: 98 % of crops that keep 70 % of each side,
mirrored, scaled, compressed and brightened reach it, and 3 % of the same pictures whose mouth and eye have moved by a
tenth of the distance between the eyes."""
AROUND = 1.25
"""Half a side of what is compared around a face, in faces."""
TILTED = 5.0
"""Degrees from which a face is set upright first: laying over finds turns of some eight."""
KEPT = 4096
"""Pictures that are remembered at a time: 64 KiB each."""


def copies_by_pixels(index: FaceIndex, sizes: NDArray[np.floating] | None = None) -> Callable[[int, int], bool]:
    """Whether two rows show one photograph: crops of it, mirrored or not, agree piece by piece once they lie over each
    other (`facefast.labels.registration`).

    Of a photograph with landmarks the surroundings of the face are compared, of others the whole. Either is laid over
    the other, since what is found depends on which lies below; one way that agrees is enough.

    Args:
        sizes: [N] pixels on a side of each face, where the index has landmarks; None compares whole pictures.
    """
    seen: dict[int, Grey | None] = {}

    def look(row: int) -> Grey | None:
        if row not in seen:
            if len(seen) >= KEPT:
                del seen[next(iter(seen))]
            try:
                seen[row] = _grey(index, row, float("nan") if sizes is None else float(sizes[row]))
            except ValueError:
                seen[row] = None
        return seen[row]

    def same(one: int, other: int) -> bool:
        left, right = look(one), look(other)
        if left is None or right is None:
            return False
        # Not one way for whichever row comes first: whether two files are copies must not depend on their order.
        return any(
            found is not None and found.everywhere >= EVERYWHERE and found.core >= CORE
            for found in (overlay(*pair) for pair in ((left, right), (right, left)))
        )

    return same


def _grey(index: FaceIndex, row: int, size: float) -> Grey:
    picture = Image.fromarray(oracle.decode(oracle.read_bytes(index, row))).convert("L")
    if index.landmarks is not None and np.isfinite(size):
        landmarks, reach = index.landmarks[row], AROUND * size
        right, down = landmarks[1] - landmarks[0]
        tilt = float(np.degrees(np.arctan2(down, right)))
        if abs(tilt) > TILTED:
            picture = picture.rotate(tilt, Image.Resampling.BICUBIC, center=tuple(landmarks.mean(0).tolist()))
        low = np.maximum(landmarks.mean(0) - reach, 0).astype(int)
        high = np.minimum(landmarks.mean(0) + reach, picture.size).astype(int)
        if (high - low >= 2).all():  # landmarks may lie outside
            picture = picture.crop((*low.tolist(), *high.tolist()))
    scale = SIDE / max(picture.size)
    shape = max(2, round(picture.width * scale)), max(2, round(picture.height * scale))
    way = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    return np.asarray(picture.resize(shape, way), np.float32)
