"""What is on disk: `FaceIndex`, a column per fact and a row per picture. Readers make it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import facefast._scan as _scan
from facefast.data.columns import blocks, constant, filled, first_outside, once, taken
from facefast.data.crew import Crew
from facefast.recipe import IndexFacts, Reading
from facefast.runtime.exits import DataError
from facefast.runtime.files import replacing
from facefast.runtime.terminal import escape_letter
from facefast.runtime.untrusted import open_regular, read_npz

FAULTS: tuple[str, ...] = (*_scan.FAULTS, "no face was found")
"""Reasons by the numbers in `FaceIndex.faults`; 0 is sound. The last one is a detector's, the others the scan's."""
NO_FACE = len(FAULTS) - 1
QUALITIES = ("face_size", "sharpness", "yaw", "pitch", "roll", "score")
"""Columns of `FaceIndex.quality`: pixels, grey levels squared, degrees (three times), and the detector's score from 0
to 1; `facefast.faces.quality` says how they are measured."""


def advice(fault: str) -> str:
    """What to do about a fault, in brackets to be put behind its name; "" where there is no more to say."""
    return " (convert it to JPEG or PNG)" if fault.startswith("unsupported") else ""


FARTHEST = 1 << 24
"""Of a landmark or a corner from the picture's, in pixels."""
SPLITS = ("train", "val", "test")
"""Names by the numbers in `FaceIndex.splits`."""


@dataclass(frozen=True, eq=False)
class FaceIndex:
    """N pictures in columns. Frozen: every change is a new index that shares what it can.

    A row is a whole file, or a byte range of a container (.rec, .tar, .bin). Labels count
    identities from 0; -1 is an unlabelled picture.
    """

    root: str
    """Folder that `paths` are relative to."""
    paths: NDArray[np.bytes_]
    """[N] file names as the file system has them, with forward slashes."""
    offsets: NDArray[np.int64]
    """[N] first byte of the picture in its file; -1 is a whole file."""
    lengths: NDArray[np.int64]
    """[N] bytes of the picture; -1 is a whole file."""
    labels: NDArray[np.int32]
    """[N] place in `class_names`, or -1."""
    class_names: tuple[str, ...]
    splits: NDArray[np.uint8]
    """[N] place in `SPLITS`, the data set's own partition."""
    widths: NDArray[np.int32]
    """[N] pixels as stored, before EXIF orientation; 0 until scanned."""
    heights: NDArray[np.int32]
    orientations: NDArray[np.uint8]
    """[N] EXIF orientation, 1 to 8."""
    hashes: NDArray[np.uint64]
    """[N, 2] content hash; 0 until scanned, and where there is a fault."""
    faults: NDArray[np.uint8]
    """[N] place in `FAULTS`."""
    landmarks: NDArray[np.float32] | None = None
    """[N, 5, 2] left eye, right eye, nose, left and right corner of the mouth as seen in the
    picture: x and y in pixels after EXIF orientation, NaN where unknown."""
    attributes: NDArray[np.float32] | None = None
    """[N, A] values of `attribute_names`: 0 or 1, or a number such as an age; NaN: unknown."""
    attribute_names: tuple[str, ...] = ()
    boxes: NDArray[np.float32] | None = None
    """[N, 4] x, y, width and height of the face, like `landmarks`."""
    quality: NDArray[np.float32] | None = None
    """[N, 6] how well the face can be seen: the columns of `QUALITIES`, NaN where unknown."""

    @classmethod
    def build(
        cls,
        root: str | os.PathLike[str],
        paths: Sequence[bytes] | NDArray[np.bytes_],
        labels: ArrayLike | None,
        class_names: Sequence[str],
        *,
        offsets: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        splits: ArrayLike | None = None,
        **more: Any,
    ) -> FaceIndex:
        """An index that has not been scanned; what a reader does not know takes its neutral value.

        Raises:
            ValueError: there is not one picture.
        """
        rows = len(paths)
        if rows == 0:
            raise ValueError(f"no picture in {os.fspath(root)}; give the folder that holds the photographs")
        return cls(
            root=os.path.abspath(root),
            paths=np.asarray(paths, dtype=np.bytes_),
            offsets=filled(offsets, -1, rows, np.int64),
            lengths=filled(lengths, -1, rows, np.int64),
            labels=filled(labels, -1, rows, np.int32),
            class_names=tuple(class_names),
            splits=filled(splits, 0, rows, np.uint8),
            widths=constant(0, rows, np.int32),
            heights=constant(0, rows, np.int32),
            orientations=constant(1, rows, np.uint8),
            hashes=np.zeros((rows, 2), np.uint64),
            faults=constant(0, rows, np.uint8),
            **more,
        )

    def __post_init__(self) -> None:
        rows = len(self.paths)
        # Selections and replacements share columns: a write to one index would change the others.
        for name, column in self._columns().items():
            assert len(column) == rows, f"column {name} has {len(column)} rows, paths has {rows}"
            column.flags.writeable = False
        assert rows == 0 or -1 <= self.labels.min() <= self.labels.max() < len(self.class_names)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """Identities that labels may name; those of another selection included, until `compact`."""
        return len(self.class_names)

    def path(self, row: int) -> str:
        """Absolute path of the file that holds picture `row`."""
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[row])))

    def name(self, row: int) -> str:
        """The picture's name for people: its path from the root, and its place in a container."""
        path = printable(bytes(self.paths[row]))
        return path if self.offsets[row] < 0 else f"{path}@{self.offsets[row]}"

    def fingerprint(self) -> str:
        """Hex digest of what training depends on: paths, labels, splits, landmarks, content.

        The root is left out, so that a data set may move.
        """
        digest = hashlib.blake2b(digest_size=16)
        for start, some in blocks(self.paths):
            digest.update((b"\0" if start else b"") + b"\0".join(some.tolist()))
        digest.update("\0".join(self.class_names).encode())
        for name in ("offsets", "lengths", "labels", "splits", "hashes", "landmarks", "attributes"):
            column = getattr(self, name)
            digest.update(name.encode())
            for _, some in () if column is None else blocks(column):
                digest.update(np.ascontiguousarray(some).data)
        return digest.hexdigest()

    def facts(self) -> IndexFacts:
        """What a training plan needs to know of this index."""
        unlabelled = int((self.labels < 0).sum())
        return IndexFacts(len(self), self.num_classes, self.fingerprint(), self.class_names, unlabelled)

    def identities(self) -> list[str]:
        """[N] whose picture each row is, by name; empty where that is not known."""
        return [self.class_names[label] if label >= 0 else "" for label in self.labels.tolist()]

    def select(self, which: NDArray[np.bool_] | NDArray[np.integer[Any]] | Sequence[int]) -> FaceIndex:
        """The rows of a mask [N] or of row numbers, in that order; labels and class names stay."""
        return dataclasses.replace(self, **taken(self._columns(), which))

    def compact(self) -> FaceIndex:
        """The same rows, with labels and class names of the identities that have a picture here alone."""
        present, labels = np.unique(self.labels, return_inverse=True)
        unlabelled = np.count_nonzero(present < 0)  # -1 sorts first: 1 where it occurs, and stays -1
        return dataclasses.replace(
            self,
            labels=(labels - unlabelled).astype(np.int32),
            class_names=tuple(self.class_names[k] for k in present[unlabelled:]),
        )

    def sound(self) -> FaceIndex:
        """The rows without a fault."""
        return self.select(self.faults == 0)

    def split_per_identity(self, fraction: float, seed: int) -> tuple[FaceIndex, FaceIndex]:
        """(train, test) with about `fraction` of every identity's pictures in test: closed set.

        An identity with one picture stays in train, as do unlabelled pictures; any other has at
        least one picture on each side.

        Raises:
            ValueError: `fraction` is outside [0, 1).
        """
        _check_fraction(fraction)
        _, own, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        wanted = np.maximum(np.rint(counts * fraction), 1) if fraction > 0 else np.zeros(len(counts))
        wanted = np.minimum(wanted, counts - 1)[own]
        test = (self.random_places(seed) < wanted) & (self.labels >= 0)
        return self.select(~test), self.select(test)

    def random_places(self, seed: int) -> NDArray[np.int64]:
        """[N] each row's place in a random order of its identity's pictures."""
        # Sorted by label and, within it, by a random number: the distance from a label's first row is the place.
        order = np.lexsort((_generator(seed).random(len(self)), self.labels))
        _, first, counts = np.unique(self.labels[order], return_index=True, return_counts=True)
        places = np.empty(len(self), np.int64)
        places[order] = np.arange(len(self)) - np.repeat(first, counts)
        return places

    def split_identities(self, fraction: float, seed: int) -> tuple[FaceIndex, FaceIndex]:
        """(kept, held out) with about `fraction` of the identities held out: open set.

        Both sides have at least one identity; unlabelled pictures are kept.

        Raises:
            ValueError: `fraction` is outside [0, 1), or there are fewer than two identities.
        """
        _check_fraction(fraction)
        present = np.unique(self.labels[self.labels >= 0])
        if fraction > 0 and len(present) < 2:
            raise ValueError(f"the number of identities is {len(present)}; at least 2 are needed to split them in two")
        count = min(max(round(len(present) * fraction), 1), len(present) - 1) if fraction > 0 else 0
        held = np.isin(self.labels, _generator(seed).permutation(present)[:count])
        return self.select(~held), self.select(held)

    def scanned(
        self,
        threads: int = 0,
        max_pixels: int = Reading.max_pixels,
        progress: Callable[[int], None] | None = None,
        crew: Crew | None = None,
    ) -> FaceIndex:
        """This index with the size, orientation, content hash and fault of every picture.

        Args:
            threads: of each process; 0 is one per core.
            max_pixels: larger pictures get the fault "too many pixels".
            progress: called now and then with the number of pictures done.
            crew: the ranks that share the pictures; this process alone without.

        Raises:
            DataError: `root` cannot be opened.
        """
        crew = crew or Crew()
        cuts = np.arange(crew.size + 1) * len(self) // crew.size
        pieces = [
            (self.root, *(c[start:end] for c in (self.paths, self.offsets, self.lengths)), threads, max_pixels)
            for start, end in itertools.pairwise(cuts.tolist())
        ]
        # Rank 0 shows its own part for all of them.
        show = progress and (lambda done: progress(min(len(self), done * crew.size)))
        found = crew.each(_scan_rows, pieces, here=functools.partial(_scan_rows, progress=show))
        columns = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        return dataclasses.replace(
            self,
            widths=columns["width"],
            heights=columns["height"],
            orientations=once(columns["orientation"]),
            hashes=columns["hash"],
            faults=once(columns["fault"]),
        )

    def save(self, path: str | os.PathLike[str], *, parents: bool = False, **extra: str) -> None:
        """Writes the index, and `extra` strings beside it, to one .npz file in one step.

        Args:
            parents: make folders on the way to it.

        Raises:
            StorageError: it cannot be written; a file that was there is as it was.
        """
        arrays: dict[str, Any] = self._columns() | {
            "root": np.array(self.root),
            "class_names": np.array(self.class_names, np.str_),
            "attribute_names": np.array(self.attribute_names, np.str_),
            **{name: np.array(text) for name, text in extra.items()},
        }
        needed = sum(array.nbytes for array in arrays.values())
        with replacing(Path(path), needed, parents=parents) as aside, open(aside, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FaceIndex:
        """Reads what `save` wrote; nothing in the file is executed.

        Raises:
            ValueError: the file is not an index.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        try:
            with open_regular(path) as file:
                arrays = read_npz(file)
            stored: dict[str, Any] = {name: arrays[name] for name in names if name in arrays}
            stored["root"] = str(stored["root"])
            for name in ("class_names", "attribute_names"):
                stored[name] = tuple(stored[name].tolist())
            arrays.clear()
            _check_stored(stored)
            for name, column in stored.items():
                if isinstance(column, np.ndarray) and column.ndim == 1 and name != "paths":
                    stored[name] = once(column)
            return cls(**stored)
        except Exception as error:  # a damaged archive raises nearly anything
            raise ValueError(
                f"{os.fspath(path)} is no saved index ({error}); "
                "write one with python -m facefast.index ROOT --out FILE"
            ) from error

    def _columns(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


@dataclass(frozen=True, eq=False)
class PairSet:
    """P verification pairs of rows of one `FaceIndex`."""

    left: NDArray[np.int64]
    """[P] rows."""
    right: NDArray[np.int64]
    """[P] rows."""
    same: NDArray[np.bool_]
    """[P] whether both are one identity."""
    folds: NDArray[np.int16]
    """[P] fold of the cross-validation that the pair is tested in."""

    def __post_init__(self) -> None:
        assert len(self.left) == len(self.right) == len(self.same) == len(self.folds)

    def __len__(self) -> int:
        return len(self.left)

    @classmethod
    def of(cls, left: ArrayLike, right: ArrayLike, same: NDArray[np.bool_], num_folds: int = 10) -> PairSet:
        """Pairs divided into folds in their order, those of each kind evenly: LFW's own division.

        There are never more folds than pairs of the rarer kind, but for a set of one kind.
        """
        rarer = int(min(np.count_nonzero(same), np.count_nonzero(~same)))
        num_folds = max(1, min(num_folds, rarer))
        folds = np.zeros(len(same), np.int16)
        for kind in (True, False):
            place = np.flatnonzero(same == kind)
            folds[place] = np.arange(len(place)) * num_folds // max(1, len(place))
        return cls(np.asarray(left, np.int64), np.asarray(right, np.int64), same, folds)

    @classmethod
    def random(cls, index: FaceIndex, num_pairs: int, num_folds: int = 10, seed: int = 0) -> PairSet:
        """Distinct pairs drawn evenly from all there are, half of one identity, half of two.

        Where an index has too few of one kind, it gives those and as many of the other.

        Raises:
            ValueError: no identity has two pictures, or there is only one identity.
        """
        rows = np.flatnonzero(index.labels >= 0)
        rows = rows[np.argsort(index.labels[rows], kind="stable")]
        _, first, counts = np.unique(index.labels[rows], return_index=True, return_counts=True)
        inside = counts * (counts - 1) // 2
        total = len(rows) * (len(rows) - 1) // 2
        half = min(num_pairs // 2, int(inside.sum()), total - int(inside.sum()))
        if half < 1:
            raise ValueError(
                f"{num_pairs} pairs cannot be drawn from {len(rows)} pictures of {len(counts)} "
                "identities; at least 2 identities, one of them with 2 pictures, are needed"
            )
        generator = _generator(seed)
        # The pairs of one identity are numbered through, identity by identity; numbers are drawn without replacement
        # and turned back into pairs, so no list of all pairs is ever made.
        chosen = generator.choice(int(inside.sum()), half, replace=False)
        identity = np.searchsorted(np.cumsum(inside), chosen, side="right")
        left, right = _triangle(chosen - (np.cumsum(inside) - inside)[identity])
        same = np.stack([rows[first[identity] + left], rows[first[identity] + right]])
        different = rows[_pairs_across(np.repeat(np.arange(len(counts)), counts), half, generator)]
        pairs = np.concatenate([same, different], axis=1)
        return cls.of(pairs[0], pairs[1], np.arange(2 * half) < half, num_folds)


def printable(name: bytes) -> str:
    """A file name as text that can be printed and saved, whatever its bytes; `escaped` where that is needed."""
    text = name.decode("utf-8", "surrogateescape")
    return text if text.isascii() and text.isprintable() and "\\" not in text else escaped(text)


def escaped(text: str) -> str:
    """Text without line ends, terminal codes and marks that turn the direction of writing: "\\n", "\\x1b" instead.

    Backslashes are doubled, so that different texts stay different.
    """
    return "".join("\\\\" if letter == "\\" else escape_letter(letter) for letter in text)


def number_classes(names: Sequence[str], *, by_value: bool = False) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Labels [N] and class names for one identity name per row, "" for none.

    Only names that occur get a number, in the order of their characters, as torchvision's
    ImageFolder counts, or `by_value` numbers first and by size.
    """

    def value(name: str) -> tuple[bool, int, str, str]:
        if name.isascii() and name.isdecimal():  # no `int`, which refuses more than 4300 digits
            digits = name.lstrip("0")
            return (False, len(digits), digits, name)
        return (True, 0, "", name)

    present = sorted(set(names) - {""}, key=value if by_value else None)
    number = {name: k for k, name in enumerate(present)} | {"": -1}
    return np.fromiter((number[name] for name in names), np.int32, len(names)), tuple(present)


def _pairs_across(groups: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """[2, count] different pairs of places whose `groups` differ, drawn evenly."""
    found = np.zeros(0, np.int64)
    # Drawn until enough are different people's: nearly all are, where there are many identities. A pair is sorted and
    # becomes one number, by which repeats are found; the first of each stays in its place.
    while len(found) < count:
        draw = np.sort(generator.integers(len(groups), size=(2, 2 * count)), axis=0)
        keys = draw[0] * len(groups) + draw[1]
        found = np.concatenate([found, keys[groups[draw[0]] != groups[draw[1]]]])
        found = found[np.sort(np.unique(found, return_index=True)[1])]
    return np.stack(np.divmod(found[:count], len(groups)))


def _triangle(number: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(i, j), i < j, of the pairs (0, 1), (0, 2), (1, 2), (0, 3), ... by number."""
    j = ((1 + np.sqrt(8 * number.astype(np.float64) + 1)) / 2).astype(np.int64)
    j += j * (j + 1) // 2 <= number  # the root may be one off either way
    j -= j * (j - 1) // 2 > number
    return number - j * (j - 1) // 2, j


def _check_stored(stored: dict[str, Any]) -> None:
    """Refuses columns that are not what `FaceIndex` says of them: the file may be damaged, or another program's."""
    rows = len(stored["paths"])
    shapes = {"hashes": (2,), "landmarks": (5, 2), "boxes": (4,), "quality": (len(QUALITIES),)}
    shapes |= {"attributes": (len(stored["attribute_names"]),)}
    types = {
        "paths": "S", "offsets": "i8", "lengths": "i8", "labels": "i4", "splits": "u1", "widths": "i4", "heights": "i4",
        "orientations": "u1", "hashes": "u8", "faults": "u1", "landmarks": "f4", "attributes": "f4", "boxes": "f4",
        "quality": "f4",
    }  # fmt: skip
    for name, kind in types.items():
        column = stored.get(name)
        if column is None:
            if name in ("landmarks", "attributes", "boxes", "quality"):
                continue
            raise ValueError(f"it has no column {name}")
        expected = (rows, *shapes.get(name, ()))
        if column.shape != expected or column.dtype.str.lstrip("<|")[: len(kind)] != kind:
            raise ValueError(f"column {name} is {column.dtype} {column.shape}, and must be {kind} {expected}")
    limits = {"labels": (-1, len(stored["class_names"])), "faults": (0, len(FAULTS)), "splits": (0, len(SPLITS))}
    for name, (least, end) in {**limits, "orientations": (1, 9)}.items():
        if rows and not least <= stored[name].min() <= stored[name].max() < end:
            raise ValueError(f"column {name} has values outside {least} to {end - 1}")
    if min(stored[name].min(initial=0) for name in ("widths", "heights")) < 0:
        raise ValueError("a picture's width or height is below 0")
    if min(stored[name].min(initial=-1) for name in ("offsets", "lengths")) < -1:
        raise ValueError("a picture's place in its file is below 0")
    for name, most in (("landmarks", FARTHEST), ("boxes", FARTHEST), ("attributes", np.finfo(np.float32).max)):
        column = stored.get(name)
        if column is not None and any((abs(some) > most).any() for _, some in blocks(column)):
            raise ValueError(f"column {name} has numbers beyond {most:g}")
    outside = first_outside(stored["paths"])
    if outside is not None:
        raise ValueError(f"it names {printable(outside)}, which leads out of the folder {escaped(stored['root'])}")
    if not all(isinstance(name, str) for name in (*stored["class_names"], *stored["attribute_names"])):
        raise ValueError("names are no texts")
    if len(set(stored["class_names"])) < len(stored["class_names"]):
        raise ValueError("it has a class name twice")


def _scan_rows(piece: Any, progress: Callable[[int], None] | None = None) -> Any:
    """What `_scan.scan` finds of (root, paths, offsets, lengths, threads, most pixels)."""
    root, paths, offsets, lengths, threads, max_pixels = piece
    try:
        return _scan.scan(os.fsencode(root), paths, offsets, lengths, threads, max_pixels, progress)
    except OSError as error:
        raise DataError(
            f"the folder {escaped(root)} cannot be opened ({error.strerror}); if it was moved, index it anew"
        ) from error


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction to split off is {fraction}; it must lie in [0, 1)")


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))
