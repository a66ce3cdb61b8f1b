"""Faces of an index as small JPEGs, made when they are asked for and kept while there is room."""

from __future__ import annotations

import io
import math
import threading
from collections import OrderedDict
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from facefast.data import FaceIndex, oracle

FACE = 320
"""Pixels on a side of a face."""
WHOLE = 1280
"""Most pixels on the long side of a whole photograph."""
AROUND = 3.6
"""Side of the square around a face, in distances of the eyes, or of eyes and mouth where that is more: head and hair
help to know somebody again."""
ROOM = 64 << 20
"""Bytes of pictures that are kept."""
GREY = (128, 128, 128)

View = Literal["face", "whole"]
VIEWS = get_args(View)


class Portraits:
    """JPEGs of the rows of an index; for several threads."""

    def __init__(self, index: FaceIndex, room: int = ROOM) -> None:
        self.index, self.room = index, room
        self._kept: OrderedDict[tuple[int, View], bytes] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def get(self, row: int, view: View) -> bytes:
        """A picture; grey where its photograph cannot be read."""
        with self._lock:
            if (row, view) in self._kept:
                self._kept.move_to_end((row, view))
                return self._kept[row, view]
        made = self._make(row, view)
        with self._lock:
            if (row, view) not in self._kept:
                self._kept[row, view] = made
                self._held += len(made)
            while self._held > self.room:
                self._held -= len(self._kept.popitem(last=False)[1])
        return made

    def _make(self, row: int, view: View) -> bytes:
        try:
            picture = self._face(row) if view == "face" else self._whole(row)
        except ValueError:
            picture = Image.new("RGB", (FACE, FACE), GREY)
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=85)
        return content.getvalue()

    def _whole(self, row: int) -> Image.Image:
        picture = Image.fromarray(oracle.decode(oracle.read_bytes(self.index, row), least=WHOLE))
        picture.thumbnail((WHOLE, WHOLE))
        return picture

    def _face(self, row: int) -> Image.Image:
        encoded = oracle.read_bytes(self.index, row)
        square = face_square(self.index, row)
        if square is None:
            # Enlarged too: a picture of 112 pixels in a square of 320 would be hard to look at.
            picture = ImageOps.contain(Image.fromarray(oracle.decode(encoded, least=FACE)), (FACE, FACE))
            whole = Image.new("RGB", (FACE, FACE), GREY)
            whole.paste(picture, ((FACE - picture.width) // 2, (FACE - picture.height) // 2))
            return whole
        long = int(max(self.index.widths[row], self.index.heights[row]))
        # A large photograph is decoded no finer than its face is shown.
        picture = Image.fromarray(oracle.decode(encoded, least=math.ceil(FACE * long / square[2])))
        scale = max(picture.size) / long
        x, y, side = (value * scale for value in square)
        corners = (0, 0, FACE, FACE)
        if side > FACE:
            box = tuple(map(round, (x, y, x + side, y + side)))
            return picture.crop(box).resize(corners[2:], Image.Resampling.LANCZOS)  # type: ignore[arg-type]
        return picture.transform(
            corners[2:],
            Image.Transform.AFFINE,
            (side / FACE, 0, x, 0, side / FACE, y),
            Image.Resampling.BICUBIC,
            fillcolor=GREY,
        )


def face_square(index: FaceIndex, row: int) -> tuple[float, float, float] | None:
    """x, y and side in pixels of the square to show of a photograph; None where it is not known where the face is."""
    if index.landmarks is not None and np.isfinite(index.landmarks[row]).all():
        points = index.landmarks[row].astype(np.float64)
        eyes, mouth = points[:2].mean(0), points[3:].mean(0)
        unit = max(np.linalg.norm(points[1] - points[0]), np.linalg.norm(mouth - eyes))
        centre, side = (eyes + mouth) / 2, AROUND * float(unit)
    elif index.boxes is not None and np.isfinite(index.boxes[row]).all():
        x, y, width, height = index.boxes[row].astype(np.float64)
        centre, side = np.array([x + width / 2, y + height / 2]), 1.5 * float(max(width, height))
    else:
        return None
    # A picture that is cut out around its face already is shown whole.
    if not 2 <= side < min(index.widths[row], index.heights[row]):
        return None
    return float(centre[0] - side / 2), float(centre[1] - side / 2), side
