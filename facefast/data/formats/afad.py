"""Reads AFAD, `root/<age>/<gender>/picture`: ages and genders of people without names.

Source: Niu et al., "Ordinal Regression with Multiple Output CNN for Age Estimation", CVPR 2016.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from facefast.data.index import FaceIndex, printable
from facefast.data.walk import entries, holds_picture, is_folder, list_pictures, top_entries
from facefast.runtime.exits import DataError

GENDERS = {b"111": 1.0, b"male": 1.0, b"112": 0.0, b"female": 0.0}
"""Folder names for men and women: AFAD's own codes, and words."""
OLDEST = 130
"""Years; a folder with a higher number is nobody's age."""
_AGE = re.compile(rb"[0-9]{1,3}")


def read_afad(root: str | os.PathLike[str]) -> FaceIndex:
    """Every picture with the attributes `age` (years) and `male` (0 or 1), and label -1.

    Raises:
        ValueError: there is no picture.
        DataError: a picture is not in a folder of an age and one of a gender.
    """
    paths = list(list_pictures(root))
    parts = [path.split(b"/") for path in paths]
    bad = [path for path in parts if not _fits(path)]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(paths)} pictures in {os.fspath(root)} are not in <age>/<gender>/ "
            f"(first: {printable(b'/'.join(bad[0]))}); genders are {printable(b', '.join(GENDERS))}, ages 0 to "
            f"{OLDEST}. Move them away, or, if the folders are people, read them with --data.format folder"
        )
    attributes = [[float(age), GENDERS[gender.lower()]] for age, gender, *_ in parts]
    return FaceIndex.build(
        root,
        paths,
        None,
        (),
        attributes=np.array(attributes, np.float32).reshape(-1, 2),
        attribute_names=("age", "male"),
    )


def recognises_afad(root: Path) -> bool:
    """Whether a folder in `root` is an age that holds folders of genders with pictures; what else is there does not
    make it people, for then ages would be."""
    return any(
        _is_age(age.name) and is_folder(age) and any(_is_gender_with_pictures(entry) for entry in _inside(age))
        for age in top_entries(root)
    )


def _inside(folder: os.DirEntry[bytes]) -> list[os.DirEntry[bytes]]:
    try:
        return entries(folder.path)
    except OSError:
        return []


def _is_gender_with_pictures(entry: os.DirEntry[bytes]) -> bool:
    return entry.name.lower() in GENDERS and is_folder(entry) and holds_picture(entry.path)


def _is_age(name: bytes) -> bool:
    return _AGE.fullmatch(name) is not None and int(name) <= OLDEST


def _fits(path: list[bytes]) -> bool:
    return len(path) >= 3 and _is_age(path[0]) and path[1].lower() in GENDERS
