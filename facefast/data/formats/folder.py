"""Reads `root/<identity>/**/picture`: torchvision's ImageFolder, and most sets of faces."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from facefast.data.columns import blocks, gathered
from facefast.data.index import FaceIndex, number_classes, printable
from facefast.data.walk import entries, holds_picture, is_folder, list_pictures, split_of, top_entries
from facefast.runtime.exits import DataError


def read_folder(root: str | os.PathLike[str]) -> FaceIndex:
    """One identity per folder of `root`, with whatever folders in it; pictures beside them get -1.

    Names are sorted, so that labels do not depend on the file system. A folder without pictures is no class. Where the
    folders of `root` that hold pictures are named train, val or test, identities are the folders in those, and the
    splits are set.

    Raises:
        ValueError: there is no picture.
        DataError: `root` cannot be read, or some of its folders look like splits and others do not.
    """
    top = os.fsencode(root)
    parts = _parts(top)
    names: list[str] = []
    splits: list[int] = []

    def walk() -> Iterator[bytes]:
        for base in parts or [b""]:
            prefix, split = os.path.join(base, b"") if base else b"", split_of(base) or 0
            last, name = b"", ""
            for path in list_pictures(os.path.join(top, base), descend_first=True):
                identity, slash, _ = path.partition(b"/")
                if identity != last:
                    last, name = identity, printable(identity)
                names.append(name if slash else "")
                splits.append(split)
                yield prefix + path
        if parts:
            for path in list_pictures(top, descend_first=True):
                if path.partition(b"/")[0] not in parts:
                    names.append("")
                    splits.append(0)
                    yield path

    paths = gathered(walk())
    if not parts:
        _require_people(os.fspath(root), paths)
    labels, class_names = number_classes(names)
    return FaceIndex.build(root, paths, labels, class_names, splits=splits)


def recognises_folder(root: Path) -> bool:
    """Whether a folder right below `root` holds a picture somewhere."""
    return any(is_folder(entry) and holds_picture(entry.path) for entry in top_entries(root))


def _parts(top: bytes) -> list[bytes]:
    """The folders of `top` that are splits; empty if there are none.

    A person may be called Train or Val. What tells a split is that it holds folders of people, or that there are
    several.
    """
    folders = [entry.name for entry in top_entries(os.fsdecode(top)) if is_folder(entry)]
    if not any(split_of(name) is not None for name in folders):
        return []
    folders = [name for name in folders if holds_picture(os.path.join(top, name))]
    named = [name for name in folders if split_of(name) is not None]
    others = [name for name in folders if split_of(name) is None]
    split = any(_holds_people(os.path.join(top, name)) for name in named) or len({split_of(n) for n in named}) > 1
    if split and others:
        raise DataError(
            f"{os.fsdecode(top)} holds {_listed(named)}, which {'look' if len(named) > 1 else 'looks'} like a part of "
            f"a divided data set, and {_listed(others)} beside; move the others away, or, if all of them are people, "
            "rename the first or put their pictures right into their folders"
        )
    return named if split or any(split_of(name) == 0 for name in named) and not others else []


def _holds_people(folder: bytes) -> bool:
    try:
        return any(is_folder(entry) and holds_picture(entry.path) for entry in entries(folder))
    except OSError:
        return False


def _require_people(root: str, paths: NDArray[np.bytes_]) -> None:
    """Refuses or doubts a folder whose identities hold nothing but folders: it may be one level too high."""
    every = (path for _, some in blocks(paths) for path in some.tolist())
    if any(path.count(b"/") == 1 for path in every):  # nearly always the first one
        return
    inside = [path.split(b"/", 2) for path in paths.tolist() if b"/" in path]
    below = {(parts[0], parts[1]) for parts in inside if len(parts) == 3}
    identities = {parts[0] for parts in inside}
    if len(below) <= len(identities):
        return
    lower = sorted(name for _, name in below)
    if len(identities) == 1 and any(split_of(name) is not None for name in lower):
        (only,) = identities
        raise DataError(
            f"all pictures of {root} are in {_listed([only])}, which holds {_listed(lower)}; "
            f"give {os.path.join(root, os.fsdecode(only))} instead"
        )
    warnings.warn(
        f"{root}: people are taken to be {_listed(sorted(identities))}, whose pictures all lie in further folders "
        f"({_listed(lower)}); if those are the people, give a folder that holds them",
        stacklevel=3,
    )


def _listed(names: Sequence[bytes]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(printable(name) for name in names[:3]) + more
