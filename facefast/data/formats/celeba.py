"""Reads CelebA's official files, aligned or in the wild, as torchvision and Kaggle pack them too.

File formats: the README of CelebA (Liu et al., "Deep Learning Face Attributes in the Wild", 2015).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from facefast.data.formats.celeba_lists import Table, read_table, require_agreement, stem
from facefast.data.index import SPLITS, FaceIndex, number_classes, printable
from facefast.data.walk import is_folder, list_pictures, top_entries
from facefast.runtime.exits import DataError

ALIGNED, WILD = "img_align_celeba", "img_celeba"
IDENTITY, PARTITION, ATTRIBUTES = "identity_CelebA", "list_eval_partition", "list_attr_celeba"
LANDMARKS = {ALIGNED: "list_landmarks_align_celeba", WILD: "list_landmarks_celeba"}
BOXES = "list_bbox_celeba"
POINTS = tuple(f"{part}_{axis}" for part in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy")
COLUMNS = {
    IDENTITY: ("identity",),
    PARTITION: ("partition",),
    BOXES: ("x_1", "y_1", "width", "height"),
} | dict.fromkeys(LANDMARKS.values(), POINTS)
"""Numbers on a line of each list; the attributes are those that their header names."""
FARTHEST = 1 << 20
"""Of a landmark or a corner from the picture's, in pixels."""
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
            f"{IDENTITY}, {PARTITION} or {ATTRIBUTES} (.txt or .csv) beside it. If its folders are people, read them "
            "with --data.format folder"
        )
    tables: dict[str, Table] = {}
    for name, copies in layout.lists.items():
        tables[name], *others = (read_table(path, COLUMNS.get(name), whole=name == IDENTITY) for path in copies)
        for other in others:
            require_agreement(tables[name], other)
    if IDENTITY in tables:
        tables[IDENTITY].require(lambda v: v >= -1, "a whole number, and at least -1, which is nobody")
    if PARTITION in tables:
        tables[PARTITION].require(lambda v: np.isin(v, range(len(SPLITS))), "0, 1 or 2")
    if BOXES in tables:
        tables[BOXES].require(lambda v: v[:, 2:] > 0, "a box with a width and a height above 0")
    for name in (BOXES, *LANDMARKS.values()):
        if name in tables:
            tables[name].require(lambda v: np.isnan(v) | (abs(v) <= FARTHEST), f"pixels, from 0 to {FARTHEST} each way")
    if ATTRIBUTES in tables:
        tables[ATTRIBUTES].require(
            lambda v: np.isnan(v) | (v != np.rint(v)) | (v.astype(np.float32) == v),
            "a number that 32-bit floats can tell from its neighbours; leave the column out",
        )

    names = _names(layout.pictures, list(tables.values()))
    twins = {name for name, count in Counter(map(stem, names)).items() if count > 1}

    def column(name: str, neutral: str) -> NDArray[np.float32] | None:
        return tables[name].column(names, twins, neutral).astype(np.float32) if name in tables else None

    identities = tables[IDENTITY].column(names, twins, "their label is -1") if IDENTITY in tables else None
    splits = column(PARTITION, "they count as train")
    attributes = column(ATTRIBUTES, "their attributes are NaN")
    landmarks = column(LANDMARKS[layout.edition], "their landmarks are NaN")
    labels, class_names = number_classes(
        [""] * len(names) if identities is None else [str(n) if n >= 0 else "" for n in identities[:, 0].tolist()],
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
    """Whether `root` holds CelebA's pictures and one of its lists, or its folder of pictures alone: then the reader
    says what is missing, for that folder is nobody's."""
    if not root.is_dir():
        return False
    alone = any(is_folder(entry) and os.fsdecode(entry.name) in LANDMARKS for entry in top_entries(root))
    return alone or _find(root) is not None


class _Layout(NamedTuple):
    base: Path
    pictures: Path
    edition: str
    lists: dict[str, list[Path]]
    """Every copy of each list that is there, the official .txt first."""


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


def _lists(base: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    found = {}
    for name in names:
        places = [base / folder / (name + extension) for extension in (".txt", ".csv") for folder in FOLDERS]
        if there := [place for place in places if place.is_file()]:
            found[name] = there
    return found


def _names(pictures: Path, tables: Sequence[Table]) -> list[str]:
    """Sorted names of the pictures on disk and of those that every list names."""
    names = [os.fsdecode(path) for path in list_pictures(pictures)]
    there = set(map(stem, names))
    for table in tables:
        table.require_text(there)
    absent = set.intersection(*(set(table.rows) for table in tables)) - there
    missed = [tables[0].files[tables[0].rows[name]] for name in absent]
    outside = [name for name in missed if name.startswith("/") or ".." in name.split("/")]
    if outside:
        raise DataError(
            f"{tables[0].path} names {printable(os.fsencode(outside[0]))}, which leads out of {pictures}; lists name "
            "the pictures in that folder"
        )
    return sorted([*names, *missed])


def _zero_and_one(attributes: NDArray[np.float32]) -> NDArray[np.float32]:
    """-1 and 1 as 0 and 1, with 0 as unknown between them; other columns as they are."""
    signs = np.isin(attributes, (-1, 0, 1)) | np.isnan(attributes)
    signed = signs.all(axis=0) & (attributes == -1).any(axis=0)
    unknown = np.where(attributes == 0, np.float32(np.nan), attributes)
    return np.where(signed, (unknown + 1) / 2, attributes)
