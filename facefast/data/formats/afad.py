"""Reads AFAD, `root/<age>/<gender>/picture`: ages and genders of people without names.

Source: Niu et al., "Ordinal Regression with Multiple Output CNN for Age Estimation", CVPR 2016.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from facefast.data.formats.folder import list_pictures
from facefast.data.index import FaceIndex
from facefast.runtime.exits import DataError

GENDERS = {"111": 1.0, "male": 1.0, "112": 0.0, "female": 0.0}
"""Folder names for men and women: AFAD's own codes, and words."""
_AGE = re.compile(r"\d{1,3}")


def read_afad(root: str | os.PathLike[str]) -> FaceIndex:
    """Every picture with the attributes `age` (years) and `male` (0 or 1), and label -1.

    Raises:
        ValueError: there is no picture.
        DataError: a picture is not in a folder of an age and one of a gender.
    """
    paths = list(list_pictures(os.fsencode(root)))
    parts = [os.fsdecode(path).split("/") for path in paths]
    bad = [path for path in parts if not _fits(path)]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(paths)} pictures in {os.fspath(root)} are not in <age>/<gender>/ "
            f"(first: {'/'.join(bad[0])}); genders are {', '.join(GENDERS)}"
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
    """Whether every folder in `root` is an age that holds folders of genders."""
    ages = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return bool(ages) and all(
        _AGE.fullmatch(age.name) and any(gender.name.lower() in GENDERS for gender in age.iterdir()) for age in ages
    )


def _fits(path: list[str]) -> bool:
    return len(path) >= 3 and _AGE.fullmatch(path[0]) is not None and path[1].lower() in GENDERS
