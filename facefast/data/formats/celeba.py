"""Reads CelebA's official files, aligned or in the wild, as torchvision and Kaggle pack them too.

File formats: the README of CelebA (Liu et al., "Deep Learning Face Attributes in the Wild", 2015).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from facefast.data.formats.folder import list_pictures
from facefast.data.index import SPLITS, FaceIndex, number_classes
from facefast.runtime.exits import DataError

ALIGNED, WILD = "img_align_celeba", "img_celeba"
IDENTITY, PARTITION, ATTRIBUTES = "identity_CelebA", "list_eval_partition", "list_attr_celeba"
LANDMARKS = {ALIGNED: "list_landmarks_align_celeba", WILD: "list_landmarks_celeba"}
BOXES = "list_bbox_celeba"
WIDTHS = {IDENTITY: 1, PARTITION: 1, BOXES: 4} | dict.fromkeys(LANDMARKS.values(), 10)
"""Numbers on a line of each list; the attributes are as many as their header names."""
FOLDERS = ("", "Anno", "Eval", "Img")
"""The official download is sorted into these."""


def read_celeba(root: str | os.PathLike[str]) -> FaceIndex:
    """CelebA at `root`, in `root/celeba`, or around `root` if that is one of its picture folders.

    The aligned pictures are taken where both editions are there; give the folder `img_celeba`
    itself for the others. A row is a picture on disk, or one that every list names (its file is
    then missing, which the scan reports). Labels come from `identity_CelebA`, splits from the
    official partition (which is identity-disjoint), attributes from `list_attr_celeba` by its own
    header, with -1 as 0; landmarks and boxes are those of the edition. Lists may be .txt or .csv,
    with any spacing. A picture that a list leaves out keeps the neutral value (label -1, train,
    NaN), with a warning.

    Raises:
        ValueError: this is not CelebA, or there is no picture.
        DataError: a list is damaged or contradicts itself.
    """
    layout = _find(Path(root))
    if layout is None:
        raise ValueError(
            f"{os.fspath(root)} is not CelebA: it needs {ALIGNED} or {WILD}, and one of the lists "
            f"{IDENTITY}, {PARTITION} or {ATTRIBUTES} (.txt or .csv) beside it"
        )
    tables = {name: _read_table(path, WIDTHS.get(name)) for name, path in layout.lists.items()}
    if IDENTITY in tables:
        tables[IDENTITY].require(lambda v: v == np.rint(v), "a whole number")
    if PARTITION in tables:
        tables[PARTITION].require(lambda v: np.isin(v, range(len(SPLITS))), "0, 1 or 2")
    if BOXES in tables:
        tables[BOXES].require(lambda v: v[:, 2:] > 0, "a box with a width and a height above 0")

    names = _names(layout.pictures, list(tables.values()))

    def column(name: str, neutral: str) -> NDArray[np.float32] | None:
        return tables[name].column(names, neutral) if name in tables else None

    identities = column(IDENTITY, "their label is -1")
    splits = column(PARTITION, "they count as train")
    attributes = column(ATTRIBUTES, "their attributes are NaN")
    landmarks = column(LANDMARKS[layout.edition], "their landmarks are NaN")
    labels, class_names = number_classes(
        [""] * len(names) if identities is None else [str(int(n)) if n >= 0 else "" for n in identities[:, 0].tolist()],
        by_value=True,
    )
    folder = layout.pictures.relative_to(layout.base)
    return FaceIndex.build(
        layout.base,
        [os.fsencode(folder / name) for name in names],
        labels,
        class_names,
        splits=None if splits is None else np.nan_to_num(splits[:, 0]),
        landmarks=None if landmarks is None else landmarks.reshape(-1, 5, 2),
        attributes=None if attributes is None else _zero_and_one(attributes),
        attribute_names=() if attributes is None else tables[ATTRIBUTES].header,
        boxes=column(BOXES, "their boxes are NaN"),
    )


def recognises_celeba(root: Path) -> bool:
    """Whether `root` holds CelebA's pictures and one of its lists."""
    return _find(root) is not None


class _Layout(NamedTuple):
    base: Path
    pictures: Path
    edition: str
    lists: dict[str, Path]


def _find(root: Path) -> _Layout | None:
    root = root.absolute()
    if root.name in LANDMARKS:  # the picture folder itself, perhaps inside another of that name
        base = root.parent.parent if root.parent.name == root.name else root.parent
        places = [(base.parent if base.name == "Img" else base, [root.name])]
    else:
        places = [(root, [*LANDMARKS]), (root / "celeba", [*LANDMARKS])]
    for base, editions in places:
        for edition in editions:
            folders = [base / folder / edition for folder in FOLDERS]
            pictures = next((folder for folder in folders if folder.is_dir()), None)
            common = _lists(base, [IDENTITY, PARTITION, ATTRIBUTES])
            if pictures is not None and common:
                own = _lists(base, [LANDMARKS[edition]] + ([BOXES] if edition == WILD else []))
                nested = pictures / edition
                return _Layout(base, nested if nested.is_dir() else pictures, edition, common | own)
    return None


def _lists(base: Path, names: Sequence[str]) -> dict[str, Path]:
    return {
        name: base / folder / (name + extension)
        for name in names
        for folder in FOLDERS
        for extension in (".csv", ".txt")  # the official .txt has the last word
        if (base / folder / (name + extension)).is_file()
    }


def _names(pictures: Path, tables: Sequence[_Table]) -> list[str]:
    """Sorted names of the pictures on disk and of those that every list names."""
    names = [os.fsdecode(path) for path in list_pictures(os.fsencode(pictures))]
    agreed = set.intersection(*(set(table.rows) for table in tables))
    absent = agreed.difference(map(_stem, names))
    return sorted([*names, *(tables[0].files[tables[0].rows[stem]] for stem in absent)])


def _zero_and_one(attributes: NDArray[np.float32]) -> NDArray[np.float32]:
    """-1 and 1 as 0 and 1, with 0 as unknown between them; other columns as they are."""
    signs = np.isin(attributes, (-1, 0, 1)) | np.isnan(attributes)
    signed = signs.all(axis=0) & (attributes == -1).any(axis=0)
    unknown = np.where(attributes == 0, np.float32(np.nan), attributes)
    return np.where(signed, (unknown + 1) / 2, attributes)


@dataclass(frozen=True)
class _Table:
    """One list: a line per picture, found by the stem of its name (PNG editions keep the names)."""

    path: Path
    header: tuple[str, ...]
    files: list[str]
    rows: dict[str, int]
    values: NDArray[np.float32]  # [lines, numbers]

    def column(self, names: Sequence[str], neutral: str) -> NDArray[np.float32]:
        """[N, numbers] of `names`; NaN where there is no line, and a warning of what follows."""
        rows = np.fromiter((self.rows.get(_stem(name), -1) for name in names), np.int64, len(names))
        absent = np.flatnonzero(rows < 0)
        if len(absent) == len(names):
            raise DataError(
                f"{self.path} names none of the {len(names)} pictures (first: {names[0]}); its first line is for "
                f"{self.files[0] if self.files else 'nothing'}, and {self.values.shape[1]} numbers"
            )
        if len(absent) > 0:
            warnings.warn(
                f"{self.path} has no line for {len(absent)} of {len(names)} pictures "
                f"(first: {names[absent[0]]}); {neutral}",
                stacklevel=4,
            )
        values = self.values[rows]
        values[absent] = np.nan
        return values

    def require(self, valid: Callable[[NDArray[np.float32]], NDArray[np.bool_]], what: str) -> None:
        """Raises DataError unless every line is valid."""
        bad = np.flatnonzero(~valid(self.values).all(axis=1))
        if len(bad) > 0:
            raise DataError(
                f"{self.path}: {len(bad)} of {len(self.files)} lines are no good (first: "
                f"{self.files[bad[0]]} {_text(self.values[bad[0]])}); it must be {what}"
            )


def _read_table(path: Path, width: int | None) -> _Table:
    """Lines of a file name and `width` numbers, or as many as the header names.

    File names may hold spaces. The count of pictures on the first line is not used: it is wrong in
    edited copies.
    """
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if lines and "," in lines[-1]:
        lines = [line.replace(",", " ") for line in lines]
    if lines and lines[0].isdecimal():
        del lines[0]
    header: tuple[str, ...] = ()
    if lines and not _is_number(lines[0].split()[-1]):
        header = tuple(name for name in lines.pop(0).split() if name != "image_id")
    width = width or len(header)
    if width == 0:
        raise DataError(f"{path} has no header line to name its columns")

    # From the right: what is left of the numbers is the name, with whatever spaces it has.
    parts = [line.rsplit(None, width) for line in lines]
    try:
        complete = all(len(part) == width + 1 for part in parts)
        numbers = [float(value) for part in parts for value in part[1:]]
    except ValueError:
        complete = False
    if not complete:
        bad = [p for p in parts if len(p) <= width or not all(map(_is_number, p[1:]))]
        raise DataError(
            f"{path}: {len(bad)} of {len(lines)} lines are not a file name and {width} numbers "
            f"(first: {' '.join(bad[0])[:80]!r})"
        )
    values = np.array(numbers, np.float32).reshape(-1, width)
    files = [part[0] for part in parts]
    rows = {_stem(name): row for row, name in enumerate(files)}
    if len(rows) < len(files):  # named twice: allowed where both lines say the same
        last = np.array([rows[_stem(name)] for name in files])
        clash = np.flatnonzero((values != values[last]).any(axis=1))
        if len(clash) > 0:
            one, other = clash[0], last[clash[0]]
            raise DataError(
                f"{path} says different things of {len(clash)} pictures (first: {files[one]}, "
                f"{_text(values[one])} and {_text(values[other])}); keep one line for each"
            )
    return _Table(path, header, files, rows, values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _stem(name: str) -> str:
    """A name without its extension; "1.jpg 0", from a line with more numbers than its header has names, has none."""
    stem, extension = os.path.splitext(name)
    return name if " " in extension else stem


def _text(values: NDArray[np.float32]) -> str:
    return " ".join(f"{value:g}" for value in values[:10].tolist())
