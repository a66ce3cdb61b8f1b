"""Other views of an index: several data sets as one, fewer pictures, fewer names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facefast.data.index import QUALITIES, FaceIndex


def joined(first: FaceIndex, others: Sequence[FaceIndex]) -> FaceIndex:
    """One index over the pictures of several data sets.

    The identities of `first` stay; rows of the others have none, since equal names in two sets need not be one person.
    Attributes are the same where their names are, in any case ("Male" of CelebA, "male" of AFAD); values that a set
    does not have are NaN, as are its landmarks.
    """
    if not others:
        return first
    parts = (first, *others)
    # Paths are kept relative to a root: the deepest folder that encloses all sets becomes it.
    root = os.path.commonpath([part.root for part in parts])
    names: dict[str, str] = {}
    for part in parts:
        for name in part.attribute_names:
            names.setdefault(name.lower(), name)
    sizes = [len(part) for part in parts]

    def column(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(part, name) for part in parts])

    whole = FaceIndex.build(
        root,
        np.concatenate([_paths_from(part, root) for part in parts]),
        np.concatenate([first.labels, np.full(sum(sizes[1:]), -1, np.int32)]),
        first.class_names,
        offsets=column("offsets"),
        lengths=column("lengths"),
        splits=column("splits"),
        landmarks=_stacked(parts, "landmarks", (5, 2)),
        boxes=_stacked(parts, "boxes", (4,)),
        quality=_stacked(parts, "quality", (len(QUALITIES),)),
        attributes=np.concatenate([_values(part, tuple(names)) for part in parts]) if names else None,
        attribute_names=tuple(names.values()),
    )
    scanned: dict[str, Any] = {name: column(name) for name in ("widths", "heights", "orientations", "hashes", "faults")}
    return dataclasses.replace(whole, **scanned)


def which_are_in(index: FaceIndex, other: FaceIndex) -> NDArray[np.bool_]:
    """[N] whether each picture, by its file and its place in it, is one of the other's."""
    known = set(zip(other.paths.tolist(), other.offsets.tolist(), strict=True))
    return np.array([place in known for place in zip(index.paths.tolist(), index.offsets.tolist(), strict=True)], bool)


def with_attributes(index: FaceIndex, names: Sequence[str]) -> FaceIndex:
    """The index with just these attributes, in this order, named in any case.

    Raises:
        ValueError: the photographs do not have one of them.
    """
    known = [name.lower() for name in index.attribute_names]
    missing = [name for name in names if name.lower() not in known]
    if missing:
        raise ValueError(
            f"tasks.attributes names {', '.join(missing)}, which the photographs do not have; they have "
            f"{', '.join(index.attribute_names) or 'no attributes'}"
        )
    values = _values(index, tuple(name.lower() for name in names))
    return dataclasses.replace(index, attributes=values, attribute_names=tuple(names))


def with_shots(index: FaceIndex, shots: int, seed: int) -> FaceIndex:
    """At most `shots` pictures of every identity, drawn by the seed; unlabelled pictures stay."""
    return index.select((index.random_places(seed) < shots) | (index.labels < 0))


def with_hidden_labels(index: FaceIndex, fraction: float, seed: int) -> FaceIndex:
    """The index with the names of about `fraction` of every identity's pictures, of one at least; the others are
    unlabelled."""
    counts = np.bincount(index.labels[index.labels >= 0], minlength=index.num_classes)
    kept = np.maximum(np.rint(counts * fraction), 1)
    hidden = (index.labels >= 0) & (index.random_places(seed) >= kept[index.labels])
    return dataclasses.replace(index, labels=np.where(hidden, -1, index.labels).astype(np.int32))


def _paths_from(part: FaceIndex, root: str) -> NDArray[np.bytes_]:
    prefix = os.path.relpath(part.root, root)
    if prefix == ".":
        return part.paths
    return np.char.add(os.fsencode(prefix) + b"/", part.paths)


def _stacked(parts: Sequence[FaceIndex], name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """A column that some parts may not have, NaN there; None where none has it."""
    columns = [getattr(part, name) for part in parts]
    if all(column is None for column in columns):
        return None
    unknown = [np.full((len(part), *shape), np.nan, np.float32) for part in parts]
    return np.concatenate([u if c is None else c for c, u in zip(columns, unknown, strict=True)])


def _values(part: FaceIndex, names: tuple[str, ...]) -> NDArray[np.float32]:
    """[N, A] values of attributes given in lower case; NaN where the part does not know one."""
    place = {name.lower(): k for k, name in enumerate(part.attribute_names)}
    found = np.full((len(part), len(names)), np.nan, np.float32)
    for column, name in enumerate(names):
        if name in place and part.attributes is not None:
            found[:, column] = part.attributes[:, place[name]]
    return found
