"""Errors of groups at one threshold, against counting."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from facefast.data import FaceIndex
from facefast.evaluation import groups
from facefast.evaluation.pairs import PairScores
from facefast.evaluation.thresholds import PairThreshold
from facefast.runtime.exits import DataError
from tests.support.pictures import make_index

NAMES = [f"p{k // 2}/{k}.png" for k in range(8)]


@pytest.fixture
def index(tmp_path: Path) -> FaceIndex:
    found = make_index(tmp_path, NAMES, labels=np.arange(8, dtype=np.int32) // 2)
    values = np.array([[1, 20], [1, 20], [0, 30], [0, 30], [1, np.nan], [1, 40], [0, 40], [np.nan, 40]], np.float32)
    return dataclasses.replace(found, attributes=values, attribute_names=("Male", "age"))


def test_an_attribute_divides_the_pictures(index: FaceIndex) -> None:
    found = groups.read_groups("Male", index)
    assert {name: words.tolist() for name, words in found.items()} == {"Male": ["1", "1", "0", "0", "1", "1", "0", ""]}
    assert groups.read_groups("age", index)["age"].tolist()[4] == ""


def test_columns_of_a_csv_divide_the_pictures_each_in_its_way(index: FaceIndex, tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    path.write_text(
        f'tone,path,twin of\nI,{NAMES[0]},\nVI,./{NAMES[1]},"a, b"\nVI,{tmp_path / NAMES[2]},x\nI,other.png,x\n'
    )
    found = groups.read_groups(str(path), index)
    assert found["tone"].tolist() == ["I", "VI", "VI", "", "", "", "", ""]
    assert found["twin of"].tolist() == ["", "a, b", "x", "", "", "", "", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,tone\na,b\n", "name the columns, path and others"),
        ("path\na\n", "name the columns, path and others"),
        ("", "name the columns"),
        ("path,tone\np0/0.png\n", "line 2: .* has 1 columns instead of 2"),
        ("path,tone\np0/0.png,I\n./p0/0.png,II\n", "line 3: .* stands there a second time"),
        ("path,tone\nother.png,I\n", "names no picture of"),
        ("path,tone\np0/0.png,\n", "tone has 0 different values"),
    ],
)
def test_a_damaged_csv_is_refused(text: str, message: str, index: FaceIndex, tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        groups.read_groups(str(path), index)


def test_what_is_no_group_is_refused(index: FaceIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"groups Femal is neither a CSV file nor an attribute .*\(attributes: Male, age\)"
    ):
        groups.read_groups("Femal", index)
    monkeypatch.setattr(groups, "MOST_GROUPS", 2)
    with pytest.raises(DataError, match="age has 3 different values; from 1 to 2 make groups"):
        groups.read_groups("age", index)


def test_errors_are_counted_inside_of_each_group(index: FaceIndex) -> None:
    one, other = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 2, 1, 3, 2])
    scored = PairScores.of([0.9, 0.2, 0.8, 0.7, 0.1, 0.6], one == other, one, other)
    inside = {"1": [0, 1, 2], "0": [3, 4]}

    def pairs_of(rows: NDArray[np.bool_]) -> PairScores | None:
        group = "1" if rows[0] else "0"
        return PairScores(*(column[inside[group]] for column in scored)) if rows.sum() > 1 else None  # type: ignore[arg-type]

    found = groups.group_errors(groups.read_groups("Male", index), index, pairs_of, PairThreshold(0.01, 0.5, 999, 9))
    zero, first = found
    assert (first.group, first.pictures, first.people, first.genuine, first.impostors) == ("1", 4, 2, 2, 1)
    assert (first.fnmr, first.fmr) == (0.5, 1.0)
    assert (zero.fnmr, zero.fmr, zero.pictures) == (0.0, 0.0, 3)
    assert zero.fmr_interval is not None and zero.fmr_interval.low == 0 and zero.fmr_interval.high > 0.5
    alone = groups.read_groups("Male", index)["Male"].copy()
    alone[:] = ""
    alone[1] = "x"
    (nothing,) = groups.group_errors({"g": alone}, index, pairs_of, PairThreshold(0.01, 0.5, 999, 9))
    assert (nothing.fnmr, nothing.fmr, nothing.genuine) == (None, None, 0)
    assert json.loads(json.dumps(nothing.to_json(), allow_nan=False))["fmr_interval"] is None
    with pytest.raises(ValueError, match="too few"):
        groups.group_errors({"g": alone}, index, pairs_of, PairThreshold(0.01, None, 9, 9, why="too few"))
