"""Landmarks of the face that each photograph is of, found once: what a detector said is kept by content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from facefast.data import FaceIndex
from facefast.data.index import QUALITIES
from facefast.faces.detect import Detector, Seen, look, upright_sizes
from facefast.faces.quality import qualities, sharpness
from facefast.recipe import Reading
from facefast.runtime import files

SAVE_SECONDS = 30.0
"""Between two writings of what was found so far; what a detector that is stopped has not saved, it finds again."""
_SHAPES: dict[str, tuple[tuple[int, ...], Any]] = {
    "landmarks": ((5, 2), np.float32),
    "boxes": ((4,), np.float32),
    "quality": ((len(QUALITIES),), np.float32),
    "counts": ((), np.int16),
}
UNREADABLE = -1


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in N pictures, NaN where there is no face."""

    landmarks: NDArray[np.float32]
    """[N, 5, 2] of the face that the picture is of, as in `FaceIndex.landmarks`."""
    boxes: NDArray[np.float32]
    """[N, 4]"""
    quality: NDArray[np.float32]
    """[N, 6]"""
    counts: NDArray[np.int16]
    """[N] faces seen; `UNREADABLE` where the picture could not be decoded."""

    @classmethod
    def nothing(cls, rows: int) -> Found:
        """N pictures that nobody has looked at."""
        columns = {name: np.full((rows, *shape), np.nan, kind) for name, (shape, kind) in _SHAPES.items() if shape}
        return cls(**columns, counts=np.full(rows, UNREADABLE, np.int16))

    def __len__(self) -> int:
        return len(self.counts)

    def take(self, places: NDArray[np.int64]) -> Found:
        """The pictures at some places."""
        return Found(self.landmarks[places], self.boxes[places], self.quality[places], self.counts[places])

    def note(self, place: int, seen: Seen, width: int, height: int) -> None:
        """Writes down what was seen in a picture of so many pixels."""
        if seen.faces is None or seen.picture is None:
            return
        self.counts[place] = len(seen.faces)
        if not len(seen.faces):
            return
        main = seen.faces.take([seen.faces.main(width, height)])
        across, down = seen.picture.shape[1] / width, seen.picture.shape[0] / height
        sharp = np.array([sharpness(seen.picture, main.enlarged(across, down).boxes[0])], np.float32)
        self.landmarks[place], self.boxes[place] = main.landmarks[0], main.boxes[0]
        self.quality[place] = qualities(main.landmarks, main.scores, sharp)[0]


def known(index: FaceIndex) -> NDArray[np.bool_]:
    """[N] whether a row has all its landmarks."""
    if index.landmarks is None:
        return np.zeros(len(index), bool)
    return np.asarray(np.isfinite(index.landmarks).all((1, 2)))


def cache_file(root: str, detector: Detector) -> Path:
    """Where what `detector` says of the photographs below `root` is kept: in $XDG_CACHE_HOME/facefast."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "facefast"
    name = hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=8).hexdigest()
    return folder / f"faces-{name}-{detector.key}.npz"


def find_landmarks(
    index: FaceIndex,
    rows: NDArray[np.int64],
    detector: Detector,
    reading: Reading,
    cache: Path | None,
    tick: Callable[[], None] = lambda: None,
) -> Found:
    """What a detector sees in some rows of a scanned index, with a progress bar on a terminal.

    Args:
        cache: file in which answers are kept by the pictures' content; what it has is not looked for again, also after
            a stop in the middle. One that cannot be written is done without.
        tick: called between pictures.
    """
    keys = index.hashes[rows]
    distinct, first, own = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    known_keys, known = _load(cache)
    found = Found.nothing(len(distinct))
    place_of = {key.tobytes(): place for place, key in enumerate(known_keys)}
    have = np.array([place_of.get(key.tobytes(), -1) for key in distinct], np.int64)
    for name in _SHAPES:
        getattr(found, name)[have >= 0] = getattr(known, name)[have[have >= 0]]
    missing = np.flatnonzero(have < 0)
    missing = missing[np.argsort(first[missing])]  # in the order of the index: files lie side by side
    place = {int(rows[first[k]]): int(k) for k in missing}
    done, saved, pause = have >= 0, time.monotonic(), SAVE_SECONDS
    sizes = dict(zip(place, upright_sizes(index, rows[first[missing]]).tolist(), strict=True))
    try:
        with tqdm(total=len(missing), unit="pictures", desc="faces", disable=None, leave=False) as bar:
            for seen in look(index, rows[first[missing]], detector, reading):
                found.note(place[seen.row], seen, *sizes[seen.row])
                done[place[seen.row]] = True
                bar.update()
                tick()
                if time.monotonic() - saved > pause:
                    start = time.monotonic()
                    _save(cache, distinct[done], found.take(np.flatnonzero(done)))
                    saved = time.monotonic()
                    pause = max(SAVE_SECONDS, 20 * (saved - start))
    finally:
        if len(missing):
            _save(cache, distinct[done], found.take(np.flatnonzero(done)))
    return found.take(own.reshape(-1))


def _load(cache: Path | None) -> tuple[NDArray[np.uint64], Found]:
    """Keys [K, 2] and answers of a file; none where there is no sound one."""
    empty = np.zeros((0, 2), np.uint64), Found.nothing(0)
    if cache is None:
        return empty
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as stored:
            keys = stored["hashes"]
            columns = {name: stored[name] for name in _SHAPES}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return empty
    for name, (shape, kind) in _SHAPES.items():
        if columns[name].shape != (len(keys), *shape) or columns[name].dtype != kind:
            return empty
    if keys.shape != (len(keys), 2) or keys.dtype != np.uint64:
        return empty
    return keys, Found(**columns)


def _save(cache: Path | None, keys: NDArray[np.uint64], found: Found) -> None:
    """Adds answers to a file, which is replaced in one step."""
    if cache is None:
        return
    # Others may have added theirs since it was read.
    old_keys, old = _load(cache)
    ours = {key.tobytes() for key in keys}
    kept = np.array([place for place, key in enumerate(old_keys) if key.tobytes() not in ours], np.int64)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(found, name), getattr(old, name)[kept]]) for name in _SHAPES
    }
    columns["hashes"] = np.concatenate([keys, old_keys[kept]])
    with contextlib.suppress(OSError), files.replacing(cache, parents=True) as aside, open(aside, "wb") as file:
        np.savez(file, **columns)
