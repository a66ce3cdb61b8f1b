"""Where the faces of photographs are: detectors, and photographs shown to one on all cores.

MTCNN is the default: it needs no file, and verification on photographs as they were taken is 1.0 points better with its
landmarks than with YuNet's (97.6 and 96.6 %, benchmarks/LOG.md), which takes a quarter of the time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from facefast.data import FaceIndex, oracle
from facefast.faces.found import Faces
from facefast.faces.mtcnn import Mtcnn
from facefast.faces.yunet import YuNet
from facefast.recipe import Reading

Picture = NDArray[np.uint8]
CHUNK = 8
"""Pictures that a thread decodes and shows to the detector at a time."""


class Detector(Protocol):
    """What finds faces; several threads may ask at a time."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def key(self) -> str:
        """A file name's part that changes with whatever changes an answer."""

    @property
    def side(self) -> int:
        """Pixels of the long side from which on it is shown a smaller picture."""

    def find(self, pictures: Sequence[Picture]) -> list[Faces]:
        """Every face of each picture (uint8 [H, W, 3], RGB), in its pixels, the surest first."""


def find_detector(name: str, device: torch.device | str = "cpu") -> Detector:
    """The detector that --detect names: mtcnn, or YuNet's .onnx file; auto is mtcnn.

    Raises:
        ValueError: a package is missing, or the file is not there or no detector.
    """
    return Mtcnn(device) if name in ("auto", Mtcnn.name) else YuNet(Path(name))


class Seen(NamedTuple):
    """What was seen in one picture."""

    row: int
    faces: Faces | None
    """In the photograph's own pixels; None where it could not be decoded."""
    picture: Picture | None
    """As the detector saw it."""


def upright_sizes(index: FaceIndex, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n, 2] width and height after EXIF orientation of scanned pictures."""
    sizes = np.stack([index.widths[rows], index.heights[rows]], 1).astype(np.int64)
    return np.where(index.orientations[rows, None] >= 5, sizes[:, ::-1], sizes)


def look(index: FaceIndex, rows: NDArray[np.int64], detector: Detector, reading: Reading) -> Iterator[Seen]:
    """Shows pictures to a detector, `reading.threads` of them at a time; the answers come in the order of `rows`.

    Photographs much larger than the detector wants are decoded at a reduced scale.
    """
    chunks = iter(np.split(rows, range(CHUNK, len(rows), CHUNK)) if len(rows) else [])
    before = torch.get_num_threads()
    with (
        ThreadPoolExecutor(reading.threads, "faces", torch.set_num_threads, (1,)) as pool,
        contextlib.ExitStack() as after,
    ):
        # A thread that is new takes the number that was set last: the workers' must not become everybody's.
        after.callback(torch.set_num_threads, before)
        waiting: deque[Future[list[Seen]]] = deque()
        for chunk in itertools.islice(chunks, 2 * reading.threads):
            waiting.append(pool.submit(_look_at, index, chunk, detector, reading))
        while waiting:
            yield from waiting.popleft().result()
            for chunk in itertools.islice(chunks, 1):
                waiting.append(pool.submit(_look_at, index, chunk, detector, reading))


def _look_at(index: FaceIndex, rows: NDArray[np.int64], detector: Detector, reading: Reading) -> list[Seen]:
    pictures: list[Picture | None] = []
    for row in rows.tolist():
        try:
            pictures.append(shown(oracle.read_bytes(index, row), detector.side, reading.max_pixels))
        except ValueError:  # a header can be sound and the rest not: whoever trains on it counts it
            pictures.append(None)
    found = iter(detector.find([picture for picture in pictures if picture is not None]))
    seen = []
    for row, picture, (width, height) in zip(rows.tolist(), pictures, upright_sizes(index, rows), strict=True):
        if picture is None:
            seen.append(Seen(row, None, None))
        else:
            faces = next(found).enlarged(width / picture.shape[1], height / picture.shape[0])
            seen.append(Seen(row, faces, picture))
    return seen


def shown(encoded: bytes, side: int, max_pixels: int = Reading.max_pixels) -> Picture:
    """A picture as a detector sees it: upright RGB, its long side at most `side` pixels.

    Raises:
        ValueError: it cannot be decoded.
    """
    picture = oracle.decode(encoded, max_pixels, side)
    height, width = picture.shape[:2]
    if max(height, width) <= side:
        return picture
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))
