"""Reads a folder of crops that `facefast align --crops` wrote: its index lies in it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from facefast.data.index import FaceIndex

SIGN, INDEX = "crops.json", "index.npz"
"""What marks the folder, and its index; the index comes last."""


def recognises_crops(root: Path) -> bool:
    """Whether the folder is marked as one of crops."""
    return (root / SIGN).is_file()


def read_crops(root: str | os.PathLike[str]) -> FaceIndex:
    """The index that lies in the folder, wherever that has been moved to.

    Raises:
        ValueError: it is not finished, or damaged.
    """
    if not (Path(root) / INDEX).is_file():
        raise ValueError(f"{root} is not finished: run the command that cuts these faces out once more, it goes on")
    return dataclasses.replace(FaceIndex.load(Path(root) / INDEX), root=os.path.abspath(root))
