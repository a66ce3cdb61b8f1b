"""Reads `root/<identity>/**/picture`: torchvision's ImageFolder, and most sets of faces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from facefast.data.index import FaceIndex, number_classes, printable

EXTENSIONS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm "
    b".gif .avif .heic .heif .jp2 .j2k .jxl".split()
)
"""Names that claim to be a picture, in any case; what a file is, the scan finds from its content."""
SPLIT_FOLDERS = {b"train": 0, b"val": 1, b"valid": 1, b"validation": 1, b"test": 2}


def read_folder(root: str | os.PathLike[str]) -> FaceIndex:
    """One identity per folder of `root`, with whatever folders in it; pictures beside them get -1.

    Names are sorted, so that labels do not depend on the file system. A folder without pictures is
    no class. Where all folders of `root` are named train, val or test, identities are the folders
    in those, and the splits are set.

    Raises:
        ValueError: there is no picture.
    """
    top = os.fsencode(root)
    folders = [entry.name for entry in _entries(top) if entry.is_dir()]
    # Only where every folder is called so: a person may be named "val".
    divided = b"train" in folders and set(folders) <= set(SPLIT_FOLDERS)
    paths: list[bytes] = []
    names: list[str] = []
    splits: list[int] = []
    for base in folders if divided else [b""]:
        for path in list_pictures(os.path.join(top, base), descend_first=True):
            identity, slash, _ = path.partition(b"/")
            paths.append(os.path.join(base, path))
            names.append(printable(identity) if slash else "")
            splits.append(SPLIT_FOLDERS[base] if divided else 0)
    labels, class_names = number_classes(names)
    return FaceIndex.build(root, paths, labels, class_names, splits=splits)


def recognises_folder(root: Path) -> bool:
    """Whether a folder right below `root`, or below its train folder, holds a picture somewhere."""
    return any(b"/" in path for path in list_pictures(os.fsencode(root), descend_first=True))


def is_picture(name: bytes) -> bool:
    """Whether a file name has a picture's extension."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def list_pictures(folder: bytes, *, descend_first: bool = False) -> Iterator[bytes]:
    """Sorted paths, relative to `folder`, of everything below it that is named like a picture.

    Symbolic links are followed, but not back to a folder that encloses them; hidden files are left
    out. A folder named like a picture is listed for the scan to report, unless it is right in
    `folder` and `descend_first` lets it be an identity.
    """
    return _walk(folder, b"", (_identity(folder),), descend_first)


def _walk(folder: bytes, prefix: bytes, enclosing: tuple[tuple[int, int], ...], descend: bool) -> Iterator[bytes]:
    for entry in _entries(os.path.join(folder, prefix)):
        path = prefix + entry.name
        picture = is_picture(entry.name)
        if (descend or not picture) and entry.is_dir():
            here = _identity(entry.path)
            if here not in enclosing:
                yield from _walk(folder, path + b"/", (*enclosing, here), False)
        elif picture:
            yield path


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not entry.name.startswith(b".")),
            key=lambda entry: entry.name,
        )


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
