"""Several sets as one, fewer pictures, fewer names: what stays, what is unknown, and that the seed alone decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facefast.data.index import FaceIndex
from facefast.data.subsets import joined, with_attributes, with_hidden_labels, with_shots


def index_of(root: Path, labels: list[int], **more: Any) -> FaceIndex:
    """Pictures that are not there, of people named after their number."""
    names = [f"p{k}" for k in range(max(labels) + 1)]
    paths = [b"%d/%d.jpg" % (label, row) for row, label in enumerate(labels)]
    return FaceIndex.build(root, paths, labels, names, **more)


def test_joined_sets_keep_the_first_ones_people_and_know_what_each_knows(tmp_path: Path) -> None:
    one = index_of(
        tmp_path / "a",
        [0, 0, 1],
        attributes=np.array([[1.0], [0], [1]], np.float32),
        attribute_names=("Male",),
        landmarks=np.zeros((3, 5, 2), np.float32),
    )
    two = index_of(
        tmp_path / "b" / "c",
        [0, 1],
        attributes=np.array([[30.0, 0], [40, 1]], np.float32),
        attribute_names=("age", "male"),
    )
    two = dataclasses.replace(two, hashes=np.full((2, 2), 7, np.uint64), widths=np.array([5, 6], np.int32))
    whole = joined(one, [two])
    assert whole.labels.tolist() == [0, 0, 1, -1, -1]
    assert whole.class_names == ("p0", "p1")
    assert [whole.path(row) for row in range(5)] == [part.path(row) for part in (one, two) for row in range(len(part))]
    assert whole.attribute_names == ("Male", "age")
    assert whole.attributes is not None and whole.landmarks is not None
    np.testing.assert_array_equal(whole.attributes[:, 0], [1, 0, 1, 0, 1])
    np.testing.assert_array_equal(whole.attributes[:, 1], [np.nan, np.nan, np.nan, 30, 40])
    assert np.isnan(whole.landmarks[3:]).all() and not np.isnan(whole.landmarks[:3]).any()
    assert whole.widths.tolist() == [0, 0, 0, 5, 6] and whole.hashes[4, 0] == 7
    assert whole.boxes is None
    assert joined(one, []) is one


def test_attributes_come_in_the_order_asked_for_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    values = np.array([[1.0, 30], [0, np.nan]], np.float32)
    index = index_of(tmp_path, [0, 1], attributes=values, attribute_names=("Male", "age"))
    chosen = with_attributes(index, ("AGE", "Male"))
    np.testing.assert_array_equal(chosen.attributes, values[:, ::-1])
    with pytest.raises(ValueError, match="tasks.attributes names beard, which .* they have Male, age"):
        with_attributes(index, ("beard",))
    with pytest.raises(ValueError, match="they have no attributes"):
        with_attributes(index_of(tmp_path, [0]), ("Male",))


def test_shots_leave_at_most_so_many_pictures_of_each_person(tmp_path: Path) -> None:
    index = index_of(tmp_path, [0] * 9 + [1] * 2 + [2] + [-1] * 4)
    few = with_shots(index, 3, seed=1)
    assert np.bincount(few.labels[few.labels >= 0]).tolist() == [3, 2, 1]
    assert (few.labels < 0).sum() == 4
    assert few.fingerprint() == with_shots(index, 3, seed=1).fingerprint()
    assert {with_shots(index, 3, seed).fingerprint() for seed in range(8)} != {few.fingerprint()}
    more = with_shots(index, 4, seed=1)
    assert set(few.paths.tolist()) < set(more.paths.tolist())  # five shots are three and two more


def test_hidden_names_leave_everybody_one(tmp_path: Path) -> None:
    index = index_of(tmp_path, [0] * 10 + [1] * 5 + [2] + [-1] * 2)
    hidden = with_hidden_labels(index, 0.2, seed=0)
    known = hidden.labels >= 0
    assert np.bincount(hidden.labels[known]).tolist() == [2, 1, 1]
    np.testing.assert_array_equal(hidden.labels[known], index.labels[known])
    assert len(hidden) == len(index) and hidden.class_names == index.class_names
    nobody = with_hidden_labels(index.select(index.labels < 0), 0.5, seed=0)
    assert (nobody.labels == -1).all()
